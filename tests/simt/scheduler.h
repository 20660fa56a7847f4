// Runs the fibers of a block in turn, and the blocks of a cluster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "basics.h"
#include "block.h"
#include "fiber.h"
#include "sanitizers.h"
#include "timelines.h"

namespace simt {

// Out of line: its frame would else stay on the stack of every fiber.
__attribute__((noinline)) inline void run_body(const Launch& launch) {
  char what[512];
  try {
    launch.body(launch.argument);
    return;
  } catch (const std::exception& error) {
    std::snprintf(what, sizeof what, "%s", error.what());
  }
  fail_at({}, "exception in a kernel: %s", what);
}

SIMT_UNSEEN inline void fiber_entry() {
  arrive_on_stack(nullptr, &this_block->scheduler_stack_bottom, &this_block->scheduler_stack_bytes);
  acquire(&this_block->start_tag);
  run_body(*this_block->launch);
  exit_thread();
  enter_scheduler();
  std::abort();  // a finished fiber is never entered again
}

SIMT_UNSEEN inline void enter_fiber(Block& block, Fiber& fiber) {
  this_fiber = &fiber;
  leave_stack(&block.scheduler_fake_stack, block.stacks.bottom(fiber.number),
              Stacks::usable_bytes());
  enter_timeline(fiber.timeline);
  swap_stacks(&block.scheduler_stack_pointer, fiber.stack_pointer);
  arrive_on_stack(block.scheduler_fake_stack, nullptr, nullptr);
  this_fiber = nullptr;
}

// Sizes, and what does not change from block to block.
inline void prepare(Block& block, Launch& launch) {
  block.launch = &launch;
  block.grid = launch.grid;
  block.dim = launch.block;
  block.fiber_count = launch.block.x * launch.block.y * launch.block.z;
  block.warp_count = (block.fiber_count + 31) / 32;
  if (block.fiber_storage.size() < block.fiber_count) {
    block.fiber_storage.resize(block.fiber_count);
    block.warp_storage.resize(block.warp_count);
  }
  block.fibers = block.fiber_storage.data();
  block.warps = block.warp_storage.data();
  block.stacks.reserve(block.fiber_count);
  block.shared.resize(launch.shared_bytes);
  std::fill(block.traffic, block.traffic + kMostWatched, Traffic());
  const dim3 dim = block.dim;
  for (uint32_t i = 0; i < block.fiber_count; i++) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = make_uint3(i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y);
    fiber.number = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
  }
  for (uint32_t i = 0; i < block.warp_count; i++) {
    const uint32_t lanes = std::min(32u, block.fiber_count - i * 32);
    block.warps[i].lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
  }
}

inline void start_fibers(Block& block) {
  for (uint32_t i = 0; i < block.fiber_count; i++) {
    Fiber& fiber = block.fibers[i];
    if (block.abandoned) forget_frames(block.stacks.bottom(i), Stacks::usable_bytes());
    fiber.stack_pointer = block.stacks.initial_stack_pointer(i, fiber_entry);
    fiber.timeline = block.timelines ? block.timelines[i] : nullptr;
    fiber.finished = false;
    fiber.awaited = nullptr;
    fiber.arrived_at_cluster = false;
    fiber.fake_stack = nullptr;
    fiber.first_copy = fiber.copy_count = 0;
    fiber.copy_group = 0;
    fiber.fenced = false;
  }
  for (uint32_t i = 0; i < block.warp_count; i++) {
    block.warps[i].exited = 0;
    block.warps[i].used = 0;
  }
  block.abandoned = false;
  block.live = block.fiber_count;
  block.generation = 0;
  open_barrier(block);
}

// Which threads wait where: a line for each of the first few places.
inline void record_deadlock(const Block& block) {
  constexpr int kMostPlaces = 4;
  Place places[kMostPlaces];
  uint32_t waiting[kMostPlaces] = {}, first[kMostPlaces] = {};
  for (uint32_t i = 0; i < block.fiber_count; i++) {
    if (block.fibers[i].finished) continue;
    for (int k = 0; k < kMostPlaces; k++) {
      if (!waiting[k]) places[k] = block.fibers[i].place;
      if (places[k] != block.fibers[i].place) continue;
      if (!waiting[k]++) first[k] = i;
      break;
    }
  }
  std::string text = "deadlock: not all threads reach the same barrier;";
  for (int k = 0; k < kMostPlaces && waiting[k]; k++) {
    text += " " + std::to_string(waiting[k]) + " threads from number " + std::to_string(first[k]) +
            " on wait at line " + std::to_string(places[k].line) + ",";
  }
  text += " " + std::to_string(block.fiber_count - block.live) + " have exited";
  record_failure(block, nullptr, places[0], text.c_str());
}

