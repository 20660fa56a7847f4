// Large new gradients on huge pages.
//
// A fresh 64 MiB tensor is 16,384 first touches of a 4 KiB page, which cost several times the
// arithmetic on it; with 2 MiB pages it is 32. Linux's default ("madvise") gives huge pages only to
// memory that asks for them. The advice changes neither contents nor size, and is a hint.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace disalign {

inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace disalign
