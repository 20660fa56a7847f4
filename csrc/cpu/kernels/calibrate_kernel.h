// What the launcher (calibrate.cpp) and the kernels of calibrated logits share;
// ../common/loss_args.h says what outer, class vectors and A are.
#pragma once

#include "cpu/kernels/chunk.h"

namespace disalign {

struct CalibrateArgs {
  const void* logits = nullptr;
  int64_t outer = 0;
  int64_t classes = 0;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t class_stride = 1;
  const void* scale = nullptr;
  const void* bias = nullptr;
  const void* confidence = nullptr;
  void* output = nullptr;             // forward; contiguous
  const void* grad_output = nullptr;  // backward; contiguous
  // backward; null where not wanted
  int64_t grad_outer_stride = 0, grad_class_stride = 1;
  void* grad_logits = nullptr;
  void *grad_scale = nullptr, *grad_bias = nullptr, *grad_confidence = nullptr;  // of A
  bool class_gradients = false;

  int64_t positions() const { return outer * inner; }
};

constexpr int64_t kCalibrateTile = 512;  // positions that the dense kernels work on together
constexpr int64_t kCalibrateScratch = 2 * kCalibrateTile * 8;

static inline int64_t calibrate_tiles(const CalibrateArgs& args) {
  return (args.inner + kCalibrateTile - 1) / kCalibrateTile;  // of an image
}

struct CalibrateKernels {
  void (*forward)(const CalibrateArgs&, Chunk&);
  void (*backward)(const CalibrateArgs&, Chunk&);
};

using CalibrateKernelTable = KernelTable<CalibrateKernels>;

namespace baseline {
const CalibrateKernelTable& row_calibrate_kernels();
const CalibrateKernelTable& dense_calibrate_kernels();
}  // namespace baseline
namespace avx2 {
const CalibrateKernelTable& row_calibrate_kernels();
const CalibrateKernelTable& dense_calibrate_kernels();
}  // namespace avx2
namespace avx512 {
const CalibrateKernelTable& row_calibrate_kernels();
const CalibrateKernelTable& dense_calibrate_kernels();
}  // namespace avx512

}  // namespace disalign
