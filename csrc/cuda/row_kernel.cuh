// Row kernels, forward: calibrated softmax cross-entropy over rows of logits.
//
// - Maps: row_tile.cuh. A group's vectors of a row stay in registers from the one read of them to
//   the class sums; the next row's are on their way meanwhile.
// - row_forward_kernel: the maximum of u, the exponentials and their sums, the row's loss, and with
//   these known the row's share of the gradients of scale, bias and confidence. The target's term
//   is kept out of the sums: the loss of a row with p_t next to 1 is log1p of what is left, and in
//   the confidence's gradient, sum_j q_j d_j = sum_j q_j (d_j - d_t), it is exactly 0.
// - With more vectors than a block keeps, each block sums a tile of the row and row_combine_kernel
//   adds the tiles; the class sums are then made by row_backward_kernel.cuh from a second read.
// - Memory: the logits are read once (twice for class sums of such a wide row).
// - Whatever reduction divides by is known when all blocks are done: finish_kernel.cuh divides.
#pragma once

#include "../common/loss_math.h"
#include "row_tile.cuh"

namespace disalign::cuda {

// What a tile hands on, [kTileValues][tiles][rows].
enum TileValue {
  kMaximum,
  kRest,
  kRestSlope,
  kTargetLogit,
  kTargetSlope,
  kSmooth,
  kSmoothSlope,
  kWeight,
  kTileValues
};  // clang-format off

template <class A>
struct RowSums {
  A maximum;       // of u
  A rest;          // sum of exp(u_j - maximum) over the classes that are not the target
  A rest_slope;    // of exp(u_j - maximum) d_j, where d = a z + b, 0 where that is not finite
  A target_logit;  // u_t, margin included
  A target_slope;  // d_t
  A smooth;        // sum_j w_j (u_j - maximum)
  A smooth_slope;  // sum_j w_j d_j
};
// clang-format on

// What a row's sums yield: the loss, and the factors of its gradient
// q_j = softmax * exp(u_j - maximum) - smooth * w_j, and `target_gradient` at j = t.
template <class A>
struct RowResult {
  A loss, sum, softmax, smooth, target_gradient, confidence;
};

template <class A>
__device__ __forceinline__ RowResult<A> row_result(const LossArgs& args, const RowSums<A>& sums,
                                                   A target_weight, A weights) {
  const A at_target = exponential(sums.target_logit - sums.maximum);
  RowResult<A> out;
  out.sum = sums.rest + at_target;
  const A log_sum = std::log(out.sum);
  const A nll = sums.target_logit == sums.maximum ? std::log1p(sums.rest)
                                                  : (sums.maximum - sums.target_logit) + log_sum;
  const RowTerms<A> terms =
      row_terms<A>(nll, log_sum, target_weight, static_cast<A>(args.label_smoothing), weights,
                   sums.smooth, static_cast<A>(args.classes), static_cast<A>(args.focal_gamma));
  out.loss = terms.loss;
  out.softmax = terms.softmax / out.sum;
  out.smooth = terms.smooth;
  // softmax p_t - target = (softmax - target) p_t - target (1 - p_t), without cancellation
  out.target_gradient =
      ((terms.softmax - terms.target) * at_target - terms.target * sums.rest) / out.sum;
  out.confidence = out.softmax * (sums.rest_slope - sums.target_slope * sums.rest) -
                   terms.smooth * (sums.smooth_slope - sums.target_slope * weights);
  return out;
}

// Loss and statistics of row i, and what it adds to the block's sums.
template <class A>
__device__ __forceinline__ void write_row(const LossArgs& args, int64_t i, bool counts,
                                          const RowSums<A>& sums, const RowResult<A>& result,
                                          A sample_weight, A c) {
  if (args.loss) static_cast<A*>(args.loss)[i] = counts ? result.loss * sample_weight : A(0);
  static_cast<A*>(args.row_max)[i] = counts ? sums.maximum : A(0);
  static_cast<A*>(args.row_sum)[i] = counts ? result.sum : A(1);
  if (args.grad_confidence)
    static_cast<A*>(args.grad_confidence)[i] =
        counts ? sample_weight * c * (A(1) - c) * result.confidence : A(0);
}

template <class T>
struct FetchedRow {
  Raw raw[kKept<T>];
  int target;  // -1: the row counts nothing, and raw is 0
  Accumulate<T> confidence;

