// What the row operators launch: which kernels, their order, the workspace. Host code without torch,
// over any launcher (launch.h).
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/launch/dispatch.h"
#include "cuda/launch/finish_launch.h"
#include "cuda/launch/row_plan.h"

namespace disalign::cuda {

template <class T, int K, bool Calibrated, bool Sums>
RowKernel row_warp_kernel_of(const RowPlan& plan) {
  return plan.tiles > 1 ? row_warp_kernel<T, K, Calibrated, Sums, kByCluster>
         : plan.wide    ? row_warp_kernel<T, K, Calibrated, Sums, kByBlock>
                        : row_warp_kernel<T, K, Calibrated, Sums, kByWarp>;
}

template <class T, bool Calibrated>
RowKernel row_warp_kernel_of(const RowArgs& args, const RowPlan& plan) {
  constexpr int kAll = kWarpVectors, kHalf = kWarpVectors / 2;
  if constexpr (sizeof(T) == 8) {
    return nullptr;  // row_warp_plan
  } else {
    if constexpr (Calibrated) {
      if (args.class_gradients)
        return row_warp_kernel_of<T, sizeof(T) == 2 ? kHalf : kAll, true, true>(plan);
    }
    if (plan.warp_vectors == kAll) return row_warp_kernel_of<T, kAll, Calibrated, false>(plan);
    return row_warp_kernel<T, kHalf, Calibrated, false, kByWarp>;
  }
}

template <class T, bool Calibrated>
RowKernel row_forward_kernel_of(const RowArgs& args, const RowPlan& plan) {
  if (plan.warp_vectors) return row_warp_kernel_of<T, Calibrated>(args, plan);
  return plan.wide ? row_forward_kernel<T, Calibrated, true>
                   : row_forward_kernel<T, Calibrated, false>;
}

template <class T, bool Calibrated>
RowKernel row_backward_kernel_of(const RowArgs& args, const RowPlan& plan) {
  if constexpr (Calibrated) {
    if (args.class_gradients)
      return plan.wide ? row_backward_kernel<T, true, true, true>
                       : row_backward_kernel<T, true, false, true>;
  }
  return plan.wide ? row_backward_kernel<T, Calibrated, true, false>
                   : row_backward_kernel<T, Calibrated, false, false>;
}

// For the class sums of so many blocks.
template <class T, class Launcher>
void* new_class_sums(Launcher& launcher, const RowArgs& args, int64_t blocks) {
  return launcher.allocate(2 * blocks * args.classes * sizeof(Accumulate<T>));
}

// A row's gradients by row_backward_kernel. Returns the blocks whose class sums are in
// args.class_sums.
template <class T, bool Calibrated, class Launcher>
int64_t launch_row_gradients(Launcher& launcher, RowArgs& args) {
  RowPlan plan = row_plan<T>(args, launcher.limits(), kBackwardThreads);
  const RowKernel kernel = row_backward_kernel_of<T, Calibrated>(args, plan);
  fill_grid<T>(launcher, kernel, args, plan);
  apply(plan, args);
  if (args.class_gradients) args.class_sums = new_class_sums<T>(launcher, args, plan.shape.grid_x);
  if (args.grad_confidence)
    args.confidence_sums = launcher.allocate(plan.tiles * args.outer * sizeof(Accumulate<T>));
  launcher.launch(kernel, plan.shape, args);
  return plan.shape.grid_x;
}

// The rows by warps, if a warp, a block or a cluster can keep one: by as few blocks as can.
template <class T, bool Calibrated, class Launcher>
std::optional<RowPlan> row_warp_plan(Launcher& launcher, const RowArgs& args) {
  const Limits limits = launcher.limits();
  const RowPlan rows = row_plan<T>(args, limits, kWideThreads<T>);
  for (int blocks = 1; blocks <= (limits.has_clusters ? kClusterBlocks : 1); ++blocks) {
    const auto plan = row_warp_plan<T, Calibrated>(args, limits, rows, blocks);
    if (plan && (blocks == 1 || launcher.clusters(row_warp_kernel_of<T, Calibrated>(args, *plan),
                                                  plan->shape) > 0))
      return plan;
  }
  return std::nullopt;
}

// The loss alone, of rows that leave the chip before their sums are known: backward makes the
// gradients.
static inline RowArgs without_gradients(RowArgs args) {
  args.grad_logits = args.grad_scale = args.grad_bias = args.grad_confidence = nullptr;
  args.class_gradients = false;
  return args;
}

// Of the kernel that adds up the tiles of each row, a warp a row; allocates the tiles' sums.
template <class A, class Launcher>
Shape combine_shape(Launcher& launcher, RowArgs& args) {
  args.tile_sums =
      launcher.allocate(PositionSums<A>::kValues * args.tiles * args.outer * sizeof(A));
  if (args.details)
    args.tile_details =
        launcher.allocate(RowDetails<A>::kValues * args.tiles * args.outer * sizeof(A));
  Shape shape;
  shape.threads = kNarrowThreads;
  shape.grid_x = std::min(divide_up(args.outer, kNarrowThreads / 32), int64_t{1} << 10);
  shape.shared_bytes = BlockSums::entries(kNarrowThreads) * sizeof(double);
  return shape;
}

// last: has the blocks. A shard has nothing to divide, and with a ticket the last block has done it.
template <class Launcher>
void finish_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args, FinishArgs last) {
  if (args.shard_sums || args.ticket) return;
  static_cast<DivisorArgs&>(last) = args;
  last.forward = true;
  last.block_sums = args.block_sums;
  last.class_sums = args.class_sums;
  last.confidences = args.outer;
  finish(launcher, dtype, last);
}

