// Fibers: their stacks, and the switch from one stack to another.
#pragma once

#ifndef __x86_64__
#error "simt switches stacks in x86-64 assembly"
#endif

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "basics.h"
#include "sanitizers.h"

namespace simt {

// Saves the registers that a callee must preserve, swaps stacks and returns on the other one.
__attribute__((naked, noinline)) SIMT_UNSEEN inline void swap_stacks(void** /*left*/,
                                                                     void* /*entered*/) {
  __asm__ volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}

// The stacks of one block, in one mapping that only grows. Pages are used as they are touched.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 << 10;
  static constexpr size_t kGuardBytes = 4096;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() { unmap(); }

  void reserve(uint32_t count) {
    if (count <= count_) return;
    unmap();
    void* mapping = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(mapping);
    count_ = count;
    for (uint32_t i = 0; i < count; i++) mprotect(memory_ + i * kBytes, kGuardBytes, PROT_NONE);
  }

  unsigned char* bottom(uint32_t i) const { return memory_ + i * kBytes + kGuardBytes; }
  static constexpr size_t usable_bytes() { return kBytes - kGuardBytes; }

  // Where entry starts to run. Tops differ in their cache sets: at a stride of kBytes alone, all
  // fibers' frames would share the same few lines of the cache.
  void* initial_stack_pointer(uint32_t i, void (*entry)()) const {
    unsigned char* top = bottom(i) + usable_bytes() - (i % 64) * 192;
    void** stack = reinterpret_cast<void**>(top) - 2;  // a call leaves rsp % 16 == 8
    *stack = reinterpret_cast<void*>(entry);
    return stack - 6;  // the registers that swap_stacks restores
  }

 private:
  void unmap() {
    if (memory_) munmap(memory_, count_ * kBytes);
  }

  unsigned char* memory_ = nullptr;
  uint32_t count_ = 0;
};

// A copy to shared memory that is under way (async_copy.h).
struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  size_t bytes = 0;
  Place place;
  uint64_t group = 0;
  uint32_t source[4] = {};  // what was there when the copy was issued
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint3 thread{};
  uint32_t number = 0, lane = 0, warp = 0;
  bool finished = false;
  // It waits while *awaited == awaited_generation, at this place.
  const uint64_t* awaited = nullptr;
  uint64_t awaited_generation = 0;
  Place place;
  bool arrived_at_cluster = false;  // at the barrier of this generation, without having waited
  uint64_t cluster_generation = 0;
  void* timeline = nullptr;
  void* fake_stack = nullptr;
  static constexpr int kMostCopies = 128;
  Copy copies[kMostCopies];  // under way: a ring, from the first of them on
  int first_copy = 0, copy_count = 0;
  uint64_t copy_group = 0;
  bool fenced = false;
};

}  // namespace simt
