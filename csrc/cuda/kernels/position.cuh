// The loss and the gradient's factors of one position (a row, a pixel), from the sums over its
// classes. What every forward kernel makes of its sums, and what every backward kernel starts with.
#pragma once

#include "common/loss_math.h"
#include "cuda/kernels/group.cuh"
#include "cuda/kernels/launch.h"

namespace disalign::cuda {

constexpr int kNoTarget = static_cast<int>(kIgnored);  // the target of an ignored position

// Whether a position of this target is not ignored; of a shard, the target may be elsewhere.
__device__ __forceinline__ bool is_valid(int target) { return target > kNoTarget; }

// The target of position i, or kNoTarget. A target that is no class stops the kernel, as in
// PyTorch.
__device__ __forceinline__ int checked_target(const LossArgs& args, int64_t t) {
  if (t == args.ignore_index) return kNoTarget;
  const int64_t lowest = args.shard_sums || args.shard_factors ? kElsewhere : 0;
  DISALIGN_ASSERT(static_cast<uint64_t>(t - lowest) < static_cast<uint64_t>(args.classes - lowest),
                  "target is no class");
  return static_cast<int>(t);
}
__device__ __forceinline__ int target_of(const LossArgs& args, int64_t i) {
  return checked_target(args, read_index(args.target, args.target_type, i));
}

// The sum of w_j over the classes [begin, end), by the whole block. `scratch` has an entry a warp.
template <class A>
__device__ __forceinline__ A weight_sum(const LossArgs& args, int begin, int end, A* scratch) {
  A sum = 0;
  for (int j = begin + threadIdx.x; j < end; j += blockDim.x)
    sum += vector_entry<A>(args.weight, j, A(1));
  return block_sum(sum, scratch);
}

// The largest sum of exp(u_j - u_t) that serves, that is, of logits up to 22 above the target's: the
// rounding of an exponent, 2^-24 of it, is a relative error of its exponential. Beyond, the maximum is
// taken off instead.
template <class A>
constexpr A kModerate = A(4294967296);

// Sums over some of a position's classes. The target's term is kept out of `rest` and `rest_slope`:
// the loss of a position with p_t next to 1 is log1p of what is left, and in the confidence's
// gradient, sum_j q_j d_j = sum_j q_j (d_j - d_t), it is exactly 0.
template <class A>
struct PositionSums {
  static constexpr int kValues = 8;

  // Of u; finite, so that u - maximum is never NaN. row_warp_kernel has the target's u here where that
  // serves: what is said of the maximum holds for any number that is taken off instead.
  A maximum = kLowest<A>;
  A rest = 0;          // sum of exp(u_j - maximum) over the classes that are not the target
  A rest_slope = 0;    // of exp(u_j - maximum) d_j, where d = a z + b, 0 where that is not finite
  A target_logit = 0;  // u_t, margin included; 0 where the target is not among the classes
  A target_slope = 0;  // d_t
  A smooth = 0;        // sum_j w_j (u_j - maximum)
  A smooth_slope = 0;  // sum_j w_j d_j
  A weight = 0;        // sum_j w_j; these three with label smoothing only

  // Makes `m`, not below it, the maximum.
  __device__ __forceinline__ void raise(A m, bool smoothing) {
    const A ratio = exponential(maximum - m);
    rest *= ratio;
    rest_slope *= ratio;
    if (smoothing && weight != A(0)) smooth += weight * (maximum - m);  // else 0 * infinity
    maximum = m;
  }

  __device__ __forceinline__ void add(PositionSums other, bool smoothing) {
    const A m = maximum > other.maximum ? maximum : other.maximum;
    raise(m, smoothing);
    other.raise(m, smoothing);
    rest += other.rest;
    rest_slope += other.rest_slope;
    target_logit += other.target_logit;
    target_slope += other.target_slope;
    smooth += other.smooth;
    smooth_slope += other.smooth_slope;
    weight += other.weight;
  }

  // Those of the lane that is `distance` away by its bits.
  __device__ __forceinline__ PositionSums of_lane(int distance) const {
    const auto from = [distance](A v) { return __shfl_xor_sync(kFullWarp, v, distance); };
    PositionSums s;
    s.maximum = from(maximum), s.rest = from(rest), s.rest_slope = from(rest_slope);
    s.target_logit = from(target_logit), s.target_slope = from(target_slope);
    s.smooth = from(smooth), s.smooth_slope = from(smooth_slope), s.weight = from(weight);
    return s;
  }

