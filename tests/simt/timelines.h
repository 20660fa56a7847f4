// What the thread sanitizer must be told about fibers. Nothing without it.
//
// Each CUDA thread has a timeline of its own (a "fiber" of the sanitizer), and switching between
// timelines orders nothing. Only __syncthreads, __syncwarp and
// the cluster's barrier order: two accesses that no barrier
// orders are reported as a data race with their source lines, under any schedule. simt's own state
// passes between timelines all the time, so the functions that touch it are SIMT_UNSEEN and must
// not call into the standard library with it.
//
// A timeline costs the sanitizer half a millisecond and half a megabyte, so they are reused. What
// ran on a timeline before comes before what runs on it now; so as to see races between blocks,
// successive blocks take different sets of timelines. Two blocks that run a multiple of the number
// of sets apart (8 sets up to 128 threads, then 4, 2 from 512 threads on) count as ordered: with
// options().shuffle, which two those are changes with the seed.
#pragma once

#include <cstdint>

#include "sanitizers.h"

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}

namespace simt {

constexpr unsigned kWithoutOrder = 1;  // __tsan_switch_to_fiber_no_sync

SIMT_UNSEEN inline void* current_timeline() { return __tsan_get_current_fiber(); }
SIMT_UNSEEN inline void enter_timeline(void* timeline) {
  __tsan_switch_to_fiber(timeline, kWithoutOrder);
}
// What comes next on the current timeline comes after all that the other one did.
SIMT_UNSEEN inline void join_timeline(void* other) {
  void* current = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(other, kWithoutOrder);
  __tsan_switch_to_fiber(current, 0);
}
// What a timeline did before release(tag) comes before what another does after acquire(tag).
SIMT_UNSEEN inline void release(void* tag) { __tsan_release(tag); }
SIMT_UNSEEN inline void acquire(void* tag) { __tsan_acquire(tag); }

class Timelines {
 public:
  // For the block that runs as the position-th of a launch: one for each of its threads.
  void** of_block(uint64_t position, uint32_t threads) {
    const uint64_t first = position % number_of_sets(threads) * threads;
    while (count_ < first + threads) all_[count_++] = __tsan_create_fiber(0);
    return all_ + first;
  }

  // The sanitizer keeps a call stack for each timeline: those of abandoned fibers are of no use.
  void discard() {
    while (count_ > 0) __tsan_destroy_fiber(all_[--count_]);
  }

  static uint64_t number_of_sets(uint32_t threads) {
    return threads >= 512 ? 2 : threads <= 128 ? 8 : 1024 / threads;
  }

 private:
  // Not a vector: the blocks of a launch read here, and nothing orders them before it grows.
  void* all_[2048] = {};
  uint64_t count_ = 0;
};

}  // namespace simt

#else

namespace simt {

inline void* current_timeline() { return nullptr; }
inline void enter_timeline(void*) {}
inline void join_timeline(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}

class Timelines {
 public:
  static uint64_t number_of_sets(uint32_t) { return 1; }
  void** of_block(uint64_t, uint32_t) { return nullptr; }
  void discard() {}
};

}  // namespace simt

#endif

namespace simt {
inline Timelines timelines;
}  // namespace simt
