// Launches divisor_kernel.cuh and finish_kernel.cuh: what comes before and after the positions.
#pragma once

#include <algorithm>

#include "cuda/kernels/divisor_kernel.cuh"
#include "cuda/kernels/finish_kernel.cuh"
#include "cuda/launch/dispatch.h"

namespace disalign::cuda {

// Before forward's positions. Where it makes the logits' gradient, also what the mean divides by; the
// last block of the kernel that follows then finishes, where nothing is left but the loss.
template <class A, class Launcher>
void begin_forward(Launcher& launcher, DivisorArgs& args) {
  args.details = args.prediction || args.entropy;
  if (!args.grad_logits || args.reduction != kReduceMean ||
      (args.normalizer != kByWeights && args.normalizer != kByValid))
    return;
  Shape shape;
  shape.threads = kDivisorThreads;
  shape.shared_bytes = kDivisorThreads / 32 * sizeof(double);
  shape.grid_x = std::min(divide_up(args.positions(), kDivisorThreads), kDivisorBlocks);
  args.divisor_blocks = static_cast<int32_t>(shape.grid_x);
  args.divisors = static_cast<double*>(launcher.allocate(shape.grid_x * sizeof(double)));
  if (!args.class_gradients && !args.grad_confidence)
    args.ticket = static_cast<unsigned*>(launcher.allocate(sizeof(unsigned)));
  launcher.launch(divisor_kernel<A>, shape, args);
}

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
