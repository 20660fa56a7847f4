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
  return std::min<int64_t>(axis.in + 1, static_cast<int64_t>((tile - 1) * scale) + 3);
}

// Outputs of most bands: those at the edges may have more.
static inline int64_t band_rows(const UpsampleArgs& args) {
  const Axis& y = args.y;
  if (args.align_corners && y.in > 1 && y.out > 1) return divide_up(y.out - 1, y.in - 1);
  return divide_up(y.out, y.in);
}

// Calls body(Constant<Rows>{}) with the rows of a thread.
template <class A, class Body>
void for_rows(const UpsampleArgs& args, Body body) {
  const int64_t rows = band_rows(args);
  if constexpr (sizeof(A) == 8)  // a double takes two registers
    body(std::integral_constant<int, 4>{});
  else if (rows <= 2)
    body(std::integral_constant<int, 2>{});
  else if (rows <= 4)
    body(std::integral_constant<int, 4>{});
  else
    body(std::integral_constant<int, 8>{});
}

// Sets the tiles. Beside the logits a block needs `fixed` bytes, and `instead` in their place.
template <class T, class Launcher, class Kernel>
Shape upsample_plan(Launcher& launcher, Kernel kernel, int rows, int64_t fixed, int64_t instead,
                    UpsampleArgs& args) {
  const int64_t vectors = divide_up(args.classes, kVector<Accumulate<T>>);
  args.warps_of_band = 1;
  while (args.warps_of_band < kUpsampleWarps && args.warps_of_band * rows < band_rows(args))
    args.warps_of_band *= 2;
  args.bands = kUpsampleWarps / args.warps_of_band;
  const int64_t most = static_cast<int64_t>(launcher.limits().shared_bytes) - fixed;
  const auto bytes = [&](int64_t count) {
    return count * (args.bands + 1) * low_extent(args.x, args.tile_width) * kVectorBytes;
  };
  args.tile_width = 32;
  while (bytes(1) > most && args.tile_width > 1) args.tile_width /= 2;
  args.staged_vectors = static_cast<int32_t>(std::min(vectors, most / bytes(1)));
  args.tile_nodes = static_cast<int32_t>(low_extent(args.x, args.tile_width));
  args.tiles_down = divide_up(args.y.in, args.bands);
  args.tiles_across = divide_up(args.x.out, args.tile_width);
  Shape shape;
  shape.threads = kUpsampleThreads;
  shape.shared_bytes = static_cast<size_t>(fixed + std::max(instead, bytes(args.staged_vectors)));
  const int64_t resident =
      int64_t{launcher.limits().multiprocessors} *
      std::max(1, launcher.blocks_per_multiprocessor(kernel, shape.threads, shape.shared_bytes));
  shape.grid_x = std::min(resident, args.tiles());
  return shape;
}

// launch_kernel(args): the kernel of the output; returns its blocks.
template <class T, class Launcher, class LaunchKernel>
void run_upsample_forward(Launcher& launcher, UpsampleArgs args, Dtype dtype,
                          LaunchKernel launch_kernel) {
  FinishArgs last;
  if (args.positions() > 0) {
    launch_axes<Accumulate<T>>(launcher, args);
    last.blocks = launch_kernel(args);
  }
  if (!args.denominator) return;  // a prediction
  static_cast<LossArgs&>(last) = args;
  last.forward = true;
  last.block_sums = args.block_sums;
  finish(launcher, dtype, last);
}

// kernel: of threads of so many rows, which has no more of the logits' memory than `instead` bytes.
template <class T, int Rows, class Launcher>
int64_t launch_upsample_outputs(Launcher& launcher, void (*kernel)(UpsampleArgs), int64_t instead,
                                UpsampleArgs& args) {
  const Shape shape = upsample_plan<T>(launcher, kernel, Rows, kBlockSumsBytes, instead, args);
  if (args.reduction != kReduceNone && args.denominator)
    args.block_sums = static_cast<double*>(launcher.allocate(2 * shape.grid_x * sizeof(double)));
  launcher.launch(kernel, shape, args);
  return shape.grid_x;
}

