// A block that runs: its state, how its threads wait and fail, and its barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "basics.h"
#include "fiber.h"
#include "sanitizers.h"
#include "shared_memory.h"
#include "timelines.h"
#include "watch.h"

namespace simt {

// One warp collective in flight. Lanes deposit a value each; two generations, as a fast lane may
// deposit its next value before a slow one has read the last.
struct Collective {
  uint32_t mask = 0, arrived = 0;
  uint64_t generation = 0;
  Place place;
  uint64_t deposits[2][32];
};

struct Warp {
  static constexpr int kMostMasks = 16;  // distinct ones in one kernel
  uint32_t lanes = 0, exited = 0;
  int used = 0;
  Collective collectives[kMostMasks];
};

struct Launch {
  dim3 grid, block, cluster;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  Options options;
  bool failed = false;
  char message[1024] = "";  // the first failure's
};

struct Cluster;

// Reused for one block after another, and for later launches (scheduler.h).
struct Block {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  uint3 index{};
  dim3 grid, dim;

  std::vector<Fiber> fiber_storage;
  std::vector<Warp> warp_storage;
  Fiber* fibers = nullptr;
  Warp* warps = nullptr;
  uint32_t fiber_count = 0, warp_count = 0;
  uint32_t live = 0;  // threads that have not exited
  bool abandoned = false;

  // The barrier, with what __syncthreads_count, _or and _and collect and last returned.
  uint32_t arrived = 0;
  uint64_t generation = 0;
  Place place;
  int count = 0, any = 0, all = 1;
  int last_count = 0, last_any = 0, last_all = 1;
  char tags[2] = {};

  void** timelines = nullptr;  // one for each thread, if there are any
  char start_tag = 0;

  void* scheduler_stack_pointer = nullptr;
  void* scheduler_timeline = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack_bottom = nullptr;
  size_t scheduler_stack_bytes = 0;

  Stacks stacks;
  SharedMemory shared;
  Traffic traffic[kMostWatched];
  int last_watched[2] = {};  // by loads, by stores
};

constexpr uint32_t kMostClusterBlocks = 8;

// Blocks that run together; a launch without clusters has clusters of one block.
struct Cluster {
  explicit Cluster(const Launch& launch)
      : size(launch.cluster.x * launch.cluster.y * launch.cluster.z) {}

  uint32_t size;
  Block* blocks[kMostClusterBlocks] = {};
  // The barrier: cluster.h.
  uint32_t live = 0, arrived = 0;  // threads
  uint64_t generation = 0;
  char tags[2] = {};
};

inline thread_local Block* this_block = nullptr;
inline thread_local Fiber* this_fiber = nullptr;

SIMT_UNSEEN inline void enter_scheduler() {
  Block& block = *this_block;
  Fiber& fiber = *this_fiber;
  // A null place for the fake stack says that it is no longer needed.
  leave_stack(fiber.finished ? nullptr : &fiber.fake_stack, block.scheduler_stack_bottom,
              block.scheduler_stack_bytes);
  enter_timeline(block.scheduler_timeline);
  swap_stacks(&fiber.stack_pointer, block.scheduler_stack_pointer);
  arrive_on_stack(fiber.fake_stack, &block.scheduler_stack_bottom, &block.scheduler_stack_bytes);
}

// The launch fails, with this message unless another failure came first.
SIMT_UNSEEN inline void record_failure(const Block& block, const Fiber* fiber, Place place,
                                       const char* text) {
  char message[sizeof Launch::message];
  char* end = message + sizeof message;
  char* next = message + std::snprintf(message, sizeof message, "simt: %s", text);
  if (place.line) next += std::snprintf(next, end - next, " (%s:%d)", place.file, place.line);
  next += std::snprintf(next, end - next, ", block (%u, %u, %u)", block.index.x, block.index.y,
                        block.index.z);
  if (fiber) {
    std::snprintf(next, end - next, ", thread (%u, %u, %u)", fiber->thread.x, fiber->thread.y,
                  fiber->thread.z);
  }
  Launch& launch = *block.launch;
  if (!__atomic_exchange_n(&launch.failed, true, __ATOMIC_RELAXED)) {
    std::snprintf(launch.message, sizeof message, "%s", message);
  }
}

// Ends the launch: simt::launch throws an Error that says this, where, and in which thread. The
// block's fibers are abandoned as they stand: nothing on their stacks is destroyed. Outside of a
// kernel it throws at once.
[[noreturn]] __attribute__((format(printf, 2, 3))) SIMT_UNSEEN inline void fail_at(
    Place place, const char* format, ...) {
  char text[640];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!this_fiber) throw Error(std::string("simt: ") + text);
  record_failure(*this_block, this_fiber, place, text);
  this_block->abandoned = true;
  enter_scheduler();
  std::abort();  // an abandoned fiber is never entered again
}

[[noreturn]] inline void fail(const char* message, Place place = Place::here()) {
  fail_at(place, "%s", message);
}

SIMT_UNSEEN inline void wait_while(const uint64_t& awaited, uint64_t generation, Place place) {
  Fiber& fiber = *this_fiber;
  fiber.awaited = &awaited;
  fiber.awaited_generation = generation;
  fiber.place = place;
  enter_scheduler();
  fiber.awaited = nullptr;
}

SIMT_UNSEEN inline void open_barrier(Block& block) {
  block.last_count = block.count;
  block.last_any = block.any;
  block.last_all = block.all;
  block.count = 0;
  block.any = 0;
  block.all = 1;
  block.arrived = 0;
  block.generation++;
}

SIMT_UNSEEN inline void barrier(Place place, bool predicate = false) {
  Block& block = *this_block;
  const uint64_t generation = block.generation;
  void* tag = &block.tags[generation & 1];
  release(tag);
  if (block.arrived && block.place != place) {
    fail_at(place, "divergent barrier: other threads wait in __syncthreads at line %d",
            block.place.line);
  }
  block.place = place;
  block.count += predicate;
  block.any |= predicate;
  block.all &= predicate;
  if (++block.arrived == block.live) {
    open_barrier(block);
  } else {
    wait_while(block.generation, generation, place);
  }
  acquire(tag);
}

SIMT_UNSEEN inline void open_cluster_barrier(Cluster& cluster) {
  cluster.arrived = 0;
  cluster.generation++;
}

// Threads that have exited count as arrived.
SIMT_UNSEEN inline void leave_cluster(Cluster& cluster, const Fiber& fiber) {
  cluster.live--;
  if (fiber.arrived_at_cluster && fiber.cluster_generation == cluster.generation) cluster.arrived--;
  if (cluster.live && cluster.arrived == cluster.live) open_cluster_barrier(cluster);
}

// The running thread returns from the kernel. As on the device, a barrier does not wait for it; a
// warp collective that names it can no longer complete.
SIMT_UNSEEN inline void exit_thread() {
  Block& block = *this_block;
  Fiber& fiber = *this_fiber;
  Warp& warp = block.warps[fiber.warp];
  const uint32_t me = 1u << fiber.lane;
  for (int i = 0; i < warp.used; i++) {
    const Collective& collective = warp.collectives[i];
    if (collective.arrived && collective.mask & me) {
      fail_at(collective.place, "lane %u exits, but a warp collective waits for it", fiber.lane);
    }
  }
  if (fiber.copy_count) {
    fail_at(fiber.copies[fiber.first_copy].place,
            "a thread exits that has not waited for its copies");
  }
  warp.exited |= me;
  fiber.finished = true;
  block.live--;
  if (block.live && block.arrived == block.live) open_barrier(block);
  leave_cluster(*block.cluster, fiber);
}

}  // namespace simt
