// Dynamic shared memory of one block.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#include "sanitizers.h"

namespace simt {

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(memory_); }

  void resize(size_t bytes) {
    if (memory_ && bytes == bytes_) return;
    std::free(memory_);
    memory_ = nullptr;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes + kCanaryBytes)) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    bytes_ = bytes;
  }

  // 0xff bytes are NaN in every floating type and -1 in every integer one.
  void poison() {
    std::memset(memory_, 0xff, bytes_);
    std::memset(memory_ + bytes_, kCanary, kCanaryBytes);
  }

  // The first byte behind the memory that was overwritten, counted from its end; -1: none was.
  int overwritten() const {
    for (size_t i = 0; i < kCanaryBytes; i++) {
      if (memory_[bytes_ + i] != kCanary) return static_cast<int>(i);
    }
    return -1;
  }

  unsigned char* data() const { return memory_; }
  size_t bytes() const { return bytes_; }

 private:
  // The address sanitizer has a red zone of its own just behind the last byte.
  static constexpr size_t kCanaryBytes = kAddressSanitizer ? 0 : 256;
  static constexpr unsigned char kCanary = 0xa5;

  unsigned char* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace simt
