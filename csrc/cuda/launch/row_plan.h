// How rows are divided over blocks and classes over threads: grid, tiles, clusters, by what a device
// holds. Host code without torch, over any launcher (launch.h).
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/kernels/row_backward_kernel.cuh"
#include "cuda/kernels/row_kernel.cuh"
#include "cuda/kernels/row_warp_kernel.cuh"

namespace disalign::cuda {

// After how many rows of this stride, in bytes, addresses are alike modulo 16: a power of two. No
// more than are needed for so many rows.
static inline int row_period(int64_t stride_bytes, int64_t rows) {
  int period = 1;
  while (period * stride_bytes % kVectorBytes != 0 && period < rows) period *= 2;
  return period;
}

using RowKernel = void (*)(RowArgs);

struct RowPlan {
  Shape shape;
  bool wide = false;
  int warp_vectors = 0;  // of a lane, where a warp keeps a row (row_warp_kernel.cuh); else 0
  int lanes = 0, period = 1, tiles = 1, tile_vectors = 0;
  int team = 1;         // blocks whose class sums are one partial: row_warp_tile.cuh
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
// so many blocks. None for float64, for shards, for rows that a narrow group keeps with fewer
// instructions, and where a row needs more warps or more shared memory than there are.
template <class T, bool Calibrated>
std::optional<RowPlan> row_warp_plan(const RowArgs& args, const Limits& limits, RowPlan plan,
                                     int blocks) {
  using A = Accumulate<T>;
  // A warp that keeps a row takes fewer instructions than one whose lanes keep it as a group.
  if (!plan.wide && plan.lanes < 32) return std::nullopt;
  if (sizeof(T) == 8 || args.shard_sums || args.shard_factors) return std::nullopt;
  const int64_t vectors = args.classes / kVector<T>;
  const bool sums = Calibrated && args.class_gradients;
  // The class sums of a half precision's elements do not fit into registers.
  const bool half_of_them = sums ? sizeof(T) == 2 : vectors <= 16 * kWarpVectors;
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
  if (plan.shape.clustered) return plan.shape.grid_y * launcher.clusters(kernel, plan.shape);
  const int blocks =
      launcher.blocks_per_multiprocessor(kernel, plan.shape.threads, plan.shape.shared_bytes);
  return int64_t{launcher.limits().multiprocessors} * std::max(1, blocks);
}

// Along grid_x as many as run at once, or as there is work for; a multiple of the period. One block
// more than run at once would run alone, after all others.
static inline int64_t row_blocks(const RowArgs& args, const RowPlan& plan, int64_t resident) {
  // Class sums are written and read once a block: worth the rows that it has.
  constexpr int64_t kRowsOfSums = 4;
  int64_t groups = plan.team * (plan.wide ? 1 : plan.shape.threads / plan.lanes);
  if (!plan.warp_vectors && args.class_gradients) groups *= kRowsOfSums;
  // Of few rows each is a block's, with the bandwidth of a multiprocessor.
  if (plan.warp_vectors && !args.class_gradients) groups = 1;
  const int64_t most = resident / (plan.tiles * plan.team);
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

// Clusters of blocks add up their class sums before they write them, where these are more than a tenth
// of the logits: of as few blocks as will do, and of no more than leave a tenth of the device idle.
template <class T, class Launcher>
void team_up(Launcher& launcher, RowKernel kernel, const RowArgs& args, RowPlan& plan) {
  if (!plan.warp_vectors || !args.class_gradients || plan.tiles > 1 ||
      !launcher.limits().has_clusters)
    return;
  const int64_t resident = resident_blocks(launcher, kernel, plan);
  const int64_t of_row = args.classes * static_cast<int64_t>(sizeof(T));
  const int64_t of_partial = 2 * args.classes * static_cast<int64_t>(sizeof(Accumulate<T>));
  while (10 * plan.shape.grid_x * of_partial > args.outer * of_row && plan.team < kClusterBlocks) {
    RowPlan larger = plan;
    larger.team *= 2;
    larger.shape.clustered = true;
    larger.shape.grid_y = larger.team;
    const int64_t blocks = resident_blocks(launcher, kernel, larger);
    if (10 * blocks < 9 * resident) return;
    larger.shape.grid_x = row_blocks(args, larger, blocks);
    if (larger.shape.grid_x >= plan.shape.grid_x) return;
    plan = larger;
  }
}

static inline void apply(const RowPlan& plan, RowArgs& args) {
  args.lanes = plan.lanes;
  args.period = plan.period;
  while (1 << args.period_bits < plan.period) ++args.period_bits;
  args.tiles = plan.tiles;
  args.tile_vectors = plan.tile_vectors;
}

}  // namespace disalign::cuda
