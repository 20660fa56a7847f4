// A position whose target is class probabilities: b_j, and from the sums over its classes its loss and
// the factors of its gradient. As position.cuh, of which PositionSums has here
//   rest: sum_j exp(u_j - maximum);  smooth: sum_j b_j (u_j - maximum);  weight: B = sum_j b_j
// and 0 of a target.
#pragma once

#include "cuda/kernels/position.cuh"

namespace disalign::cuda {

// b_j is w_j times this of y_j, in the arithmetic.
template <class A>
struct SoftOptions {
  A keep, share;

  __device__ __forceinline__ explicit SoftOptions(const LossArgs& args)
      : keep(static_cast<A>(args.keep)), share(static_cast<A>(args.share)) {}
  __device__ __forceinline__ A of(A y) const { return std::fma(keep, y, share); }
};

// b_j (u_j - maximum); 0 of a masked class that the target does not ask for, not 0 * infinity.
template <class A>
__device__ __forceinline__ A soft_term(A b, A below) {
  return b == A(0) ? A(0) : b * below;
}

// q_j = softmax exp(u_j - shift) - smooth b_j. Of no position: q_j = 0.
template <class A>
struct SoftFactors {
  A shift = -kLowest<A>;  // so that the exponentials, which softmax = 0 multiplies, are 0
  A softmax = 0, smooth = 0;
};

// Of forward, for an upstream gradient of 1, not divided by the denominator. `valid`: whether there is
// such a position.
template <class A>
__device__ __forceinline__ SoftFactors<A> soft_factors(const PositionSums<A>& sums, A sample_weight,
                                                       bool valid) {
  if (!valid) return {};
  return {sums.maximum, sample_weight * sums.weight * reciprocal(sums.rest), sample_weight};
}

// Of backward, of position i, everything included. shared: shared_scale.
template <class A>
__device__ __forceinline__ SoftFactors<A> soft_factors(const LossArgs& args, int64_t i, A shared) {
  if (args.shard_factors) {
    const A* from = static_cast<const A*>(args.shard_factors) + i;
    const int64_t stride = args.positions();
    return {from[kFactorMaximum * stride], from[kFactorSoftmax * stride],
            from[kFactorSmooth * stride]};
  }
  const A scale = gradient_scale(args, i, shared);
  const A total = static_cast<const A*>(args.row_total)[i];
  return {static_cast<const A*>(args.row_shift)[i],
          scale * total * reciprocal(static_cast<const A*>(args.row_sum)[i]), scale};
}

// q_j = factor (ratio exp(u_j - shift) - b_j).
template <class A>
struct SoftRatio {
  A shift = 0, ratio = 0, factor = 0;
};

// The same of backward so.
template <class A>
__device__ __forceinline__ SoftRatio<A> soft_ratio(const LossArgs& args, int64_t i, A shared) {
  if (args.shard_factors) {
    const SoftFactors<A> of_shard = soft_factors(args, i, shared);
    const bool normal = std::fabs(of_shard.smooth) >= A(FLT_MIN);
    return {of_shard.shift, normal ? of_shard.softmax * reciprocal(of_shard.smooth) : A(0),
            normal ? of_shard.smooth : A(0)};
  }
  return {
      static_cast<const A*>(args.row_shift)[i],
      static_cast<const A*>(args.row_total)[i] * reciprocal(static_cast<const A*>(args.row_sum)[i]),
      gradient_scale(args, i, shared)};
}

// Loss and statistics of position i, or its sums, of a shard. Returns the loss times its sample weight.
template <class A>
__device__ __forceinline__ A write_soft_position(const LossArgs& args, int64_t i,
                                                 const PositionSums<A>& sums, A sample_weight) {
  if (args.shard_sums) {
    const A values[kShardValues] = {sums.maximum, sums.rest, sums.weight, A(0), sums.smooth};
    A* to = static_cast<A*>(args.shard_sums) + i;
#pragma unroll
    for (int k = 0; k < kShardValues; ++k) to[k * args.positions()] = values[k];
    return 0;
  }
  const A loss =
      sample_weight * soft_row_terms<A>(std::log(sums.rest), sums.weight, sums.smooth).loss;
  if (args.loss) static_cast<A*>(args.loss)[i] = loss;
  static_cast<A*>(args.row_shift)[i] = sums.maximum;
  static_cast<A*>(args.row_sum)[i] = sums.rest;
  static_cast<A*>(args.row_total)[i] = sums.weight;
  return loss;
}

}  // namespace disalign::cuda
