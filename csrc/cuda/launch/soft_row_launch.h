// What the row operators launch where targets are class probabilities; as row_launch.h.
#pragma once

#include "cuda/kernels/soft_row_kernel.cuh"
#include "cuda/kernels/soft_row_sums_kernel.cuh"
#include "cuda/kernels/soft_row_warp_kernel.cuh"
#include "cuda/launch/row_launch.h"

namespace disalign::cuda {

// Whether the vectors of every row of another tensor, of elements of so many bytes, lie like those of the
// logits.
template <class T>
bool lies_like_logits(const RowArgs& args, const void* other, int64_t stride, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(other);
  const auto distance = static_cast<int64_t>(address / size) -
                        static_cast<int64_t>(reinterpret_cast<uintptr_t>(args.logits) / sizeof(T));
  const int64_t steps = args.outer > 1 ? stride - args.outer_stride : 0;
  return address % size == 0 && distance * size % kVectorBytes == 0 &&
         steps * size % kVectorBytes == 0;
}
template <class T>
bool all_lie_like_logits(const RowArgs& args) {
  const int64_t size = args.probabilities_of_a ? sizeof(Accumulate<T>) : sizeof(T);
  return lies_like_logits<T>(args, args.probabilities, args.probability_outer_stride, size) &&
         (!args.grad_logits ||
          lies_like_logits<T>(args, args.grad_logits, args.grad_outer_stride, sizeof(T)));
}

template <class T, bool Calibrated>
RowKernel soft_row_warp_kernel_of(const RowPlan& plan) {
  if constexpr (sizeof(T) == 8)
    return nullptr;  // soft_row_warp_plan
  else if constexpr (Calibrated)
    return plan.tiles > 1 && plan.shape.clustered ? soft_row_sums_kernel<T, kByCluster>
           : plan.wide                            ? soft_row_sums_kernel<T, kByBlock>
                                                  : soft_row_sums_kernel<T, kByWarp>;
  else
    return plan.shape.clustered ? soft_row_warp_kernel<T, kByCluster>
           : plan.wide          ? soft_row_warp_kernel<T, kByBlock>
                                : soft_row_warp_kernel<T, kByWarp>;
}

// Of the kernels' rows: vectors of a lane; warps of a block, at most.
template <class T, bool Calibrated, int By>
constexpr int kSoftVectors = Calibrated ? kSoftSumsVectors<T, By> : kSoftWarpVectors<T, By>;
template <bool Calibrated, int By>
constexpr int kSoftWarps = (Calibrated ? kSoftSumsThreads : kSoftWarpThreads<By>) / 32;

// Of so many warps.
template <class T, bool Calibrated, int By>
int64_t soft_shared_bytes(const RowArgs& args, int64_t warps) {
  using A = Accumulate<T>;
  const int64_t class_bytes = (By == kByWarp ? 1 : warps) * soft_class_vectors(args) * 32 *
                              kSoftVectors<T, Calibrated, By> * kVector<T> *
                              static_cast<int64_t>(sizeof(A));
  if constexpr (Calibrated)
    return kSoftSumsScratchBytes<A, By> + warps * kSoftTurnBytes +
           std::max(class_bytes + warps * OwnProbabilities<T, By>::kBytes,
                    args.class_gradients ? warps * kSoftClassSumsBytes<T, By> : 0);
  else
    return kSoftWarpScratchBytes<A, By> + class_bytes;
}

// Rows by soft_row_warp_kernel or soft_row_sums_kernel: a warp each, or so many blocks a row.
template <class T, bool Calibrated, int By>
RowPlan soft_warps_of_rows(const RowArgs& args, const Limits& limits, RowPlan plan,
                           int64_t blocks) {
  constexpr int K = kSoftVectors<T, Calibrated, By>;
  int64_t warps = divide_up(args.classes / kVector<T>, 32 * K * blocks);
  if (By == kByWarp) {  // rows of their own: as many as have memory
    warps = kSoftWarps<Calibrated, By>;
    while (warps > 1 && soft_shared_bytes<T, Calibrated, By>(args, warps) >
                            static_cast<int64_t>(limits.shared_bytes))
      --warps;
  }
  plan.warp_vectors = K;
  plan.wide = By != kByWarp;
  plan.lanes = plan.wide ? 0 : 32;
  plan.tiles = static_cast<int>(blocks);
  plan.tile_vectors = static_cast<int>(divide_up(plan.vectors, blocks));
  plan.shape = Shape{};
  plan.shape.clustered = By == kByCluster;
  plan.shape.grid_y = blocks;
  plan.shape.threads = static_cast<int>(32 * warps);
  plan.shape.shared_bytes = soft_shared_bytes<T, Calibrated, By>(args, warps);
  return plan;
}

// By a warp; by as few blocks as can, two of which a multiprocessor has, so that one's rows are on their
// way while the other computes; by blocks with a multiprocessor each, which have fewer class sums; by
// tiles, as many as fill the device. None for float64 and for rows that a narrow group keeps.
template <class T, bool Calibrated, class Launcher>
std::optional<RowPlan> soft_row_warp_plan(Launcher& launcher, const RowArgs& args) {
  const Limits limits = launcher.limits();
  const RowPlan rows = row_plan<T>(args, limits, kWideThreads<T>);
  if (sizeof(T) == 8 || !rows.wide) return std::nullopt;
  const auto fits = [&](const RowPlan& plan, int64_t most_warps) {
    return plan.shape.threads <= 32 * most_warps && plan.shape.shared_bytes <= limits.shared_bytes;
  };
  constexpr int K = kSoftVectors<T, Calibrated, kByBlock>;
  constexpr int64_t kMost = kSoftWarps<Calibrated, kByBlock>;
  const int64_t vectors = args.classes / kVector<T>;
  const bool alike = all_lie_like_logits<T>(args);
  if (alike && vectors <= 32 * kSoftVectors<T, Calibrated, kByWarp>)
    return soft_warps_of_rows<T, Calibrated, kByWarp>(args, limits, rows, 1);
  // Whether the class sums of rows of clusters, as many as there are multiprocessors, are more than a
  // tenth of the logits.
  const int64_t partials =
      args.class_gradients ? 2 * limits.multiprocessors * int64_t{sizeof(Accumulate<T>)} : 0;
  const bool few = 10 * partials > args.outer * static_cast<int64_t>(sizeof(T));
  for (const int64_t most_warps : {few ? kMost : kMost / 2, kMost}) {
    RowPlan plan = soft_warps_of_rows<T, Calibrated, kByBlock>(args, limits, rows, 1);
    if (fits(plan, most_warps)) return plan;
    for (int blocks = 2; alike && limits.has_clusters && blocks <= kClusterBlocks; ++blocks) {
      plan = soft_warps_of_rows<T, Calibrated, kByCluster>(args, limits, rows, blocks);
      if (fits(plan, most_warps) &&
          launcher.clusters(soft_row_warp_kernel_of<T, Calibrated>(plan), plan.shape) > 0)
        return plan;
    }
  }
  int64_t tiles = std::min(divide_up(2 * limits.multiprocessors, std::max<int64_t>(args.outer, 1)),
                           divide_up(vectors, 32 * K));
  tiles = std::max(tiles, divide_up(vectors, 32 * K * kMost / 2));
  for (;; tiles *= 2) {
    const int64_t warps = divide_up(vectors, 32 * K * tiles);
    const RowPlan plan = soft_warps_of_rows<T, Calibrated, kByBlock>(
        args, limits, rows, divide_up(vectors, 32 * K * warps));
    if (fits(plan, kMost) || warps == 1) return plan;
  }
}

template <class T, bool Calibrated>
RowKernel soft_row_kernel_of(const RowPlan& plan) {
  if (plan.warp_vectors) return soft_row_warp_kernel_of<T, Calibrated>(plan);
  if constexpr (sizeof(T) == 8) {
    if (plan.wide) return soft_row_kernel<T, Calibrated, true>;
  }
  return soft_row_kernel<T, Calibrated, false>;
}

template <class T, bool Calibrated, class Launcher>
void launch_soft_row_backward(Launcher& launcher, RowArgs args, Dtype dtype) {
  FinishArgs last;
  bool tiled = false;
  if (args.outer > 0) {
    const auto by_warps = soft_row_warp_plan<T, Calibrated>(launcher, args);
    RowPlan plan = by_warps ? *by_warps : row_plan<T>(args, launcher.limits(), kBackwardThreads);
    const RowKernel kernel = soft_row_kernel_of<T, Calibrated>(plan);
    fill_grid<T>(launcher, kernel, args, plan);
    team_up<T>(launcher, kernel, args, plan);
    apply(plan, args);
    args.backward = true;
    tiled = plan.tiles > 1 && !plan.shape.clustered;
    last.class_blocks = plan.shape.grid_x;
    if (args.class_gradients)
      args.class_sums = new_class_sums<T>(launcher, args, plan.shape.grid_x);
    if (args.grad_confidence)
      args.confidence_sums =
          tiled ? launcher.allocate(plan.tiles * args.outer * sizeof(Accumulate<T>))
                : args.grad_confidence;
    launcher.launch(kernel, plan.shape, args);
  }
  if (!tiled) args.grad_confidence = nullptr;  // is done
  finish_row_backward(launcher, dtype, args, last);
}

template <class T, bool Calibrated, class Launcher>
void launch_soft_row_forward(Launcher& launcher, RowArgs args, Dtype dtype) {
  using A = Accumulate<T>;
  FinishArgs last;
  const auto by_warps = soft_row_warp_plan<T, Calibrated>(launcher, args);
  RowPlan plan = by_warps ? *by_warps : row_plan<T>(args, launcher.limits(), kWideThreads<T>);
  const bool tiled = plan.tiles > 1 && !plan.shape.clustered;
  if (tiled && (args.grad_logits || args.class_gradients || args.grad_confidence)) {
    launch_soft_row_forward<T, Calibrated>(launcher, without_gradients(args), dtype);
    return launch_soft_row_backward<T, Calibrated>(launcher, args, dtype);
  }
  if (args.outer > 0) {
    begin_forward<A>(launcher, args);
    const RowKernel kernel = soft_row_kernel_of<T, Calibrated>(plan);
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
