// Asynchronous copies to shared memory, as cp.async makes them: of each thread, in groups.
//
// A copy is made as late as it may be, when its thread waits for its group: until then the memory is
// NaN, and what is written there meanwhile is lost, as it would be where the copy is late. The thread
// sees it after its wait; for other threads it is an access of the thread that waited, which a barrier
// must order. What is never waited for is never there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "basics.h"
#include "block.h"
#include "sanitizers.h"

namespace simt {

SIMT_UNSEEN inline void copy_async(void* to, const void* from, size_t bytes,
                                   Place place = Place::here()) {
  const auto begin = static_cast<unsigned char*>(to) - this_block->shared.data();
  if (begin < 0 || static_cast<size_t>(begin) + bytes > this_block->shared.bytes())
    fail_at(place, "an asynchronous copy to where no shared memory is");
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail_at(place, "an asynchronous copy of %zu bytes", bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail_at(place, "a misaligned asynchronous copy");
  Fiber& fiber = *this_fiber;
  if (fiber.copy_count == Fiber::kMostCopies) fail_at(place, "more copies than simt holds");
  std::memset(to, 0xff, bytes);
  fiber.copies[fiber.copy_count++] = {to, from, bytes, fiber.copy_group};
}

SIMT_UNSEEN inline void commit_copies() { this_fiber->copy_group++; }

// Until at most `pending` groups of this thread are under way, the last ones.
SIMT_UNSEEN inline void wait_for_copies(int pending) {
  Fiber& fiber = *this_fiber;
  int left = 0;
  for (int i = 0; i < fiber.copy_count; i++) {
    const Copy copy = fiber.copies[i];
    if (copy.group + static_cast<uint64_t>(pending) < fiber.copy_group)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      fiber.copies[left++] = copy;
  }
  fiber.copy_count = left;
}

}  // namespace simt