// kernel: of threads of so many rows.
template <class T, int Rows, class Launcher>
void launch_upsample_tiles(Launcher& launcher, void (*kernel)(UpsampleArgs), UpsampleArgs& args) {
  using A = Accumulate<T>;
  const Shape shape =
      upsample_plan<T>(launcher, kernel, Rows, UpsampleExchange<A, Rows>::kBytes, 0, args);
  const int64_t vectors = divide_up(args.classes, kVector<A>);
  args.node_sums =
      launcher.allocate(args.tiles() * vectors * (args.bands + 1) * args.tile_nodes * kVectorBytes);
  UpsampleArgs tiles = args;
  tiles.grad_confidence = nullptr;  // sums over nodes, not over output positions
  launcher.launch(kernel, shape, tiles);
}

// launch_tiles(args): the kernel of the output.
template <class T, class Launcher, class LaunchTiles>
void run_upsample_backward(Launcher& launcher, UpsampleArgs args, Dtype dtype,
                           LaunchTiles launch_tiles) {
  using A = Accumulate<T>;
  FinishArgs last;
  if (args.grad_logits != args.logits) {
    args.grad_x_stride = 1;
    args.grad_y_stride = args.x.in;
    args.grad_class_stride = int64_t{args.y.in} * args.x.in;
    args.grad_outer_stride = args.classes * args.grad_class_stride;
  } else {
    args.grad_x_stride = args.x_stride, args.grad_y_stride = args.y_stride;
    args.grad_class_stride = args.class_stride, args.grad_outer_stride = args.outer_stride;
  }
  if (args.low_positions() > 0) {
    launch_axes<A>(launcher, args);
    launch_tiles(args);
    Shape shape;
    shape.threads = kUpsampleThreads;
    shape.shared_bytes = 2 * kUpsampleWarps * sizeof(A);
    shape.grid_y = divide_up(args.classes, kNodeClasses);
    const int64_t resident =
        int64_t{launcher.limits().multiprocessors} *
        std::max(1, launcher.blocks_per_multiprocessor(upsample_nodes_kernel<T>, shape.threads,
                                                       shape.shared_bytes));
    shape.grid_x = std::min(divide_up(args.low_positions(), kUpsampleThreads),
                            std::max<int64_t>(1, resident / shape.grid_y));
    if (args.class_gradients) {
      last.class_blocks = shape.grid_x;
      args.class_sums = launcher.allocate(2 * last.class_blocks * args.classes * sizeof(A));
    }
    if (args.grad_confidence) {
      last.tiles = shape.grid_y;
      args.confidence_sums = launcher.allocate(last.tiles * args.low_positions() * sizeof(A));
    }
    launcher.launch(upsample_nodes_kernel<T>, shape, args);
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
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    run_upsample_forward<T>(launcher, args, dtype, [&](UpsampleArgs& placed) {
      int64_t blocks = 0;
      for_rows<A>(placed, [&](auto of_thread) {
        constexpr int kRows = decltype(of_thread)::value;
        blocks = launch_upsample_outputs<T, kRows>(launcher, upsample_forward_kernel<T, kRows>,
                                                   UpsampleSums<A, kRows>::kBytes, placed);
      });
      return blocks;
    });
  });
}

template <class Launcher>
void launch_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_upsample_backward<T>(launcher, args, dtype, [&](UpsampleArgs& placed) {
      for_rows<Accumulate<T>>(placed, [&](auto of_thread) {
        constexpr int kRows = decltype(of_thread)::value;
        launch_upsample_tiles<T, kRows>(launcher, upsample_backward_kernel<T, kRows>, placed);
      });
    });
  });
}

}  // namespace disalign::cuda
