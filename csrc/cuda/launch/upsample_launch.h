// What the upsampling operators launch; as row_launch.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/kernels/upsample_backward_kernel.cuh"
#include "cuda/kernels/upsample_kernel.cuh"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/finish_launch.h"

namespace disalign::cuda {

constexpr int64_t kMostBlocks = 1 << 12;  // of kernels with a thread a position

template <class A, class Launcher>
void launch_axes(Launcher& launcher, UpsampleArgs& args) {
  for (Axis* axis : {&args.y, &args.x}) {
    axis->source = static_cast<int32_t*>(launcher.allocate(axis->out * sizeof(int32_t)));
    axis->weight = launcher.allocate(axis->out * sizeof(A));
    axis->first = static_cast<int32_t*>(launcher.allocate((axis->in + 1) * sizeof(int32_t)));
  }
  Shape shape;
  shape.threads = kAxisThreads;
  const int64_t most = std::max({args.y.out, args.x.out, args.y.in + 1, args.x.in + 1});
  shape.grid_x = std::min(divide_up(most, kAxisThreads), kMostBlocks);
  launcher.launch(upsample_axis_kernel<A>, shape, args);
}

// Low-resolution positions that `tile` outputs of an axis lie between, at most.
static inline int64_t low_extent(const Axis& axis, int64_t tile) {
  const double scale = std::max(static_cast<double>(axis.in) / axis.out,
                                axis.out > 1 ? (axis.in - 1.0) / (axis.out - 1.0) : 0.0);
  return std::min<int64_t>(axis.in, static_cast<int64_t>((tile - 1) * scale) + 3);
}

template <class T, class Launcher>
Shape upsample_plan(Launcher& launcher, UpsampleArgs& args) {
  using A = Accumulate<T>;
  const int64_t before = BlockSums::entries(kUpsampleThreads) * sizeof(double);
  const auto bytes = [&] {
    return before + args.classes * low_extent(args.y, args.tile_height) *
                        low_extent(args.x, args.tile_width) * static_cast<int64_t>(sizeof(A));
  };
  // The largest tile whose surroundings leave room for a second block; else the largest that fits.
  const int64_t most = static_cast<int64_t>(launcher.limits().shared_bytes);
  constexpr int kTiles[][2] = {{32, 64}, {16, 64}, {16, 32}, {8, 32}, {8, 16}, {4, 16}};
  const auto choose = [&](int count, int64_t limit) {
    for (int i = 0; i < count; ++i) {
      args.tile_height = kTiles[i][0], args.tile_width = kTiles[i][1];
      if (bytes() <= limit) return true;
    }
    return false;
  };
  choose(4, most / 2) || choose(6, most);
  args.staged = bytes() <= most;
  if (!args.staged) args.tile_height = 8, args.tile_width = 32;
  Shape shape;
  shape.threads = kUpsampleThreads;
  shape.shared_bytes = static_cast<size_t>(args.staged ? bytes() : before);
  const int64_t resident =
      int64_t{launcher.limits().multiprocessors} *
      std::max(1, launcher.blocks_per_multiprocessor(upsample_forward_kernel<T>, shape.threads,
                                                     shape.shared_bytes));
  const int64_t tiles =
      args.outer * divide_up(args.y.out, args.tile_height) * divide_up(args.x.out, args.tile_width);
  shape.grid_x = std::min(resident, tiles);
  return shape;
}

template <class T, class Launcher>
void launch_upsample_forward(Launcher& launcher, UpsampleArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  FinishArgs last;
  if (args.positions() > 0) {
    launch_axes<A>(launcher, args);
    const Shape shape = upsample_plan<T>(launcher, args);
    last.blocks = shape.grid_x;
    if (args.reduction != kReduceNone && args.target)
      args.block_sums = static_cast<double*>(launcher.allocate(2 * last.blocks * sizeof(double)));
    launcher.launch(upsample_forward_kernel<T>, shape, args);
  }
  if (!args.denominator) return;  // a prediction
  static_cast<LossArgs&>(last) = args;
  last.forward = true;
  last.block_sums = args.block_sums;
  finish(launcher, dtype, last);
}

template <class T, class Launcher>
void launch_upsample_backward(Launcher& launcher, UpsampleArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  FinishArgs last;
  const bool overwrite = args.grad_logits == args.logits;
  if (overwrite)
    args.grad_logits =
        launcher.allocate(args.low_positions() * args.classes * static_cast<int64_t>(sizeof(T)));
  args.grad_x_stride = 1;
  args.grad_y_stride = args.x.in;
  args.grad_class_stride = int64_t{args.y.in} * args.x.in;
  args.grad_outer_stride = args.classes * args.grad_class_stride;
  if (args.low_positions() > 0) {
    launch_axes<A>(launcher, args);
    Shape each;
    each.threads = kUpsampleBackwardThreads;
    each.grid_x =
        std::clamp<int64_t>(divide_up(args.positions(), kUpsampleBackwardThreads), 1, kMostBlocks);
    each.shared_bytes = 32 * sizeof(A);
    args.factors = launcher.allocate(4 * args.positions() * sizeof(A));
    args.targets = static_cast<int32_t*>(launcher.allocate(args.positions() * sizeof(int32_t)));
    UpsampleArgs factors = args;
    factors.grad_confidence = nullptr;  // sums over nodes, not over output positions
    launcher.launch(upsample_factors_kernel<T>, each, factors);

    Shape shape;
    shape.threads = kUpsampleBackwardThreads;
    shape.shared_bytes = UpsampleMemory<A>::kBytes;
    shape.grid_y = divide_up(args.classes, kLanes);
    const int64_t squares =
        args.outer * divide_up(args.y.in, kNodes<A>) * divide_up(args.x.in, kNodes<A>);
    const int64_t resident =
        int64_t{launcher.limits().multiprocessors} *
        std::max(1, launcher.blocks_per_multiprocessor(upsample_backward_kernel<T>, shape.threads,
                                                       shape.shared_bytes));
    shape.grid_x = std::min(squares, std::max<int64_t>(1, resident / shape.grid_y));
    if (args.class_gradients) {
      last.class_blocks = shape.grid_x;
      args.class_sums = launcher.allocate(2 * last.class_blocks * args.classes * sizeof(A));
    }
    if (args.grad_confidence) {
      last.tiles = shape.grid_y;
      args.confidence_sums = launcher.allocate(last.tiles * args.low_positions() * sizeof(A));
    }
    launcher.launch(upsample_backward_kernel<T>, shape, args);
    if (overwrite) {
      each.shared_bytes = 0;
      each.grid_x = std::min(
          divide_up(args.low_positions() * args.classes, kUpsampleBackwardThreads), kMostBlocks);
      launcher.launch(upsample_overwrite_kernel<T>, each, args);
    }
  }
  if (!args.class_gradients && !args.grad_confidence) return;
  static_cast<LossArgs&>(last) = args;
  last.class_sums = args.class_sums;
  last.confidence_sums = args.confidence_sums;
  last.confidences = args.low_positions();
  finish(launcher, dtype, last);
}

template <class Launcher>
void launch_upsample_forward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  for_dtype(dtype, [&](auto type) {
    launch_upsample_forward<typename decltype(type)::type>(launcher, args, dtype);
  });
}

template <class Launcher>
void launch_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  for_dtype(dtype, [&](auto type) {
    launch_upsample_backward<typename decltype(type)::type>(launcher, args, dtype);
  });
}

}  // namespace disalign::cuda
