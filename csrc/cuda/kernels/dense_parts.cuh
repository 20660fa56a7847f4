// What dense_kernel.cuh is made of: what it knows of its arguments when it is compiled, the sums of a
// tile that is read by its maxima, and what its second pass is given.
#pragma once

#include "cuda/kernels/dense_tile.cuh"

namespace disalign::cuda {

// The arguments, with what is known of them when the kernel is compiled: what is absent costs nothing.
// Options: there may be a prior, a margin, sample weights, label smoothing, a focal exponent.
template <bool Calibrated, bool Options>
__device__ __forceinline__ DenseArgs known(DenseArgs args) {
  args.shard_sums = nullptr, args.shard_factors = nullptr;
  if constexpr (!Calibrated) {
    args.scale = args.bias = args.confidence = nullptr;
    args.grad_scale = args.grad_bias = args.grad_confidence = nullptr;
    args.class_gradients = false;
  }
  if constexpr (!Options) {
    args.prior = args.margin = args.sample_weight = nullptr;
    args.label_smoothing = args.focal_gamma = 0;
  }
  return args;
}
static inline bool has_options(const DenseArgs& args) {
  return args.prior || args.margin || args.sample_weight || args.label_smoothing > 0 ||
         args.focal_gamma > 0;
}

// Blocks that shall fit on a multiprocessor.
template <class T, bool Calibrated, bool Whole>
constexpr int kDenseBlocks = sizeof(T) == 8 || (sizeof(T) == 2 && Calibrated && !Whole) ? 1 : 2;

// Over a thread's classes that are not its positions' targets, by their maximum.
template <class A, int V>
struct DenseSums {
  A maximum[V], rest[V], smooth[V], weight[V];  // as in PositionSums; the last two with smoothing

  __device__ __forceinline__ DenseSums() {
#pragma unroll
    for (int v = 0; v < V; ++v) maximum[v] = kLowest<A>, rest[v] = smooth[v] = weight[v] = 0;
  }

  __device__ __forceinline__ void add(int v, A u, A w, bool smoothing) {
    const A top = larger(maximum[v], u), below = maximum[v] - top;
    rest[v] = rest[v] * exponential(below) + exponential(u - top);
    if (smoothing) {
      if (weight[v] != A(0)) smooth[v] += weight[v] * below;  // else 0 * infinity
      smooth[v] += w * (u - top);
      weight[v] += w;
    }
    maximum[v] = top;
  }

  // A position's, of what its slices have written: [maximum, rest, smooth, weight][slices][positions].
  // u_t: the target's, which is not among them.
  static __device__ __forceinline__ PositionSums<A> of_position(const A* from, int slices,
                                                                int positions, A u_t,
                                                                bool smoothing) {
    const int of_slices = slices * positions;
    PositionSums<A> sums;
    sums.maximum = larger(u_t, kLowest<A>);
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice)
      sums.maximum = larger(sums.maximum, from[slice * positions]);
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice, from += positions) {
      const A below = *from - sums.maximum;
      sums.rest += from[of_slices] * exponential(below);
      if (!smoothing) continue;
      const A weight = from[3 * of_slices];
      sums.smooth += from[2 * of_slices];
      if (weight != A(0)) sums.smooth += weight * below;  // else 0 * infinity
    }
    return sums;
  }
};

// What the second pass wants.
struct DenseWanted {
  bool logits, confidence, sums;  // sums: of scale and bias
};

// A position's factors into the second pass's entries.
template <class A>
__device__ __forceinline__ void write_factors(A* entries, int positions, int p,
                                              const PositionFactors<A>& factors) {
  entries[kEntryShift * positions + p] = factors.maximum;
  entries[kEntrySoftmax * positions + p] = factors.softmax;
  entries[kEntrySmooth * positions + p] = factors.smooth;
  entries[kEntryTarget * positions + p] = factors.at_target;
  entries[kEntrySlope * positions + p] = factors.target_slope;
}

}  // namespace disalign::cuda
