// The CUDA keywords and functions that device code may use here. What is missing is missing on
// purpose (atomics of floats, inline PTX, device-only half arithmetic): it would not compile.
//
// Static __shared__ arrays work (thread_local: one for each OS thread) but are neither poisoned nor
// watched for overflow; dynamic shared memory is simt::dynamic_shared(), not `extern __shared__`.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "async_copy.h"
#include "basics.h"
#include "block.h"
#include "cluster.h"
#include "warp.h"

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ thread_local
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::simt::this_fiber->thread)
#define blockIdx (::simt::this_block->index)
#define blockDim (::simt::this_block->dim)
#define gridDim (::simt::this_block->grid)
#define warpSize 32

using std::max;
using std::min;

// ---- Faults ----

[[noreturn]] inline void __trap(simt::Place place = simt::Place::here()) {
  simt::fail("__trap", place);
}

// What assert() calls: of this module alone, as it is hidden. <cassert> may be included again and
// again, so the macro itself cannot be replaced.
extern "C" __attribute__((visibility("hidden"))) inline void __assert_fail(
    const char* text, const char* file, unsigned line, const char* function) noexcept {
  if (simt::this_fiber) simt::fail_at({file, static_cast<int>(line)}, "assert(%s)", text);
  std::fprintf(stderr, "%s:%u: %s: assertion %s failed\n", file, line, function, text);
  std::abort();
}

// ---- Barriers ----

inline void __syncthreads(simt::Place place = simt::Place::here()) { simt::barrier(place); }
SIMT_UNSEEN inline int __syncthreads_count(int predicate, simt::Place place = simt::Place::here()) {
  simt::barrier(place, predicate != 0);
  return simt::this_block->last_count;
}
SIMT_UNSEEN inline int __syncthreads_or(int predicate, simt::Place place = simt::Place::here()) {
  simt::barrier(place, predicate != 0);
  return simt::this_block->last_any;
}
SIMT_UNSEEN inline int __syncthreads_and(int predicate, simt::Place place = simt::Place::here()) {
  simt::barrier(place, predicate != 0);
  return simt::this_block->last_all;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Place place = simt::Place::here()) {
  simt::exchange<true>(mask, 0, place);
}

// ---- Clusters (sm_90) ----

inline unsigned __clusterRelativeBlockRank() { return simt::this_block->rank; }
inline unsigned __clusterSizeInBlocks() { return simt::this_block->cluster->size; }
inline void __cluster_barrier_arrive(simt::Place place = simt::Place::here()) {
  simt::cluster_arrive(place);
}
inline void __cluster_barrier_wait(simt::Place place = simt::Place::here()) {
  simt::cluster_wait(place);
}
inline void* __cluster_map_shared_rank(const void* pointer, unsigned rank,
                                       simt::Place place = simt::Place::here()) {
  return simt::map_shared(pointer, rank, place);
}

// ---- Warp collectives ----

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              simt::Place place = simt::Place::here()) {
  const int first = simt::first_lane_of_segment(width, place);
  return simt::shuffle(mask, value, first + (source & (width - 1)), place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 simt::Place place = simt::Place::here()) {
  const int lane = static_cast<int>(simt::this_fiber->lane);
  const int source = lane - static_cast<int>(delta);
  const bool inside = source >= simt::first_lane_of_segment(width, place);
  return simt::shuffle(mask, value, inside ? source : lane, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   simt::Place place = simt::Place::here()) {
  const int lane = static_cast<int>(simt::this_fiber->lane);
  const int source = lane + static_cast<int>(delta);
  const bool inside = source < simt::first_lane_of_segment(width, place) + width;
  return simt::shuffle(mask, value, inside ? source : lane, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  simt::Place place = simt::Place::here()) {
  const int lane = static_cast<int>(simt::this_fiber->lane);
  const int source = lane ^ lane_mask;
  const bool inside = source < simt::first_lane_of_segment(width, place) + width;
  return simt::shuffle(mask, value, inside ? source : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Place place = simt::Place::here()) {
  return simt::ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::Place::here()) {
  return simt::ballot(mask, predicate == 0, place) == 0;
}

// ---- Order between blocks ----

// For the thread sanitizer: what came before a thread's fence and its atomicAdd comes before what
// follows a later fence of another thread. Without the fence atomicAdd orders nothing.
namespace simt {
inline char fence_tag;
SIMT_UNSEEN inline bool has_fenced(bool now) {
  const bool before = this_fiber->fenced;
  this_fiber->fenced = before || now;
  return before;
}
}  // namespace simt

inline void __threadfence() {
  simt::has_fenced(true);
  simt::acquire(&simt::fence_tag);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  if (simt::has_fenced(false)) simt::release(&simt::fence_tag);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// ---- Memory with a cache hint ----

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}

// ---- Arithmetic and bits: the host's functions are at least as accurate ----

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

namespace simt {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace simt
inline float __int_as_float(int x) { return simt::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits_as<float>(x); }
inline int __float_as_int(float x) { return simt::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits_as<unsigned>(x); }
