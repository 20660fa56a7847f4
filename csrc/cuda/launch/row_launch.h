// What the row operators launch: the division of rows and classes over blocks, the workspace, the
// order of the kernels. Host code without torch, over any launcher (launch.h).
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/kernels/row_backward_kernel.cuh"
#include "cuda/kernels/row_kernel.cuh"
#include "cuda/kernels/row_warp_kernel.cuh"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/finish_launch.h"

namespace disalign::cuda {

// After how many rows of this stride, in bytes, addresses are alike modulo 16: a power of two. No
// more than are needed for so many rows.
static inline int row_period(int64_t stride_bytes, int64_t rows) {
  int period = 1;
  while (period * stride_bytes % kVectorBytes != 0 && period < rows) period *= 2;
  return period;
}

struct RowPlan {
  Shape shape;
  bool wide = false;
  int warp_vectors = 0;  // of a lane, where a warp keeps a row (row_warp_kernel.cuh); else 0
  int lanes = 0, period = 1, tiles = 1, tile_vectors = 0;
  int64_t vectors = 0;  // of a row
};

// Of the class vectors of a group of so many threads.
template <class T>
int64_t row_class_bytes(const RowArgs& args, int64_t threads) {
  return ClassVectors<T>::count(args) * threads * kElements<T> *
         static_cast<int64_t>(sizeof(Accumulate<T>));
}

// Threads that keep a row or a tile of so many vectors, one row a block.
template <class T>
int row_threads(int64_t vectors) {
  return static_cast<int>(divide_up(vectors, 32 * kKept<T>) * 32);
}

template <class T>
int64_t row_shared_bytes(const RowArgs& args, int64_t vectors) {
  return kRowScratchBytes<Accumulate<T>, true> + row_class_bytes<T>(args, row_threads<T>(vectors));
}

// One row a block, or about so many tiles of it.
template <class T>
void set_tiles(RowPlan& plan, const RowArgs& args, int64_t tiles) {
  plan.tile_vectors = static_cast<int>(divide_up(plan.vectors, tiles));
  plan.tiles = static_cast<int>(divide_up(plan.vectors, plan.tile_vectors));
  plan.shape.threads = row_threads<T>(plan.tile_vectors);
  plan.shape.grid_y = plan.tiles;
  plan.shape.shared_bytes = row_shared_bytes<T>(args, plan.tile_vectors);
}

// most_threads: of a wide block that has a whole row; where a row needs more, or more shared memory
// than there is, it is cut into tiles of kBackwardThreads threads.
template <class T>
RowPlan row_plan(const RowArgs& args, const Limits& limits, int most_threads) {
  using A = Accumulate<T>;
  constexpr int K = kKept<T>;
  RowPlan plan;
  plan.period = row_period(args.outer_stride * static_cast<int64_t>(sizeof(T)), args.outer);
  // Where rows are not all aligned alike, one of them may begin just before an aligned address.
  const auto address = reinterpret_cast<uintptr_t>(args.logits);
  const int64_t phase = plan.period == 1 ? address % kVectorBytes / sizeof(T) : kVector<T> - 1;
  const int64_t vectors = divide_up(phase + args.classes, kVector<T>);
  plan.vectors = vectors;
  plan.wide = vectors > 32 * K;
  if (!plan.wide) {
    plan.lanes = 1;
    while (plan.lanes * K < vectors) plan.lanes *= 2;
    plan.tile_vectors = static_cast<int>(vectors);
    plan.shape.threads = kNarrowThreads;
    plan.shape.shared_bytes =
        kRowScratchBytes<A, false> +
        std::max<int64_t>(row_class_bytes<T>(args, plan.lanes),
                          args.class_gradients ? 2 * vectors * kVector<T> * sizeof(A) : 0);
    return plan;
  }
  int64_t most = most_threads * K;
  const auto too_large = [&] { return plan.shape.shared_bytes > limits.shared_bytes; };
  set_tiles<T>(plan, args, 1);
  if (vectors > most || too_large()) most = kBackwardThreads * K;
  do {
    set_tiles<T>(plan, args, divide_up(vectors, most));
    most /= 2;
  } while (too_large() && most >= 32);
  return plan;
}

// The same rows by row_warp_kernel: by a warp each, by several of a block, or by those of a cluster of
// so many blocks. None for float64, for shards, for rows that a narrow group keeps, and where a row
// needs more warps or more shared memory than there are.
template <class T, bool Calibrated>
std::optional<RowPlan> row_warp_plan(const RowArgs& args, const Limits& limits, RowPlan plan,
                                     int blocks) {
  using A = Accumulate<T>;
  if (sizeof(T) == 8 || args.shard_sums || args.shard_factors || !plan.wide) return std::nullopt;
  const int64_t vectors = args.classes / kVector<T>;
  const bool sums = Calibrated && args.class_gradients;
  // The class sums of a half precision's elements do not fit into registers.
  const bool half_of_them = sizeof(T) == 2 && (sums || vectors <= 16 * kWarpVectors);
  plan.warp_vectors = half_of_them ? kWarpVectors / 2 : kWarpVectors;
  plan.wide = vectors > 32 * plan.warp_vectors;
  const int64_t class_bytes = ClassVectors<T>::count(args) * 32 * plan.warp_vectors * kVector<T> *
                              static_cast<int64_t>(sizeof(A));
  const int64_t limit = static_cast<int64_t>(limits.shared_bytes);
  int64_t warps = 0;
  plan.shape = Shape{};
  if (plan.wide) {
    plan.shape.clustered = blocks > 1;
    plan.shape.grid_y = blocks;
    const int64_t most = (sums ? kWarpThreads<T, Calibrated, Calibrated, kByBlock>
                               : kWarpThreads<T, Calibrated, false, kByBlock>) /
                         32;
    warps = divide_up(vectors, 32 * plan.warp_vectors * blocks);
    plan.shape.shared_bytes =
        (blocks > 1 ? kWarpScratchBytes<A, kByCluster> : kWarpScratchBytes<A, kByBlock>)+warps *
        (kWarpBytes<Calibrated> + class_bytes);
    if (warps > most || static_cast<int64_t>(plan.shape.shared_bytes) > limit) return std::nullopt;
  } else {
    const int64_t most = kWarpThreads<T, Calibrated, false, kByWarp> / 32 * (sums ? 2 : 1);
    const int64_t fixed = kWarpScratchBytes<A, kByWarp> + class_bytes;
    warps = std::min<int64_t>(most, (limit - fixed) / kWarpBytes<Calibrated>);
    plan.shape.shared_bytes = fixed + warps * kWarpBytes<Calibrated>;
    if (warps <= 0) return std::nullopt;
  }
  plan.lanes = plan.wide ? 0 : 32;
  plan.tiles = blocks;
  plan.tile_vectors = static_cast<int>(divide_up(plan.vectors, blocks));
  plan.shape.threads = static_cast<int>(32 * warps);
  return plan;
}

// How many of the plan's blocks run at once.
template <class Launcher, class Args>
int64_t resident_blocks(Launcher& launcher, void (*kernel)(Args), const RowPlan& plan) {
  if (plan.shape.clustered) return int64_t{plan.tiles} * launcher.clusters(kernel, plan.shape);
  const int blocks =
      launcher.blocks_per_multiprocessor(kernel, plan.shape.threads, plan.shape.shared_bytes);
  return int64_t{launcher.limits().multiprocessors} * std::max(1, blocks);
}

// Along grid_x as many as run at once, or as there is work for; a multiple of the period. One block
// more than run at once would run alone, after all others.
static inline int64_t row_blocks(const RowArgs& args, const RowPlan& plan, int64_t resident) {
  // Class sums are written and read once a block: worth the rows that it has.
  constexpr int64_t kRowsOfSums = 4;
  int64_t groups = plan.wide ? 1 : plan.shape.threads / plan.lanes;
  if (!plan.warp_vectors && args.class_gradients) groups *= kRowsOfSums;
  // Of few rows each is a block's, with the bandwidth of a multiprocessor.
  if (plan.warp_vectors && !args.class_gradients) groups = 1;
  const int64_t most = resident / plan.tiles;
  const int64_t wanted = std::min(most, divide_up(args.outer, groups));
  const int64_t up = divide_up(wanted, plan.period) * plan.period;
  return std::max<int64_t>(up > most ? up - plan.period : up, plan.period);
}

// Tiles that leave more than a tenth of the device without work are made smaller, and as many as
// fill it. Costs the lanes that smaller tiles leave idle, and the tiles' sums.
template <class T, class Launcher, class Args>
void fill_grid(Launcher& launcher, void (*kernel)(Args), const RowArgs& args, RowPlan& plan) {
  for (;;) {  // of smaller blocks more may run at once
    const int64_t resident = resident_blocks(launcher, kernel, plan);
    const int64_t blocks = row_blocks(args, plan, resident);
    plan.shape.grid_x = blocks;
    if (plan.tiles == 1 || plan.shape.clustered || plan.warp_vectors) return;
    const int64_t filling = std::min(divide_up(blocks * plan.tiles, resident) * resident / blocks,
                                     divide_up(plan.vectors, 32 * kKept<T>));
    if (10 * filling <= 11 * plan.tiles) return;
    set_tiles<T>(plan, args, filling);
  }
}

static inline void apply(const RowPlan& plan, RowArgs& args) {
  args.lanes = plan.lanes;
  args.period = plan.period;
  while (1 << args.period_bits < plan.period) ++args.period_bits;
  args.tiles = plan.tiles;
  args.tile_vectors = plan.tile_vectors;
}

using RowKernel = void (*)(RowArgs);

template <class T, int K, bool Calibrated, bool Sums>
RowKernel row_warp_kernel_of(const RowPlan& plan) {
  return plan.shape.clustered ? row_warp_kernel<T, K, Calibrated, Sums, kByCluster>
         : plan.wide          ? row_warp_kernel<T, K, Calibrated, Sums, kByBlock>
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
    launch_divisors<A>(launcher, args);
    const RowKernel kernel = row_forward_kernel_of<T, Calibrated>(args, plan);
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
