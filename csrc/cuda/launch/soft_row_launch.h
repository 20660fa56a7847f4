// What the row operators launch where targets are class probabilities; as row_launch.h.
#pragma once

#include "cuda/kernels/soft_row_kernel.cuh"
#include "cuda/kernels/soft_row_warp_kernel.cuh"
#include "cuda/launch/row_launch.h"

namespace disalign::cuda {

// Whether the vectors of every row of the probabilities lie like those of the logits.
template <class T>
bool probabilities_lie_alike(const RowArgs& args) {
  const int64_t size = args.probabilities_of_a ? sizeof(Accumulate<T>) : sizeof(T);
  const auto element = [](const void* p, int64_t of) { return reinterpret_cast<uintptr_t>(p) / of; };
  if (reinterpret_cast<uintptr_t>(args.probabilities) % size != 0) return false;
  const auto differs = [=](int64_t a, int64_t b) { return (a - b) * size % kVectorBytes != 0; };
  return !differs(element(args.probabilities, size), element(args.logits, sizeof(T))) &&
         (args.outer == 1 || !differs(args.probability_outer_stride, args.outer_stride));
}

// The rows by soft_row_warp_kernel: by a warp each, by several of a block, at most so many, or by those
// of a cluster of so many blocks. None for float64, calibrated logits, rows that a narrow group keeps,
// and where a row needs more warps or more shared memory than there are.
template <class T>
std::optional<RowPlan> soft_row_warp_plan(const RowArgs& args, const Limits& limits, RowPlan plan,
                                          int blocks, int most_warps) {
  using A = Accumulate<T>;
  if (sizeof(T) == 8 || args.scale || !plan.wide || !probabilities_lie_alike<T>(args))
    return std::nullopt;
  const int64_t vectors = args.classes / kVector<T>;
  plan.wide = vectors > 32 * kSoftWarpVectors<T, kByWarp>;
  plan.warp_vectors = plan.wide ? kSoftWarpVectors<T, kByBlock> : kSoftWarpVectors<T, kByWarp>;
  const int64_t class_bytes = ClassVectors<T>::count(args) * 32 * plan.warp_vectors * kVector<T> *
                              static_cast<int64_t>(sizeof(A));
  plan.shape = Shape{};
  int64_t warps = kSoftWarpThreads<kByWarp> / 32;
  if (plan.wide) {
    plan.shape.clustered = blocks > 1;
    plan.shape.grid_y = blocks;
    warps = divide_up(vectors, 32 * plan.warp_vectors * blocks);
    plan.shape.shared_bytes = (blocks > 1 ? kSoftWarpScratchBytes<A, kByCluster>
                                          : kSoftWarpScratchBytes<A, kByBlock>)+warps * class_bytes;
  } else {
    plan.shape.shared_bytes = kSoftWarpScratchBytes<A, kByWarp> + class_bytes;
  }
  if (warps > most_warps || static_cast<int64_t>(plan.shape.shared_bytes) > static_cast<int64_t>(limits.shared_bytes))
    return std::nullopt;
  plan.lanes = plan.wide ? 0 : 32;
  plan.tiles = blocks;
  plan.tile_vectors = static_cast<int>(divide_up(plan.vectors, blocks));
  plan.shape.threads = static_cast<int>(32 * warps);
  return plan;
}

template <class T>
RowKernel soft_row_warp_kernel_of(const RowPlan& plan) {
  if constexpr (sizeof(T) == 8)
    return nullptr;  // soft_row_warp_plan
  else
    return plan.shape.clustered ? soft_row_warp_kernel<T, kByCluster>
           : plan.wide          ? soft_row_warp_kernel<T, kByBlock>
                                : soft_row_warp_kernel<T, kByWarp>;
}

// By as few blocks as can, two of which a multiprocessor has: one's rows are on their way while the
// other computes. Else by blocks with a multiprocessor each.
template <class T, class Launcher>
std::optional<RowPlan> soft_row_warp_plan(Launcher& launcher, const RowArgs& args) {
  const Limits limits = launcher.limits();
  const RowPlan rows = row_plan<T>(args, limits, kWideThreads<T>);
  for (const int most_warps : {kSoftMostWarps / 2, kSoftMostWarps}) {
    for (int blocks = 1; blocks <= (limits.has_clusters ? kClusterBlocks : 1); ++blocks) {
      const auto plan = soft_row_warp_plan<T>(args, limits, rows, blocks, most_warps);
      if (plan && (blocks == 1 ||
                   launcher.clusters(soft_row_warp_kernel_of<T>(*plan), plan->shape) > 0))
        return plan;
    }
  }
  return std::nullopt;
}

template <class T, bool Calibrated>
RowKernel soft_row_kernel_of(const RowPlan& plan) {
  if (plan.warp_vectors) return soft_row_warp_kernel_of<T>(plan);
  return plan.wide ? soft_row_kernel<T, Calibrated, true> : soft_row_kernel<T, Calibrated, false>;
}

template <class T, bool Calibrated, class Launcher>
void launch_soft_row_backward(Launcher& launcher, RowArgs args, Dtype dtype) {
  FinishArgs last;
  RowPlan plan;
  if (args.outer > 0) {
    const auto by_warps = soft_row_warp_plan<T>(launcher, args);
    plan = by_warps ? *by_warps : row_plan<T>(args, launcher.limits(), kBackwardThreads);
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
  const auto by_warps = soft_row_warp_plan<T>(launcher, args);
  RowPlan plan = by_warps ? *by_warps : row_plan<T>(args, launcher.limits(), kWideThreads<T>);
  const bool tiled = plan.tiles > 1 && !plan.shape.clustered;
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
