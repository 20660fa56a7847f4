// What the launcher (row_calibrate.cpp) and the kernels of calibrated logits share; see
// row_kernel.h for the meaning of rows, class vectors and A.
#pragma once

#include "loss_args.h"

namespace disalign {

struct CalibrateArgs {
  const void* logits = nullptr;
  int64_t row_stride = 0;
  int64_t classes = 0;
  const void* scale = nullptr;
  const void* bias = nullptr;
  const void* confidence = nullptr;
  void* output = nullptr;             // forward; rows next to each other
  const void* grad_output = nullptr;  // backward; rows next to each other
  void* grad_logits = nullptr;        // backward, null where not wanted; rows next to each other
  void* grad_confidence = nullptr;    // of A
  bool class_gradients = false;
};

struct CalibrateKernels {
  void (*forward)(const CalibrateArgs&, Chunk&);
  void (*backward)(const CalibrateArgs&, Chunk&);
};

using CalibrateKernelTable = KernelTable<CalibrateKernels>;

namespace baseline {
const CalibrateKernelTable& calibrate_kernels();
}
namespace avx2 {
const CalibrateKernelTable& calibrate_kernels();
}
namespace avx512 {
const CalibrateKernelTable& calibrate_kernels();
}

}  // namespace disalign
