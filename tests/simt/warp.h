// Warp collectives: every lane of the mask deposits a value, then each lane reads what it needs.
//
// As the CUDA guide has it, only __syncwarp orders memory; shuffles and votes do not. In the last,
// partial warp of a block, lanes that never existed may be named in a mask, but not read.
#pragma once

#include <cstdint>

#include "basics.h"
#include "block.h"
#include "sanitizers.h"
#include "timelines.h"

namespace simt {

SIMT_UNSEEN inline Collective& collective_of(Warp& warp, uint32_t mask, Place place) {
  for (int i = 0; i < warp.used; i++) {
    if (warp.collectives[i].mask == mask) return warp.collectives[i];
  }
  if (warp.used == Warp::kMostMasks) {
    fail_at(place, "more than %d different lane masks in one warp", Warp::kMostMasks);
  }
  Collective& collective = warp.collectives[warp.used++];
  collective.mask = mask;
  collective.arrived = 0;
  collective.generation = 0;
  return collective;
}

// What every lane of the mask deposited: 32 values, those of other lanes undefined.
template <bool orders_memory, class T>
SIMT_UNSEEN const uint64_t* exchange(uint32_t mask, T value, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane deposits at most 8 bytes");
  const Fiber& fiber = *this_fiber;
  Warp& warp = this_block->warps[fiber.warp];
  const uint32_t me = 1u << fiber.lane;
  mask &= warp.lanes;
  if (!(mask & me)) fail_at(place, "lane %u is not in its own mask 0x%08x", fiber.lane, mask);
  if (mask & warp.exited) {
    fail_at(place, "the mask 0x%08x names lanes that have exited (0x%08x)", mask, warp.exited);
  }
  Collective& collective = collective_of(warp, mask, place);
  const uint64_t generation = collective.generation;
  uint64_t* deposits = collective.deposits[generation & 1];
  if (collective.arrived && collective.place != place) {
    fail_at(place, "divergent warp collective: other lanes of the mask wait at line %d",
            collective.place.line);
  }
  collective.place = place;
  deposits[fiber.lane] = 0;
  __builtin_memcpy(&deposits[fiber.lane], &value, sizeof value);
  collective.arrived |= me;
  if (orders_memory) release(deposits);
  if (collective.arrived == mask) {
    collective.arrived = 0;
    collective.generation++;
  } else {
    wait_while(collective.generation, generation, place);
  }
  if (orders_memory) acquire(deposits);
  return deposits;
}

template <class T>
SIMT_UNSEEN T deposit_of(const uint64_t* deposits, int lane) {
  T value;
  __builtin_memcpy(&value, deposits + lane, sizeof value);
  return value;
}

// Reads the value of a lane of the same segment of width lanes; its own where the lane that
// __shfl_up, __shfl_down or __shfl_xor asks for lies in another segment.
template <class T>
SIMT_UNSEEN T shuffle(uint32_t mask, T value, int lane, Place place) {
  const uint64_t* deposits = exchange<false>(mask, value, place);
  const Fiber& fiber = *this_fiber;
  if (!((mask & this_block->warps[fiber.warp].lanes) >> lane & 1)) {
    fail_at(place, "lane %u reads lane %d, which is not in the mask 0x%08x", fiber.lane, lane,
            mask);
  }
  return deposit_of<T>(deposits, lane);
}

SIMT_UNSEEN inline int check_width(int width, Place place) {
  if (width < 1 || width > 32 || width & (width - 1)) {
    fail_at(place, "a shuffle's width is %d, not a power of two up to 32", width);
  }
  return width;
}

SIMT_UNSEEN inline int first_lane_of_segment(int width, Place place) {
  return static_cast<int>(this_fiber->lane) & ~(check_width(width, place) - 1);
}

SIMT_UNSEEN inline uint32_t ballot(uint32_t mask, bool predicate, Place place) {
  const uint64_t* deposits = exchange<false>(mask, predicate, place);
  mask &= this_block->warps[this_fiber->warp].lanes;
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (mask >> lane & 1 && deposit_of<bool>(deposits, lane)) votes |= 1u << lane;
  }
  return votes;
}

}  // namespace simt
