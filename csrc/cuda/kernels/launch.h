// How kernels are launched: by CUDA, or by tests/simt on the CPU. Everything that decides what is
// launched, and with what memory, is written once over this interface, and executed by the tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/loss_args.h"

namespace disalign::cuda {

struct Shape {
  int64_t grid_x = 1;
  int64_t grid_y = 1;
  int threads = 0;
  size_t shared_bytes = 0;
  bool clustered = false;  // the grid_y blocks of one x run together and share memory
};

constexpr int kClusterBlocks = 8;  // at most, on every device that has clusters

// Of the device.
struct Limits {
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // of a block, at most
  bool has_clusters = false;
};

// Interface: every launcher has
//   Limits limits() const;
//   int blocks_per_multiprocessor(void (*kernel)(Args), int threads, size_t shared_bytes);
//   int clusters(void (*kernel)(Args), const Shape& shape);
//     how many of the shape's clusters run at once; 0: the device or the kernel's code has none
//   void launch(void (*kernel)(Args), Shape shape, const Args& args);
//   void* allocate(size_t bytes);   // device memory, valid until the launcher's end

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

static inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace disalign::cuda
