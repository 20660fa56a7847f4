// The global buffers that launches may touch, and what they moved.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "basics.h"
#include "sanitizers.h"

namespace simt {

// Accesses of a buffer since it is watched. Wide: of 16 bytes.
struct Traffic {
  int64_t loads = 0, stores = 0;
  int64_t wide_loads = 0, wide_stores = 0;
  int64_t load_bytes = 0, store_bytes = 0;
};

struct WatchedBuffer {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool writable = false;
  Traffic traffic;

  bool holds(uintptr_t address, size_t count) const {
    return address >= begin && address - begin <= bytes && count <= bytes - (address - begin);
  }
};

constexpr int kMostWatched = 32;
inline WatchedBuffer watched[kMostWatched];
inline int watched_count = 0;

// From now on an access outside every watched buffer is an Error. A buffer may be watched twice,
// under two names: an access counts for the first name that permits it.
inline void watch(const char* name, const void* begin, size_t bytes, bool writable) {
  if (watched_count == kMostWatched) throw Error("simt: too many watched buffers");
  watched[watched_count++] = {name, reinterpret_cast<uintptr_t>(begin), bytes, writable, {}};
}

inline void unwatch_all() { watched_count = 0; }

inline Traffic traffic(const char* name) {
  for (int i = 0; i < watched_count; i++) {
    if (watched[i].name == name) return watched[i].traffic;
  }
  throw Error("simt: no buffer is watched under the name " + std::string(name));
}

// Adds what one OS thread counted for itself. Atomics that order nothing: the thread sanitizer
// would take a lock here for an order between blocks.
SIMT_UNSEEN inline void add_traffic(const Traffic* counted) {
  for (int i = 0; i < watched_count; i++) {
    Traffic& total = watched[i].traffic;
    __atomic_fetch_add(&total.loads, counted[i].loads, __ATOMIC_RELAXED);
    __atomic_fetch_add(&total.stores, counted[i].stores, __ATOMIC_RELAXED);
    __atomic_fetch_add(&total.wide_loads, counted[i].wide_loads, __ATOMIC_RELAXED);
    __atomic_fetch_add(&total.wide_stores, counted[i].wide_stores, __ATOMIC_RELAXED);
    __atomic_fetch_add(&total.load_bytes, counted[i].load_bytes, __ATOMIC_RELAXED);
    __atomic_fetch_add(&total.store_bytes, counted[i].store_bytes, __ATOMIC_RELAXED);
  }
}

}  // namespace simt
