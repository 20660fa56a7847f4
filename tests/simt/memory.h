// What device code calls around its accesses of global memory, and for its dynamic shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "basics.h"
#include "block.h"
#include "sanitizers.h"
#include "watch.h"

namespace simt {

// Of the running block: 16-byte aligned, 0xff in every byte when the block starts.
inline unsigned char* dynamic_shared() { return this_block->shared.data(); }

[[noreturn]] SIMT_UNSEEN inline void fail_access(const char* what, uintptr_t address, size_t bytes,
                                                 Place place) {
  // The buffer nearest to the address is most likely the one that was meant.
  const WatchedBuffer* nearest = nullptr;
  uintptr_t least = ~uintptr_t{0};
  for (int i = 0; i < watched_count; i++) {
    const WatchedBuffer& buffer = watched[i];
    const uintptr_t end = buffer.begin + buffer.bytes;
    const uintptr_t distance = address < buffer.begin ? buffer.begin - address
                               : address < end        ? 0
                                                      : address - end;
    if (distance < least) {
      least = distance;
      nearest = &buffer;
    }
  }
  fail_at(place, "%s: %zu bytes at byte %lld of %s, which has %zu", what, bytes,
          static_cast<long long>(address - nearest->begin), nearest->name.c_str(), nearest->bytes);
}

SIMT_UNSEEN inline void note_access(bool store, const void* pointer, size_t bytes, Place place) {
  if (!watched_count || !this_fiber) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Block& block = *this_block;
  // The buffer found last is tried first: accesses of one buffer come in runs.
  const auto permits = [&](int i) {
    return watched[i].holds(address, bytes) && (!store || watched[i].writable);
  };
  int found = block.last_watched[store];
  if (found >= watched_count || !permits(found)) {
    bool held = false;
    for (found = 0; found < watched_count && !permits(found); found++) {
      held = held || watched[found].holds(address, bytes);
    }
    if (found == watched_count) {
      fail_access(held    ? "store into a read-only buffer"
                  : store ? "store outside every buffer"
                          : "load outside every buffer",
                  address, bytes, place);
    }
    block.last_watched[store] = found;
  }
  if (address % bytes) {
    fail_access(store ? "misaligned store" : "misaligned load", address, bytes, place);
  }
  Traffic& traffic = block.traffic[found];
  if (store) {
    traffic.stores++;
    traffic.wide_stores += bytes == 16;
    traffic.store_bytes += static_cast<int64_t>(bytes);
  } else {
    traffic.loads++;
    traffic.wide_loads += bytes == 16;
    traffic.load_bytes += static_cast<int64_t>(bytes);
  }
}

// Called beside each access of global memory, which is of 1, 2, 4, 8 or 16 bytes.
inline void note_load(const void* pointer, size_t bytes, Place place = Place::here()) {
  note_access(false, pointer, bytes, place);
}
inline void note_store(const void* pointer, size_t bytes, Place place = Place::here()) {
  note_access(true, pointer, bytes, place);
}

}  // namespace simt
