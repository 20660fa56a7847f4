// Asynchronous copies to shared memory, as cp.async makes them: of each thread, in groups.
//
// A copy is made as late as it may be, when its thread waits for its group: until then the memory is
// NaN. The thread sees it after its wait; for other threads it is an access of the thread that
// waited, which a barrier must order. What is never waited for is never there.
//
// A copy that comes sooner must give the same: while it is under way, a store to its memory would be
// lost or not, and a store to its source copied or not. Both are Errors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "basics.h"
#include "block.h"
#include "sanitizers.h"

namespace simt {

constexpr uint32_t kUnderWay = 0xffffffff;  // NaN

SIMT_UNSEEN inline bool in_shared(const void* pointer, size_t bytes) {
  const SharedMemory& shared = this_block->shared;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(shared.data());
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  return address >= begin && address - begin + bytes <= shared.bytes();
}

SIMT_UNSEEN inline void check_copy(const Copy& copy) {
  const size_t bytes = copy.bytes;
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail_at(copy.place, "an asynchronous copy of %zu bytes", bytes);
  if (!in_shared(copy.to, bytes))
    fail_at(copy.place, "an asynchronous copy to where no shared memory is");
  if (in_shared(copy.from, 1)) fail_at(copy.place, "an asynchronous copy from shared memory");
  if (reinterpret_cast<uintptr_t>(copy.to) % bytes ||
      reinterpret_cast<uintptr_t>(copy.from) % bytes)
    fail_at(copy.place, "a misaligned asynchronous copy");
}

SIMT_UNSEEN inline void push_copy(Copy copy) {
  Fiber& fiber = *this_fiber;
  if (fiber.copy_count == Fiber::kMostCopies) fail_at(copy.place, "more copies than simt holds");
  copy.group = fiber.copy_group;
  fiber.copies[(fiber.first_copy + fiber.copy_count++) % Fiber::kMostCopies] = copy;
}

// The first copy, if it is not of the last `pending` groups.
SIMT_UNSEEN inline bool pop_copy(int pending, Copy& copy) {
  Fiber& fiber = *this_fiber;
  if (fiber.copy_count == 0) return false;
  copy = fiber.copies[fiber.first_copy];
  if (copy.group + static_cast<uint64_t>(pending) >= fiber.copy_group) return false;
  fiber.first_copy = (fiber.first_copy + 1) % Fiber::kMostCopies;
  fiber.copy_count--;
  return true;
}

// The thread sanitizer looks into these two, as the accesses are the kernel's: not by memcpy, which
// it does not see here.
inline void copy_async(void* to, const void* from, size_t bytes, Place place = Place::here()) {
  Copy copy{to, from, bytes, place};
  check_copy(copy);
  for (size_t i = 0; i < bytes / sizeof(uint32_t); i++) {
    copy.source[i] = static_cast<const uint32_t*>(from)[i];
    static_cast<uint32_t*>(to)[i] = kUnderWay;
  }
  push_copy(copy);
}

// Until at most `pending` groups of this thread are under way, the last ones.
inline void wait_for_copies(int pending) {
  for (Copy copy; pop_copy(pending, copy);) {
    for (size_t i = 0; i < copy.bytes / sizeof(uint32_t); i++) {
      uint32_t& to = static_cast<uint32_t*>(copy.to)[i];
      if (to != kUnderWay)
        fail_at(copy.place, "a store to where an asynchronous copy is under way");
      if (static_cast<const uint32_t*>(copy.from)[i] != copy.source[i])
        fail_at(copy.place, "a store to the source of an asynchronous copy that is under way");
      to = copy.source[i];
    }
  }
}

SIMT_UNSEEN inline void commit_copies() { this_fiber->copy_group++; }

}  // namespace simt