  // From and to memory, values `stride` apart.
  __device__ __forceinline__ void write(A* to, int64_t stride) const {
    const A values[kValues] = {maximum,      rest,   rest_slope,   target_logit,
                               target_slope, smooth, smooth_slope, weight};
#pragma unroll
    for (int i = 0; i < kValues; ++i) to[i * stride] = values[i];
  }
  static __device__ __forceinline__ PositionSums read(const A* from, int64_t stride) {
    PositionSums s;
    s.maximum = from[0], s.rest = from[stride], s.rest_slope = from[2 * stride];
    s.target_logit = from[3 * stride], s.target_slope = from[4 * stride];
    s.smooth = from[5 * stride], s.smooth_slope = from[6 * stride], s.weight = from[7 * stride];
    return s;
  }
};

// The loss, where it is needed, and the factors of its gradient:
// q_j = softmax * exp(u_j - maximum) - smooth * w_j, and at_target for j = t. Sample weight,
// denominator and upstream gradient are not included.
template <class A>
struct PositionResult {
  A loss, sum, softmax, smooth, at_target, confidence;
};

// Numbers of the loss in the arithmetic: a conversion from double costs as much as 32 additions.
template <class A>
struct RowOptions {
  A label_smoothing, focal_gamma, classes;

  __device__ __forceinline__ explicit RowOptions(const LossArgs& args)
      : label_smoothing(static_cast<A>(args.label_smoothing)),
        focal_gamma(static_cast<A>(args.focal_gamma)),
        classes(static_cast<A>(args.classes)) {}
};

template <class A>
__device__ __forceinline__ PositionResult<A> position_result(const RowOptions<A>& options,
                                                             const PositionSums<A>& sums,
                                                             A target_weight,
                                                             bool needs_loss = true) {
  const A at_target = exponential(sums.target_logit - sums.maximum);
  PositionResult<A> out;
  out.sum = sums.rest + at_target;
  A log_sum = 0, nll = 0;
  if (needs_loss || options.focal_gamma > 0) {
    const bool at_maximum = sums.target_logit == sums.maximum;
    if (!at_maximum || options.label_smoothing > 0) log_sum = std::log(out.sum);
    // inf - inf is NaN, as in PyTorch, where the target's logit is infinite.
    nll = (sums.maximum - sums.target_logit) + (at_maximum ? std::log1p(sums.rest) : log_sum);
  }
  const RowTerms<A> terms =
      row_terms<A>(nll, log_sum, target_weight, options.label_smoothing, sums.weight, sums.smooth,
                   options.classes, options.focal_gamma);
  out.loss = terms.loss;
  const A inverse = reciprocal(out.sum);
  out.softmax = terms.softmax * inverse;
  out.smooth = terms.smooth;
  // softmax p_t - target = (softmax - target) p_t - target (1 - p_t), without cancellation
  out.at_target =
      ((terms.softmax - terms.target) * at_target - terms.target * sums.rest) * inverse -
      terms.smooth * target_weight;
  out.confidence = out.softmax * (sums.rest_slope - sums.target_slope * sums.rest) -
                   terms.smooth * (sums.smooth_slope - sums.target_slope * sums.weight);
  return out;
}

// Loss and statistics of position i of target t.
template <class A>
__device__ __forceinline__ void write_statistics(const LossArgs& args, int64_t i, int t,
                                                 const PositionSums<A>& sums,
                                                 const PositionResult<A>& result, A sample_weight) {
  const bool valid = is_valid(t);
  if (args.loss) static_cast<A*>(args.loss)[i] = valid ? result.loss * sample_weight : A(0);
  static_cast<A*>(args.row_shift)[i] = valid ? sums.maximum : A(0);
  static_cast<A*>(args.row_sum)[i] = valid ? result.sum : A(1);
}

// The same, and the gradient of its confidence.
template <class A>
__device__ __forceinline__ void write_position(const LossArgs& args, int64_t i, int t,
                                               const PositionSums<A>& sums,
                                               const PositionResult<A>& result, A sample_weight,
                                               A c) {
  write_statistics(args, i, t, sums, result, sample_weight);
  if (args.grad_confidence)
    static_cast<A*>(args.grad_confidence)[i] =
        is_valid(t) ? sample_weight * c * (A(1) - c) * result.confidence : A(0);
}

// What backward's classes of a position share, everything included:
// q_j = softmax * exp(u_j - maximum) - smooth * w_j - at_target * [j = t].
template <class A>
struct PositionFactors {
  int target = kNoTarget;
  A c = 0;  // confidence after the sigmoid
  // Of an ignored position: so that the exponentials, which softmax = 0 multiplies, are 0.
  A maximum = -kLowest<A>;
  A softmax = 0, smooth = 0, at_target = 0;
  A target_slope = 0;  // d_t, where the confidence's gradient is wanted