template <class Launcher>
void finish_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args, FinishArgs last) {
  if (!args.class_gradients && !args.grad_confidence) return;
  static_cast<LossArgs&>(last) = args;
  last.class_sums = args.class_sums;
  last.confidence_sums = args.confidence_sums;
  last.confidences = args.outer;
  last.tiles = args.tiles;
  finish(launcher, dtype, last);
}

template <class T, bool Calibrated, class Launcher>
void launch_row_backward(Launcher& launcher, RowArgs args, Dtype dtype);

template <class T, bool Calibrated, class Launcher>
void launch_row_forward(Launcher& launcher, RowArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  const bool reduce = args.reduction != kReduceNone;
  FinishArgs last;
  const auto by_warps = row_warp_plan<T, Calibrated>(launcher, args);
  RowPlan plan = by_warps ? *by_warps : row_plan<T>(args, launcher.limits(), kWideThreads<T>);
  const bool tiled = plan.tiles > 1 && !plan.shape.clustered;
  if (tiled && args.grad_logits) {
    launch_row_forward<T, Calibrated>(launcher, without_gradients(args), dtype);
    return launch_row_backward<T, Calibrated>(launcher, args, dtype);
  }
  if (args.outer > 0) {
    begin_forward<A>(launcher, args);
    const RowKernel kernel = row_forward_kernel_of<T, Calibrated>(args, plan);
    fill_grid<T>(launcher, kernel, args, plan);
    team_up<T>(launcher, kernel, args, plan);
    apply(plan, args);
    last.blocks = plan.shape.grid_x * plan.team;
    Shape combine;
    if (tiled) {
      combine = combine_shape<A>(launcher, args);
      last.blocks = combine.grid_x;
    } else if (args.class_gradients) {
      last.class_blocks = plan.shape.grid_x;
      args.class_sums = new_class_sums<T>(launcher, args, last.class_blocks);
    }
    if (reduce)
      args.block_sums = static_cast<double*>(launcher.allocate(2 * last.blocks * sizeof(double)));
    launcher.launch(kernel, plan.shape, args);
    if (tiled) launcher.launch(row_combine_kernel<A>, combine, args);
    if (tiled && args.class_gradients) {
      // Their sums, not yet divided: the loss's gradient for an upstream gradient of 1.
      RowArgs sums = args;
      sums.denominator = nullptr;
      sums.grad_confidence = nullptr;
      last.class_blocks = launch_row_gradients<T, Calibrated>(launcher, sums);
      args.class_sums = sums.class_sums;
    }
  }
  finish_row_forward(launcher, dtype, args, last);
}

template <class T, bool Calibrated, class Launcher>
void launch_row_backward(Launcher& launcher, RowArgs args, Dtype dtype) {
  FinishArgs last;
  if (args.outer > 0) {
    if (auto plan = row_warp_plan<T, Calibrated>(launcher, args)) {
      args.backward = true;
      const RowKernel kernel = row_warp_kernel_of<T, Calibrated>(args, *plan);
      fill_grid<T>(launcher, kernel, args, *plan);
      team_up<T>(launcher, kernel, args, *plan);
      apply(*plan, args);
      last.class_blocks = plan->shape.grid_x;
      if (args.class_gradients)
        args.class_sums = new_class_sums<T>(launcher, args, last.class_blocks);
      launcher.launch(kernel, plan->shape, args);
      args.grad_confidence = nullptr;  // is done
    } else {
      if (args.grad_logits == args.logits && !args.shard_factors &&
          (args.focal_gamma > 0 || args.grad_confidence)) {
        args.target_logits = launcher.allocate(args.outer * sizeof(Accumulate<T>));
        Shape shape;
        shape.threads = kNarrowThreads;
        shape.grid_x = std::min(divide_up(args.outer, kNarrowThreads), int64_t{1} << 10);
        launcher.launch(row_target_kernel<T>, shape, args);
      }
      last.class_blocks = launch_row_gradients<T, Calibrated>(launcher, args);
    }
  }
  finish_row_backward(launcher, dtype, args, last);
}

template <class Launcher>
void launch_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    launch_row_forward<typename decltype(type)::type, decltype(calibrated)::value>(launcher, args,
                                                                                   dtype);
  });
}

template <class Launcher>
void launch_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    launch_row_backward<typename decltype(type)::type, decltype(calibrated)::value>(launcher, args,
                                                                                    dtype);
  });
}

}  // namespace disalign::cuda