// Every warp runs until none of its lanes can, lanes of a warp taking turns between its
// collectives. Returns whether any thread ran.
SIMT_UNSEEN inline bool take_turns(Block& block, Random* random) {
  uint32_t warp_order[32], lane_order[32];
  for (uint32_t i = 0; i < 32; i++) warp_order[i] = lane_order[i] = i;
  bool progress = false;
  if (random) random->shuffle(warp_order, block.warp_count);
  for (uint32_t w = 0; w < block.warp_count; w++) {
    for (bool again = true; again;) {
      again = false;
      if (random) random->shuffle(lane_order, 32);
      for (uint32_t l = 0; l < 32; l++) {
        const uint32_t i = warp_order[w] * 32 + lane_order[l];
        if (i >= block.fiber_count) continue;
        Fiber& fiber = block.fibers[i];
        if (fiber.finished) continue;
        if (fiber.awaited && *fiber.awaited == fiber.awaited_generation) continue;
        enter_fiber(block, fiber);
        if (block.abandoned) return true;
        again = progress = true;
      }
    }
  }
  return progress;
}

// A block whose threads have all exited: its memory is checked, and no longer anyone's.
SIMT_UNSEEN inline void finish_block(Block& block) {
  for (uint32_t i = 0; i < block.fiber_count; i++) join_timeline(block.fibers[i].timeline);
  const int overwritten = block.shared.overwritten();
  if (overwritten >= 0) {
    const std::string text = "shared memory overflow: byte " +
                             std::to_string(block.shared.bytes() + overwritten) + " of " +
                             std::to_string(block.shared.bytes()) + " was written";
    record_failure(block, nullptr, {}, text.c_str());
  }
  if (block.cluster->size > 1) block.shared.poison();
}

// Until all threads of the cluster have exited or one has failed.
SIMT_UNSEEN inline void run_blocks(Cluster& cluster, Random* random) {
  uint32_t order[kMostClusterBlocks];
  for (uint32_t i = 0; i < cluster.size; i++) order[i] = i;
  while (cluster.live) {
    bool progress = false;
    if (random) random->shuffle(order, cluster.size);
    for (uint32_t i = 0; i < cluster.size; i++) {
      Block& block = *cluster.blocks[order[i]];
      if (!block.live) continue;
      this_block = &block;
      progress |= take_turns(block, random);
      this_block = nullptr;
      if (block.abandoned) return;
      if (!block.live) finish_block(block);
    }
    if (!progress) {
      for (uint32_t i = 0; i < cluster.size; i++) {
        Block& block = *cluster.blocks[i];
        if (!block.live) continue;
        record_deadlock(block);
        block.abandoned = true;
        return;
      }
    }
  }
}

inline uint3 block_index(const Launch& launch, uint32_t cluster, uint32_t rank) {
  const dim3 size = launch.cluster, grid = launch.grid;
  const uint32_t columns = grid.x / size.x, rows = grid.y / size.y;
  return make_uint3(cluster % columns * size.x + rank % size.x,
                    cluster / columns % rows * size.y + rank / size.x % size.y,
                    cluster / columns / rows * size.z + rank / size.x / size.y);
}

// number: of the cluster.
inline void run_cluster(Cluster& cluster, uint32_t number) {
  const Launch& launch = *cluster.blocks[0]->launch;
  cluster.live = cluster.arrived = 0;
  for (uint32_t rank = 0; rank < cluster.size; rank++) {
    Block& block = *cluster.blocks[rank];
    block.cluster = &cluster;
    block.rank = rank;
    block.index = block_index(launch, number, rank);
    block.shared.poison();
    start_fibers(block);
    cluster.live += block.live;
    block.scheduler_timeline = current_timeline();
    release(&block.start_tag);
  }
  Random random(launch.options.seed * 0x100000001 + number);
  run_blocks(cluster, launch.options.shuffle ? &random : nullptr);
  // After a failure: the other blocks' fibers are abandoned too.
  for (uint32_t rank = 0; rank < cluster.size; rank++) {
    Block& block = *cluster.blocks[rank];
    if (!block.live) continue;
    block.abandoned = true;
    for (uint32_t i = 0; i < block.fiber_count; i++) join_timeline(block.fibers[i].timeline);
  }
}

}  // namespace simt
