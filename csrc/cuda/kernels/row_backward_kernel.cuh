// Row kernels, backward: the gradients of a row's loss whose maximum and sum forward has found.
//
// - Maps: row_tile.cuh; a row with more vectors than 256 threads keep is several blocks' work, each
//   with its classes.
// - row_backward_kernel: exp(u - maximum), q and whatever is wanted of it: grad_logits, the class
//   sums, the confidence's sum over the tile. finish_kernel.cuh adds blocks and tiles.
// - Memory: one read of the logits; one write of grad_logits, which may be the logits themselves: a
//   thread has read a vector before it writes it, and needs no other of the row. What a whole row
//   needs of its target's logit is then read before, by row_target_kernel.
#pragma once

#include "cuda/kernels/position.cuh"
#include "cuda/kernels/row_tile.cuh"

namespace disalign::cuda {

constexpr int kBackwardThreads = 256;

template <class T>
__device__ __forceinline__ PositionFactors<Accumulate<T>> row_factors(const RowArgs& args,
                                                                      int64_t i,
                                                                      Accumulate<T> weights,
                                                                      Accumulate<T> inverse) {
  using A = Accumulate<T>;
  if (i >= args.outer) return {};
  const A c = confidence_of<A>(args, i);
  if (args.shard_factors) {
    PositionFactors<A> out;
    out.target = target_of(args, i);
    if (!is_valid(out.target)) return out;
    const A* from = static_cast<const A*>(args.shard_factors) + i;
    out.c = c;
    out.maximum = from[kFactorMaximum * args.outer];
    out.softmax = from[kFactorSoftmax * args.outer];
    out.smooth = from[kFactorSmooth * args.outer];
    out.at_target = from[kFactorTarget * args.outer];
    out.target_slope = from[kFactorSlope * args.outer];
    return out;
  }
  return position_factors(args, i, c, weights, inverse, [&](int t) -> TargetLogit<A> {
    const T* row = static_cast<const T*>(args.logits) + i * args.outer_stride;
    const A z = args.target_logits ? static_cast<const A*>(args.target_logits)[i]
                                   : to_accumulate(load_one(row + t));
    return {z, target_logit_of(args, t, z, c)};
  });
}

// Blocks that shall fit on a multiprocessor: what streams through needs many, class sums need the
// registers.
template <class T, bool Calibrated, bool Wide, bool Sums>
constexpr int kBackwardBlocks = Sums || sizeof(T) == 8 ? 1
                                : !Wide                ? 5
                                : Calibrated           ? 2
                                                       : 3;

// Sums: the class sums are wanted.
template <class T, bool Calibrated, bool Wide, bool Sums>
__global__ void __launch_bounds__(Wide ? kBackwardThreads : kNarrowThreads,
                                  (kBackwardBlocks<T, Calibrated, Wide, Sums>))
    row_backward_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, K = kKept<T>, Q = kPart<T>, N = kPartsOfVector<T>;
  DISALIGN_SHARED_MEMORY(memory);
  A* class_memory = reinterpret_cast<A*>(memory + kRowScratchBytes<A, Wide>);

  const Tile<T, Wide> tile(args);
  const ClassVectors<T> classes(args, tile, class_memory);
  Group<A, Wide> group(tile.lanes, class_memory - Group<A, Wide>::kScratchEntries);
  const bool smoothing = args.label_smoothing > 0;
  const bool slopes = Calibrated && args.confidence_sums;
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  if (!writes_logits && !slopes && !Sums) return;
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, tile.classes, reinterpret_cast<A*>(memory));
    __syncthreads();
  }
  const A inverse = inverse_denominator<A>(args);
  A grad_scale[Sums ? K * V : 1] = {}, grad_bias[Sums ? K * V : 1] = {};

  PositionFactors<A> turn;  // this lane's, of the rounds around this one
  int64_t i = tile.row;
  for (int round = 0; round < tile.rounds; ++round, i += tile.row_step) {
    if (tile.turn_of(round) == 0)
      turn = row_factors<T>(args, tile.row_of_turn(i), weights, inverse);
    const PositionFactors<A> row =
        turn.of_lane(tile.turn_of(round), tile.turns(), Calibrated, smoothing, slopes);
    Raw raw[K];
    if (is_valid(row.target)) {
      tile.load(static_cast<const T*>(args.logits) + i * args.outer_stride, raw);
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) raw[k] = {};
    }
    const int slot = tile.slot_of(row.target);
    T* grad = static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride;
    const bool aligned = tile.aligned(grad), writes = writes_logits && i < args.outer;
    A slope = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Raw out = {};
#pragma unroll
      for (int part = 0; part < N; ++part) {
        const int first = k * V + part * Q;
        const bool has_target = slot >= first && slot < first + Q;
        A z[Q], g[Q];
        unpack<T>(raw[k], part, z);
        classes.template affine<Calibrated>(tile.vector(k), part, z, row.c, g);
        // Selects: see row_forward_kernel.
        if (has_target && args.margin) {
          const A m = static_cast<const A*>(args.margin)[row.target];
#pragma unroll
          for (int q = 0; q < Q; ++q) g[q] -= first + q == slot ? m : A(0);
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) g[q] = row.softmax * exponential(g[q] - row.maximum);
        if (smoothing) {
          A w[Q];
          classes.load(classes.weight, tile.vector(k), part, w);
#pragma unroll
          for (int q = 0; q < Q; ++q) g[q] -= row.smooth * w[q];
        }
        if (has_target) {
#pragma unroll
          for (int q = 0; q < Q; ++q) g[q] -= first + q == slot ? row.at_target : A(0);
        }
        if (slopes) {
          A d[Q];
          classes.slope(tile.vector(k), part, z, d);
#pragma unroll
          for (int q = 0; q < Q; ++q) slope += g[q] * (d[q] - row.target_slope);
        }
        if constexpr (Sums) {
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            const A gc = g[q] * row.c;
            // A masked class adds 0, not 0 * -inf.
            grad_scale[first + q] += gc * (z[q] == negative_infinity<A>() ? A(0) : z[q]);
            grad_bias[first + q] += gc;
          }
        }
        if constexpr (Calibrated) {
          A a[Q];
          classes.load(classes.scale, tile.vector(k), part, a);
#pragma unroll
          for (int q = 0; q < Q; ++q) g[q] *= a[q] * row.c + A(1);
        }
        pack<T>(g, part, out);
      }
      if (writes) tile.store(grad, k, aligned, out);
    }
    if (slopes) {
      A values[1] = {slope};
      group.sum(values);
      if (tile.lane == 0 && i < args.outer)
        static_cast<A*>(args.confidence_sums)[blockIdx.y * args.outer + i] =
            row.c * (A(1) - row.c) * values[0];
    }
  }
  if constexpr (Sums) write_class_sums<T, Wide>(args, tile, grad_scale, grad_bias, class_memory);
}

// The target's logit of every row, for a backward that writes over the logits.
template <class T>
__global__ void __launch_bounds__(kNarrowThreads, 1) row_target_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.outer;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int t = target_of(args, i);
    const T* row = static_cast<const T*>(args.logits) + i * args.outer_stride;
    static_cast<A*>(args.target_logits)[i] = t < 0 ? A(0) : to_accumulate(load_one(row + t));
  }
}

}  // namespace disalign::cuda
