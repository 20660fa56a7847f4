// What every part uses: the error, the options, places in the source, a small random generator.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <thread>

namespace simt {

// Any fault of the kernel or of its launch configuration.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  // Threads take turns, and blocks follow each other, in an order drawn from the seed. All blocks
  // then run on one OS thread: on two, the order of the blocks would not be the seed's alone.
  bool shuffle = false;
  uint64_t seed = 0;
  unsigned os_threads = std::thread::hardware_concurrency();
};

inline Options& options() {
  static Options the_options;
  return the_options;
}

// A place in the kernel's source. As a default argument, here() is the place of the call.
struct Place {
  const char* file = "";
  int line = 0;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator!=(const Place& other) const { return line != other.line || file != other.file; }
};

// splitmix64: next to nothing to seed, as each block seeds its own.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t bits = state_ += 0x9e3779b97f4a7c15;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
    return bits ^ (bits >> 31);
  }

  template <class T>
  void shuffle(T* values, uint64_t count) {
    for (uint64_t i = count; i > 1; i--) {
      const uint64_t j = next() % i;
      const T value = values[i - 1];
      values[i - 1] = values[j];
      values[j] = value;
    }
  }

 private:
  uint64_t state_;
};

}  // namespace simt
