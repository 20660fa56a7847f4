// Launches finish_kernel.cuh.
#pragma once

#include <algorithm>

#include "cuda/kernels/finish_kernel.cuh"
#include "cuda/launch/dispatch.h"

namespace disalign::cuda {

template <class Launcher>
void finish(Launcher& launcher, Dtype dtype, FinishArgs args) {
  args.class_grid = args.class_gradients ? 2 * divide_up(args.classes, kFinishClasses) : 0;
  const int64_t rest = args.grad_confidence
                           ? std::min(divide_up(args.confidences, kFinishThreads), int64_t{1} << 12)
                           : 0;
  Shape shape;
  shape.grid_x = std::max<int64_t>(1, args.class_grid + rest);
  shape.threads = kFinishThreads;
  shape.shared_bytes = kFinishThreads * sizeof(double);
  if (dtype == Dtype::kFloat64)
    launcher.launch(finish_kernel<double>, shape, args);
  else
    launcher.launch(finish_kernel<float>, shape, args);
}

}  // namespace disalign::cuda
