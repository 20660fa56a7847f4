// Dense kernels: calibrated softmax cross-entropy over class planes, forward and backward.
//
// - Maps: dense_tile.cuh.
// - dense_forward_kernel: one pass over a thread's classes with a running maximum, kDenseUnroll of
//   them at a time; the slices of a position are added up through shared memory. Then, if wanted,
//   the tile's class sums.
// - dense_backward_kernel: the maximum and the sum are known. The class sums come first where they
//   are wanted, since grad_logits may be the logits themselves; a position is one block's alone,
//   and its target's logit is read before the block writes.
// - Memory: forward reads the logits once, backward reads them once and writes grad_logits once. A
//   tile that does not fit into shared memory is read once more for the class sums.
#pragma once

#include "cuda/kernels/dense_tile.cuh"

namespace disalign::cuda {

// What a thread's class j needs of the class vectors.
template <class A>
struct ClassEntries {
  A a, b, o, w;
  __device__ __forceinline__ ClassEntries(const LossArgs& args, int j)
      : a(vector_entry<A>(args.scale, j, A(0))),
        b(vector_entry<A>(args.bias, j, A(0))),
        o(vector_entry<A>(args.prior, j, A(0))),
        w(vector_entry<A>(args.label_smoothing > 0 ? args.weight : nullptr, j, A(1))) {}
};

template <class T, bool Calibrated>
__global__ void __launch_bounds__(kDenseThreads, 1) dense_forward_kernel(const DenseArgs args) {
  using A = Accumulate<T>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const DenseMemory<A> memory(args, raw_memory);
  DenseTile<T> tile(args);
  BlockSums block_sums(memory.block_sums, tile.positions);
  const bool smoothing = args.label_smoothing > 0;
  const bool slopes = Calibrated && args.grad_confidence;
  const bool sum_classes = Calibrated && args.class_gradients;
  ClassPhase<T, true> classes(args, memory);
  const int stride = DenseMemory<A>::stride(tile.positions);

  for (; tile.tile < tile.tiles; tile.tile += gridDim.x) {
    tile.enter(args);
    const int64_t i = tile.index();
    const int t = tile.inside ? target_of(args, i) : kNoTarget;
    const bool valid = t >= 0;
    const A c = Calibrated && valid ? confidence_of<A>(args, i) : A(0);
    PositionSums<A> sums;
    for (int from = tile.slice; from < tile.classes; from += kDenseUnroll * tile.slices) {
      A z[kDenseUnroll], u[kDenseUnroll];
#pragma unroll
      for (int k = 0; k < kDenseUnroll; ++k) {
        const int j = from + k * tile.slices;
        z[k] = valid && j < tile.classes
                   ? to_accumulate(load_one(tile.logit(args, j) + tile.position))
                   : negative_infinity<A>();
      }
      A maximum = sums.maximum;
#pragma unroll
      for (int k = 0; k < kDenseUnroll; ++k) {
        const int j = from + k * tile.slices;
        u[k] = negative_infinity<A>();
        if (j >= tile.classes) continue;
        const ClassEntries<A> entry(args, j);
        u[k] = z[k] + entry.o;
        if constexpr (Calibrated) {
          u[k] = calibrated(z[k], entry.a, entry.b, c) + entry.o;
          if (args.resident) memory.logits[j * stride + tile.position] = z[k];
        }
        if (j == t) {
          u[k] -= vector_entry<A>(args.margin, j, A(0));
          sums.target_logit = u[k];
          if constexpr (Calibrated) sums.target_slope = finite_or_zero(entry.a * z[k] + entry.b);
        }
        maximum = u[k] > maximum ? u[k] : maximum;
      }
      if (maximum > sums.maximum) sums.raise(maximum, smoothing);
#pragma unroll
      for (int k = 0; k < kDenseUnroll; ++k) {
        const int j = from + k * tile.slices;
        if (j >= tile.classes) continue;
        const A e = j == t ? A(0) : exponential(u[k] - maximum);
        sums.rest += e;
        if (!slopes && !smoothing) continue;
        const ClassEntries<A> entry(args, j);
        const A d = Calibrated ? finite_or_zero(entry.a * z[k] + entry.b) : A(0);
        sums.rest_slope += e * d;
        if (!smoothing) continue;
        sums.smooth += entry.w * (u[k] - maximum);
        sums.smooth_slope += entry.w * d;
        sums.weight += entry.w;
      }
    }
    if (tile.slices > 1) {
      sums.write(memory.exchange + tile.slice * tile.positions + tile.position, kDenseThreads);
      __syncthreads();
      sums = PositionSums<A>();
      for (int slice = 0; slice < tile.slices; ++slice)
        sums.add(PositionSums<A>::read(memory.exchange + slice * tile.positions + tile.position,
                                       kDenseThreads),
                 smoothing);
    }
    const A target_weight = valid ? vector_entry<A>(args.weight, t, A(1)) : A(1);
    const A v = valid ? vector_entry<A>(args.sample_weight, i, A(1)) : A(0);
    const PositionResult<A> result = position_result(RowOptions<A>(args), sums, target_weight);
    if (tile.slice == 0 && tile.inside) {
      write_position(args, i, t, sums, result, v, c);
      if (valid)
        block_sums.add(tile.position, result.loss * v, divisor_share(args, target_weight, v));
    }
    if (sum_classes) {
      if (tile.slice == 0)
        classes.put(tile, t, c, sums.maximum, v * result.softmax, v * result.smooth,
                    v * result.at_target);
      __syncthreads();
      classes.run(args, tile);
    }
    __syncthreads();  // the tile's shared memory is the next one's
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

// Blocks that shall fit on a multiprocessor: see row_backward_kernel.cuh.
template <class T>
constexpr int kDenseBackwardBlocks = sizeof(T) == 8 ? 1 : 3;

template <class T, bool Calibrated>
__global__ void __launch_bounds__(kDenseThreads, kDenseBackwardBlocks<T>)
    dense_backward_kernel(const DenseArgs args) {
  using A = Accumulate<T>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const DenseMemory<A> memory(args, raw_memory);
  DenseTile<T> tile(args);
  const bool smoothing = args.label_smoothing > 0;
  const bool slopes = Calibrated && args.grad_confidence;
  const bool sum_classes = Calibrated && args.class_gradients;
  ClassPhase<T, false> classes(args, memory);
  const int stride = DenseMemory<A>::stride(tile.positions);
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, tile.classes, reinterpret_cast<A*>(memory.block_sums));
    __syncthreads();
  }
  const A inverse = inverse_denominator<A>(args);

  for (; tile.tile < tile.tiles; tile.tile += gridDim.x) {
    tile.enter(args);
    const int64_t i = tile.index();
    PositionFactors<A> at;
    if (tile.inside) {
      const A c = confidence_of<A>(args, i);
      at = position_factors(args, i, c, weights, inverse, [&](int t) -> TargetLogit<A> {
        const A z = to_accumulate(load_one(tile.logit(args, t) + tile.position));
        return {z, target_logit_of(args, t, z, c)};
      });
    }
    const bool valid = at.target >= 0;
    if (sum_classes) {
      if (tile.slice == 0)
        classes.put(tile, at.target, at.c, at.maximum, at.softmax, at.smooth, at.at_target);
      if (args.resident) {
        for (int j = tile.slice; j < tile.classes; j += tile.slices)
          memory.logits[j * stride + tile.position] =
              valid ? to_accumulate(load_one(tile.logit(args, j) + tile.position)) : A(0);
      }
      __syncthreads();
      classes.run(args, tile);
    }
    __syncthreads();  // every target's logit has been read
    A slope = 0;
    for (int from = tile.slice; from < tile.classes; from += kDenseUnroll * tile.slices) {
      A z[kDenseUnroll];
#pragma unroll
      for (int k = 0; k < kDenseUnroll; ++k) {
        const int j = from + k * tile.slices;
        z[k] = 0;
        if (!valid || j >= tile.classes) continue;
        z[k] = sum_classes && args.resident
                   ? memory.logits[j * stride + tile.position]
                   : to_accumulate(load_one(tile.logit(args, j) + tile.position));
      }
#pragma unroll
      for (int k = 0; k < kDenseUnroll; ++k) {
        const int j = from + k * tile.slices;
        if (j >= tile.classes || !tile.inside) continue;
        A q = 0;
        if (valid) {
          const ClassEntries<A> entry(args, j);
          const A gain = Calibrated ? entry.a * at.c + A(1) : A(1);
          A u = (Calibrated ? calibrated(z[k], entry.a, entry.b, at.c) : z[k]) + entry.o;
          if (j == at.target) u -= vector_entry<A>(args.margin, j, A(0));
          q = at.softmax * exponential(u - at.maximum) - at.smooth * entry.w;
          if (j == at.target) q -= at.at_target;
          if (slopes) slope += q * (finite_or_zero(entry.a * z[k] + entry.b) - at.target_slope);
          q *= gain;
        }
        if (args.grad_logits)
          store_one(static_cast<T*>(args.grad_logits) + tile.grad + tile.position +
                        j * args.grad_class_stride,
                    from_accumulate<T>(q));
      }
    }
    if (slopes) {
      slope = sum_of_slices(memory, tile, slope);
      if (tile.slice == 0 && tile.inside)
        static_cast<A*>(args.grad_confidence)[i] = at.c * (A(1) - at.c) * slope;
    }
    __syncthreads();  // the tile's shared memory is the next one's
  }
}

}  // namespace disalign::cuda
