// A thread's share of the work on the CPU, and the tables of kernels, which are compiled once per
// instruction set. No torch: the kernels' translation units pull in nothing that a linker could
// merge across instruction sets.
#pragma once

#include "common/loss_args.h"

namespace disalign {

// One thread's share of the work: units [begin, end), which are rows, or tiles of positions. The
// class gradients are sums over the chunk's positions in double, padded_classes(C) entries each,
// cleared by the kernel.
struct Chunk {
  int64_t begin = 0;
  int64_t end = 0;
  void* scratch = nullptr;
  double* grad_scale = nullptr;
  double* grad_bias = nullptr;
  double loss_sum = 0;
  bool masked = false;  // a block of rows had a class whose calibration is not finite
};

// Up to the next multiple of 16, so that every buffer of ours can be read and written in full
// registers.
static constexpr int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }
static constexpr int64_t padded_classes(int64_t classes) { return padded(classes); }

// The kernels of one storage dtype.
struct LossKernels {
  void (*forward)(const LossArgs&, Chunk&);
  void (*backward)(const LossArgs&, Chunk&);
};

// One Kernels a storage dtype.
template <class Kernels>
struct KernelTable {
  Kernels float64, float32, bfloat16, float16;
};
using LossKernelTable = KernelTable<LossKernels>;

}  // namespace disalign