  template <bool Wide>
  __device__ __forceinline__ void fetch(const RowArgs& args, const Tile<T, Wide>& tile, int64_t i) {
    target = i < args.images ? static_cast<int>(target_of(args, i)) : -1;
    confidence = 0;
    if (target < 0) {
#pragma unroll
      for (int k = 0; k < kKept<T>; ++k) raw[k] = {};
      return;
    }
    tile.load(static_cast<const T*>(args.logits) + i * args.image_stride, raw);
    if (args.confidence) confidence = static_cast<const Accumulate<T>*>(args.confidence)[i];
  }
};

template <class T, bool Calibrated, bool Wide>
__global__ void __launch_bounds__(Wide ? kWideThreads<T> : kNarrowThreads)
    row_forward_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>;
  DISALIGN_SHARED_MEMORY(memory);
  A* class_memory = reinterpret_cast<A*>(memory + kRowScratchBytes<A, Wide>);

  const Tile<T, Wide> tile(args);
  const ClassVectors<T> classes(args, tile, class_memory);
  const bool smoothing = args.label_smoothing > 0;
  A weights = 0;
  if (smoothing) {
    const int end = tile.first_class + tile.vectors * V;
    weights = weight_sum<A>(args, max(tile.first_class, 0), min(end, tile.classes),
                            reinterpret_cast<A*>(memory));
    __syncthreads();
  }
  BlockSums block_sums(reinterpret_cast<double*>(memory), tile.groups);
  Group<A, Wide> group(tile.lanes, class_memory - Group<A, Wide>::kScratchEntries);
  const bool tiled = args.tiles > 1;
  const bool sum_classes = Calibrated && args.class_gradients && !tiled;
  const bool slopes = Calibrated && args.grad_confidence;
  const A* class_weight = static_cast<const A*>(args.weight);
  A grad_scale[kElements<T>] = {}, grad_bias[kElements<T>] = {};

  constexpr bool kAhead = !(Wide && Calibrated);
  FetchedRow<T> next;
  int64_t i = tile.row;
  if (tile.rounds > 0) next.fetch(args, tile, i);
  for (int64_t round = 0; round < tile.rounds; ++round, i += tile.row_step) {
    if (!kAhead && round > 0) next.fetch(args, tile, i);
    const FetchedRow<T> row = next;
    if (kAhead && round + 1 < tile.rounds) next.fetch(args, tile, i + tile.row_step);
    const bool counts = row.target >= 0;
    const A c = Calibrated ? sigmoid(row.confidence) : A(0);
    const int slot = tile.slot_of(row.target);

    RowSums<A> sums = {};
    A e[kElements<T>];          // u, then exp(u - maximum)
    sums.maximum = kLowest<A>;  // finite: u - maximum is never NaN
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      const int k = part / N, first = part * Q;
      A z[Q], u[Q];
      unpack<T>(row.raw[k], part % N, z);
      classes.template affine<Calibrated>(tile.vector(k), part % N, z, c, u);
#pragma unroll
      for (int q = 0; q < Q; ++q) e[first + q] = u[q];
      // Selects, no branches on slot == p: in these the compiler would index the registers by slot,
      // and move them to memory.
      if (slot >= first && slot < first + Q) {
        const A m = vector_entry<A>(args.margin, row.target, A(0));
        A d[Q] = {};
        if constexpr (Calibrated) classes.slope(tile.vector(k), part % N, z, d);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const bool here = first + q == slot;
          e[first + q] -= here ? m : A(0);
          sums.target_logit = here ? e[first + q] : sums.target_logit;
          sums.target_slope = here ? d[q] : sums.target_slope;
        }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q)
        sums.maximum = e[first + q] > sums.maximum ? e[first + q] : sums.maximum;
    }
    sums.maximum = group.max(sums.maximum);

