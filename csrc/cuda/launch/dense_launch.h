// What the dense operators launch; as row_launch.h.
#pragma once

#include <algorithm>

#include "cuda/kernels/dense_kernel.cuh"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/finish_launch.h"

namespace disalign::cuda {

// At most about so many classes a thread before a position gets another warp.
constexpr int64_t kDenseClassesOfThread = 48;

// resident: whether the kernel wants a tile's logits in shared memory.
template <class A, class Launcher, class Kernel>
Shape dense_plan(Launcher& launcher, Kernel kernel, DenseArgs& args, bool resident) {
  const size_t most = launcher.limits().shared_bytes;
  args.slices = 1;
  while (args.slices < kDenseThreads / 32 && args.classes > kDenseClassesOfThread * args.slices)
    args.slices *= 2;
  args.resident = resident;
  // Fewer positions a tile, until its logits fit.
  while (args.resident && static_cast<size_t>(DenseMemory<A>::bytes(args)) > most &&
         args.slices < kDenseThreads / 32)
    args.slices *= 2;
  if (static_cast<size_t>(DenseMemory<A>::bytes(args)) > most) args.resident = false;
  args.image_tiles = divide_up(args.inner, dense_positions(args.slices));
  Shape shape;
  shape.threads = kDenseThreads;
  shape.shared_bytes = static_cast<size_t>(DenseMemory<A>::bytes(args));
  const int64_t blocks =
      int64_t{launcher.limits().multiprocessors} *
      std::max(1, launcher.blocks_per_multiprocessor(kernel, shape.threads, shape.shared_bytes));
  shape.grid_x = std::max<int64_t>(1, std::min(blocks, args.outer * args.image_tiles));
  return shape;
}

template <class T, bool Calibrated, class Launcher>
void launch_dense_forward(Launcher& launcher, DenseArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  FinishArgs last;
  const auto kernel = dense_forward_kernel<T, Calibrated>;
  if (args.positions() > 0) {
    const Shape shape = dense_plan<A>(launcher, kernel, args, args.class_gradients);
    last.blocks = shape.grid_x;
    if (args.reduction != kReduceNone)
      args.block_sums = static_cast<double*>(launcher.allocate(2 * last.blocks * sizeof(double)));
    if (args.class_gradients) {
      last.class_blocks = shape.grid_x;
      args.class_sums = launcher.allocate(2 * last.class_blocks * args.classes * sizeof(A));
    }
    launcher.launch(kernel, shape, args);
  }
  static_cast<LossArgs&>(last) = args;
  last.forward = true;
  last.block_sums = args.block_sums;
  last.class_sums = args.class_sums;
  last.confidences = args.positions();
  finish(launcher, dtype, last);
}

template <class T, bool Calibrated, class Launcher>
void launch_dense_backward(Launcher& launcher, DenseArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  FinishArgs last;
  const auto kernel = dense_backward_kernel<T, Calibrated>;
  if (args.positions() > 0) {
    const Shape shape = dense_plan<A>(launcher, kernel, args, args.class_gradients);
    if (args.class_gradients) {
      last.class_blocks = shape.grid_x;
      args.class_sums = launcher.allocate(2 * last.class_blocks * args.classes * sizeof(A));
    }
    launcher.launch(kernel, shape, args);
  }
  if (!args.class_gradients) return;
  static_cast<LossArgs&>(last) = args;
  last.grad_confidence = nullptr;  // written by the kernel
  last.class_sums = args.class_sums;
  finish(launcher, dtype, last);
}

template <class Launcher>
void launch_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    launch_dense_forward<typename decltype(type)::type, decltype(calibrated)::value>(launcher, args,
                                                                                     dtype);
  });
}

template <class Launcher>
void launch_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    launch_dense_backward<typename decltype(type)::type, decltype(calibrated)::value>(launcher,
                                                                                      args, dtype);
  });
}

}  // namespace disalign::cuda
