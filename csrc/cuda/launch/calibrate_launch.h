// What the operators of the calibrated logits launch; as row_launch.h.
#pragma once

#include "cuda/kernels/calibrate_kernel.cuh"
#include "cuda/launch/dense_launch.h"
#include "cuda/launch/row_launch.h"

namespace disalign::cuda {

template <class T, bool Backward, class Launcher>
void launch_calibrate_kernel(Launcher& launcher, RowArgs& args, FinishArgs& last) {
  RowPlan plan = row_plan<T>(args, launcher.limits(), kCalibrateThreads);
  for_bool(plan.wide, [&](auto wide) {
    const auto kernel = row_calibrate_kernel<T, Backward, decltype(wide)::value>;
    fill_grid<T>(launcher, kernel, args, plan);
    apply(plan, args);
    constexpr int64_t bytes = sizeof(Accumulate<T>);
    last.class_blocks = plan.shape.grid_x;
    last.tiles = plan.tiles;
    if (args.class_gradients)
      args.class_sums = launcher.allocate(2 * last.class_blocks * args.classes * bytes);
    if (args.grad_confidence)
      args.confidence_sums = launcher.allocate(plan.tiles * args.outer * bytes);
    launcher.launch(kernel, plan.shape, args);
  });
  last.confidence_sums = args.confidence_sums;
  last.confidences = args.outer;
}

template <class T, bool Backward, class Launcher>
void launch_calibrate_kernel(Launcher& launcher, DenseArgs& args, FinishArgs& last) {
  using A = Accumulate<T>;
  const auto kernel = dense_calibrate_kernel<T, Backward>;
  constexpr int64_t kClassesOfThread = 48;  // at most, before a position gets another warp
  args.lane_bits = kDenseThreadBits;
  while (args.lane_bits > 5 && args.classes > kClassesOfThread * (kDenseThreads >> args.lane_bits))
    --args.lane_bits;
  args.lanes = 1 << args.lane_bits;
  args.slices = kDenseThreads >> args.lane_bits;
  args.image_tiles = static_cast<int32_t>(divide_up(args.inner, args.lanes));
  Shape shape;
  shape.threads = kDenseThreads;
  shape.shared_bytes = kDenseThreads * sizeof(A);
  const int blocks = launcher.blocks_per_multiprocessor(kernel, shape.threads, shape.shared_bytes);
  shape.grid_x = std::min(int64_t{launcher.limits().multiprocessors} * std::max(1, blocks),
                          args.outer * args.image_tiles);
  last.class_blocks = shape.grid_x << (args.lane_bits - 5);
  if (args.class_gradients)
    args.class_sums = launcher.allocate(2 * last.class_blocks * args.classes * sizeof(A));
  launcher.launch(kernel, shape, args);
}

template <bool Backward, class Launcher, class Args>
void launch_calibrate(Launcher& launcher, Dtype dtype, Args args) {
  FinishArgs last;
  if (args.positions() > 0) {
    for_dtype(dtype, [&](auto type) {
      launch_calibrate_kernel<typename decltype(type)::type, Backward>(launcher, args, last);
    });
  }
  if (!args.class_gradients && !last.confidence_sums) return;
  static_cast<LossArgs&>(last) = args;
  if (!last.confidence_sums) last.grad_confidence = nullptr;  // written by the kernel
  last.class_sums = args.class_sums;
  finish(launcher, dtype, last);
}

}  // namespace disalign::cuda