#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      const int k = part / N, first = part * Q;
      A d[Q] = {};
      if (slopes) {
        A z[Q];
        unpack<T>(row.raw[k], part % N, z);
        classes.slope(tile.vector(k), part % N, z, d);
      }
      if (smoothing) {
        A w[Q];
        classes.load(classes.weight, tile.vector(k), part % N, w);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          // What is not the row's own is -inf, and would add 0 * -inf.
          const bool own =
              tile.vector(k) < tile.vectors && tile.own(tile.class_of(k) + part % N * Q + q);
          sums.smooth += own ? w[q] * (e[first + q] - sums.maximum) : A(0);
          sums.smooth_slope += w[q] * d[q];
        }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const A x = exponential(e[first + q] - sums.maximum);
        e[first + q] = first + q == slot ? A(0) : x;
        sums.rest += e[first + q];
        sums.rest_slope += e[first + q] * d[q];
      }
    }
    A values[6] = {sums.rest,         sums.target_logit, sums.rest_slope,
                   sums.target_slope, sums.smooth,       sums.smooth_slope};
    if (smoothing) {
      group.sum(values);
    } else if (Calibrated) {
      A four[4] = {values[0], values[1], values[2], values[3]};
      group.sum(four);
#pragma unroll
      for (int k = 0; k < 4; ++k) values[k] = four[k];
    } else {
      A two[2] = {values[0], values[1]};
      group.sum(two);
      values[0] = two[0], values[1] = two[1];
    }
    sums = {sums.maximum, values[0], values[2], values[1], values[3], values[4], values[5]};

    if (tiled) {
      if (tile.lane == 0) {
        A* to = static_cast<A*>(args.tile_sums) + blockIdx.y * args.images + i;
        const int64_t stride = args.tiles * args.images;
        to[kMaximum * stride] = sums.maximum;
        to[kRest * stride] = sums.rest;
        to[kRestSlope * stride] = sums.rest_slope;
        to[kTargetLogit * stride] = sums.target_logit;
        to[kTargetSlope * stride] = sums.target_slope;
        to[kSmooth * stride] = sums.smooth;
        to[kSmoothSlope * stride] = sums.smooth_slope;
        to[kWeight * stride] = weights;
      }
      continue;
    }

    const A target_weight = counts && class_weight ? class_weight[row.target] : A(1);
    const A v_i = counts ? vector_entry<A>(args.sample_weight, i, A(1)) : A(0);
    const RowResult<A> result = row_result(args, sums, target_weight, weights);
    if (tile.lane == 0 && i < args.images) {
      write_row(args, i, counts, sums, result, v_i, c);
      if (counts)
        block_sums.add(tile.group, result.loss * v_i, divisor_share(args, target_weight, v_i));
    }
    if (!sum_classes || !counts) continue;
    const A softmax = v_i * c * result.softmax, smooth = v_i * c * result.smooth;
    const A target_gradient = v_i * c * result.target_gradient;
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      const int k = part / N, first = part * Q;
      A z[Q], w[Q] = {};
      unpack<T>(row.raw[k], part % N, z);
      if (smoothing) classes.load(classes.weight, tile.vector(k), part % N, w);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int p = first + q;
        const A g = (p == slot ? target_gradient : softmax * e[p]) - smooth * w[q];
        // A masked class adds 0, not 0 * -inf.
        grad_scale[p] += g * (z[q] == negative_infinity<A>() ? A(0) : z[q]);
        grad_bias[p] += g;
      }
    }
  }
  if (tiled) return;
  if (args.block_sums) block_sums.write(args.block_sums);
  if (sum_classes) {
    if constexpr (Calibrated)
      write_class_sums<T, Wide>(args, tile, grad_scale, grad_bias, class_memory);
  }
}

// The tiles of each row added up; a thread a row.
template <class A>
__global__ void __launch_bounds__(kNarrowThreads) row_combine_kernel(const RowArgs args) {
  DISALIGN_SHARED_MEMORY(memory);
  const bool smoothing = args.label_smoothing > 0;
  const int64_t stride = args.tiles * args.images;
  BlockSums block_sums(reinterpret_cast<double*>(memory), blockDim.x);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.images;
       i += int64_t{gridDim.x} * blockDim.x) {
    const auto value = [&](TileValue which, int tile) {
      return static_cast<const A*>(args.tile_sums)[which * stride + tile * args.images + i];
    };
    const int64_t t = target_of(args, i);
    const bool counts = t >= 0;
    RowSums<A> sums = {};
    sums.maximum = kLowest<A>;
    for (int tile = 0; tile < args.tiles; ++tile) {
      const A m = value(kMaximum, tile);
      sums.maximum = m > sums.maximum ? m : sums.maximum;
    }
    A weights = 0;
    for (int tile = 0; tile < args.tiles; ++tile) {
      const A m = value(kMaximum, tile), ratio = exponential(m - sums.maximum);
      sums.rest += ratio * value(kRest, tile);
      sums.rest_slope += ratio * value(kRestSlope, tile);
      sums.target_logit += value(kTargetLogit, tile);
      sums.target_slope += value(kTargetSlope, tile);
      if (!smoothing) continue;
      const A w = value(kWeight, tile);
      sums.smooth += value(kSmooth, tile) + (w == A(0) ? A(0) : w * (m - sums.maximum));
      sums.smooth_slope += value(kSmoothSlope, tile);
      weights += w;
    }
    const A c = args.confidence ? sigmoid(static_cast<const A*>(args.confidence)[i]) : A(0);
    const A target_weight = counts ? vector_entry<A>(args.weight, t, A(1)) : A(1);
    const A v_i = counts ? vector_entry<A>(args.sample_weight, i, A(1)) : A(0);
    const RowResult<A> result = row_result(args, sums, target_weight, weights);
    write_row(args, i, counts, sums, result, v_i, c);
    if (!counts) continue;
    block_sums.add(threadIdx.x, result.loss * v_i, divisor_share(args, target_weight, v_i));
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

}  // namespace disalign::cuda