  // The factors that lane `lane` of the group has read. smooth, c and target_slope keep their
  // defaults where the kernel does not use them.
  __device__ __forceinline__ PositionFactors of_lane(int lane, int lanes, bool calibrated,
                                                     bool smoothing, bool slopes) const {
    const auto from = [=](auto v) { return __shfl_sync(kFullWarp, v, lane, lanes); };
    PositionFactors s;
    s.target = from(target), s.maximum = from(maximum);
    s.softmax = from(softmax), s.at_target = from(at_target);
    if (calibrated) s.c = from(c);
    if (smoothing) s.smooth = from(smooth);
    if (slopes) s.target_slope = from(target_slope);
    return s;
  }
};

template <class A>
__device__ __forceinline__ A confidence_of(const LossArgs& args, int64_t i) {
  return args.confidence ? sigmoid(static_cast<const A*>(args.confidence)[i]) : A(0);
}

// 1 / denominator. 0 where that is 0 (no valid position): gradients are defined as 0 then.
template <class A>
__device__ __forceinline__ A inverse_of(double denominator) {
  return denominator == 0 ? A(0) : static_cast<A>(1.0 / denominator);
}
template <class A>
__device__ __forceinline__ A inverse_denominator(const LossArgs& args) {
  return args.denominator ? inverse_of<A>(*args.denominator) : A(1);
}

// Whether the gradient of the logits is there already: backward after a forward that has made it.
template <class A>
__device__ __forceinline__ bool is_made(const LossArgs& args) {
  return args.gradient_made && *static_cast<const A*>(args.upstream) == A(1);
}

// What all gradients of position i are multiplied by; `shared`: of what all positions share.
template <class A>
__device__ __forceinline__ A shared_scale(const LossArgs& args, A inverse) {
  if (inverse == A(0) || args.upstream_stride) return inverse;
  return vector_entry<A>(args.upstream, 0, A(1)) * inverse;
}
template <class A>
__device__ __forceinline__ A gradient_scale(const LossArgs& args, int64_t i, A shared) {
  if (shared == A(0)) return A(0);
  if (args.upstream_stride) shared *= static_cast<const A*>(args.upstream)[i];
  return shared * vector_entry<A>(args.sample_weight, i, A(1));
}

// z_t and u_t.
template <class A>
struct TargetLogit {
  A z, u;
};

// Of position i, whose target t is valid. target_logit(t): called where it is needed. weights: sum_j w_j.
// scale: gradient_scale.
template <class A, class Target>
__device__ __forceinline__ PositionFactors<A> position_factors(const LossArgs& args,
                                                               const RowOptions<A>& options,
                                                               int64_t i, int t, A c, A weights,
                                                               A scale, Target target_logit) {
  PositionFactors<A> out;
  out.target = t;
  out.c = c;
  out.maximum = static_cast<const A*>(args.row_shift)[i];
  const A sum = static_cast<const A*>(args.row_sum)[i];
  const bool focal = options.focal_gamma > 0;
  A nll = 0;
  if (focal || args.grad_confidence) {
    const TargetLogit<A> at = target_logit(t);
    out.target_slope = finite_or_zero(vector_entry<A>(args.scale, t, A(0)) * at.z +
                                      vector_entry<A>(args.bias, t, A(0)));
    if (focal)
      nll = (out.maximum - at.u) + (at.u == out.maximum ? std::log1p(sum - A(1)) : std::log(sum));
  }
  const RowTerms<A> terms =
      row_terms<A>(nll, A(0), vector_entry<A>(args.weight, t, A(1)), options.label_smoothing,
                   weights, A(0), options.classes, options.focal_gamma);
  out.softmax = scale * terms.softmax * reciprocal(sum);
  out.smooth = scale * terms.smooth;
  out.at_target = scale * terms.target;
  return out;
}
template <class A, class Target>
__device__ __forceinline__ PositionFactors<A> position_factors(const LossArgs& args, int64_t i,
                                                               int t, A c, A weights, A inverse,
                                                               Target target_logit) {
  return position_factors(args, RowOptions<A>(args), i, t, c, weights,
                          gradient_scale(args, i, shared_scale(args, inverse)), target_logit);
}

// The same of a position that may be ignored.
template <class A, class Target>
__device__ __forceinline__ PositionFactors<A> position_factors(const LossArgs& args, int64_t i, A c,
                                                               A weights, A inverse,
                                                               Target target_logit) {
  const int t = target_of(args, i);
  if (!is_valid(t)) return {};
  return position_factors(args, i, t, c, weights, inverse, target_logit);
}

// u_t from z_t, without the margin and with it.
template <class A>
__device__ __forceinline__ A class_logit_of(const LossArgs& args, int t, A z, A c) {
  const A a = vector_entry<A>(args.scale, t, A(0)), b = vector_entry<A>(args.bias, t, A(0));
  return calibrated(z, a, b, c) + vector_entry<A>(args.prior, t, A(0));
}
template <class A>
__device__ __forceinline__ A target_logit_of(const LossArgs& args, int t, A z, A c) {
  return class_logit_of(args, t, z, c) - vector_entry<A>(args.margin, t, A(0));
}

}  // namespace disalign::cuda
