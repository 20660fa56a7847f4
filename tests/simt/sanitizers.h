// What the address sanitizer must be told about fibers (for the thread sanitizer: timelines.h).
// Nothing without them.
#pragma once

#include <cstddef>

// A function that the thread sanitizer does not look into.
#ifdef __SANITIZE_THREAD__
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define SIMT_UNSEEN
#endif

#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void** left_fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** left_bottom, size_t* bytes);
void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
}
#endif

namespace simt {

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

// It needs the bounds of the stack in use.
#ifdef __SANITIZE_ADDRESS__
inline void leave_stack(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
inline void arrive_on_stack(void* fake_stack, const void** left_bottom, size_t* left_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, left_bottom, left_bytes);
}
// The frames of an abandoned fiber leave red zones behind.
inline void forget_frames(void* bottom, size_t bytes) {
  __asan_unpoison_memory_region(bottom, bytes);
}
#else
inline void leave_stack(void**, const void*, size_t) {}
inline void arrive_on_stack(void*, const void**, size_t*) {}
inline void forget_frames(void*, size_t) {}
#endif

}  // namespace simt
