// What the row operators launch where targets are class probabilities; as row_launch.h.
#pragma once

#include "cuda/kernels/soft_row_kernel.cuh"
#include "cuda/launch/row_launch.h"

namespace disalign::cuda {

template <class T, bool Calibrated>
RowKernel soft_row_kernel_of(const RowPlan& plan) {
  return plan.wide ? soft_row_kernel<T, Calibrated, true> : soft_row_kernel<T, Calibrated, false>;
}

template <class T, bool Calibrated, class Launcher>
void launch_soft_row_backward(Launcher& launcher, RowArgs args, Dtype dtype) {
  FinishArgs last;
  RowPlan plan;
  if (args.outer > 0) {
    plan = row_plan<T>(args, launcher.limits(), kBackwardThreads);
    const RowKernel kernel = soft_row_kernel_of<T, Calibrated>(plan);
    fill_grid<T>(launcher, kernel, args, plan);
    apply(plan, args);
    args.backward = true;
    last.class_blocks = plan.shape.grid_x;
    if (args.class_gradients)
      args.class_sums = new_class_sums<T>(launcher, args, plan.shape.grid_x);
    if (args.grad_confidence)
      args.confidence_sums =
          plan.tiles == 1 ? args.grad_confidence
                          : launcher.allocate(plan.tiles * args.outer * sizeof(Accumulate<T>));
    launcher.launch(kernel, plan.shape, args);
  }
  if (plan.tiles == 1) args.grad_confidence = nullptr;  // is done
  finish_row_backward(launcher, dtype, args, last);
}

template <class T, bool Calibrated, class Launcher>
void launch_soft_row_forward(Launcher& launcher, RowArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  FinishArgs last;
  RowPlan plan = row_plan<T>(args, launcher.limits(), kWideThreads<T>);
  const bool tiled = plan.tiles > 1;
  if (tiled && (args.grad_logits || args.class_gradients || args.grad_confidence)) {
    launch_soft_row_forward<T, Calibrated>(launcher, without_gradients(args), dtype);
    return launch_soft_row_backward<T, Calibrated>(launcher, args, dtype);
  }
  if (args.outer > 0) {
    launch_divisors<A>(launcher, args);
    const RowKernel kernel = soft_row_kernel_of<T, Calibrated>(plan);
    fill_grid<T>(launcher, kernel, args, plan);
    apply(plan, args);
    last.blocks = plan.shape.grid_x;
    Shape combine;
    if (tiled) {
      combine = combine_shape<A>(launcher, args);
      last.blocks = combine.grid_x;
    } else if (args.class_gradients) {
      last.class_blocks = plan.shape.grid_x;
      args.class_sums = new_class_sums<T>(launcher, args, last.class_blocks);
    }
    args.confidence_sums = args.grad_confidence;
    if (args.reduction != kReduceNone)
      args.block_sums = static_cast<double*>(launcher.allocate(2 * last.blocks * sizeof(double)));
    launcher.launch(kernel, plan.shape, args);
    if (tiled) launcher.launch(soft_combine_kernel<A>, combine, args);
  }
  finish_row_forward(launcher, dtype, args, last);
}

template <class Launcher>
void launch_soft_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    launch_soft_row_forward<typename decltype(type)::type, decltype(calibrated)::value>(
        launcher, args, dtype);
  });
}

template <class Launcher>
void launch_soft_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    launch_soft_row_backward<typename decltype(type)::type, decltype(calibrated)::value>(
        launcher, args, dtype);
  });
}

}  // namespace disalign::cuda
