// Where the positions of the upsampled loss lie between those of the low-resolution logits.
//
// Output i of an axis lies between the low-resolution positions `source` and `source + 1`, `weight`
// of the way; at the axis' end the weight is 0. Sources ascend: the outputs of source s are
// [first[s], first[s + 1]). Both are F.interpolate's (bilinear), computed in double, once a launch.
#pragma once

#include <limits>

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/position.cuh"

namespace disalign::cuda {

constexpr int kAxisThreads = 128;

// What stands for -inf: finite, so that 0 times it is 0 between two positions, and so low that its
// exponential is 0. A position whose maximum is below kNothing has no class left.
template <class A>
constexpr A kMasked = kLowest<A> / 4;
template <class A>
constexpr A kNothing = kMasked<A> / 16;

// Weights are less than 1, or `interpolated` would lose what it ends at.
template <class A>
constexpr A kBelowOne = A(1) - std::numeric_limits<A>::epsilon() / 2;

// The position of output i, in units of the low resolution.
__device__ __forceinline__ double axis_position(const Axis& axis, bool align_corners, int i) {
  if (align_corners) return axis.out > 1 ? (axis.in - 1.0) / (axis.out - 1.0) * i : 0.0;
  const double at = (i + 0.5) * (static_cast<double>(axis.in) / axis.out) - 0.5;
  return at > 0.0 ? at : 0.0;
}

__device__ __forceinline__ int axis_source(const Axis& axis, bool align_corners, int i) {
  return min(static_cast<int>(axis_position(axis, align_corners, i)), axis.in - 1);
}

template <class A>
__device__ __forceinline__ void fill_axis(const Axis& axis, bool align_corners) {
  const int step = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < axis.out; i += step) {
    const double at = axis_position(axis, align_corners, i);
    const int source = axis_source(axis, align_corners, i);
    axis.source[i] = source;
    const double weight = source < axis.in - 1 ? at - source : 0.0;
    static_cast<A*>(axis.weight)[i] = std::fmin(static_cast<A>(weight), kBelowOne<A>);
  }
  for (int s = blockIdx.x * blockDim.x + threadIdx.x; s <= axis.in; s += step) {
    int low = 0, high = axis.out;  // the first output whose source is s or beyond
    while (low < high) {
      const int middle = (low + high) / 2;
      if (axis_source(axis, align_corners, middle) < s)
        low = middle + 1;
      else
        high = middle;
    }
    axis.first[s] = low;
  }
}

template <class A>
__global__ void __launch_bounds__(kAxisThreads, 1) upsample_axis_kernel(const UpsampleArgs args) {
  fill_axis<A>(args.y, args.align_corners);
  fill_axis<A>(args.x, args.align_corners);
}

// A low-resolution position, and its calibrated logits.
template <class T>
struct LowPosition {
  using A = Accumulate<T>;
  const T* logits;  // class 0
  A c;

  __device__ __forceinline__ LowPosition(const UpsampleArgs& args, int64_t image, int y, int x)
      : logits(static_cast<const T*>(args.logits) + image * args.outer_stride + y * args.y_stride +
               x * args.x_stride),
        c(confidence_of<A>(args, (image * args.y.in + y) * args.x.in + x)) {}

  __device__ __forceinline__ A logit(const UpsampleArgs& args, int64_t j) const {
    return to_accumulate(load_one(logits + j * args.class_stride));
  }

  // u = (1 + c a) z + c b + o of the `count` classes from j on; a masked class kMasked, and so are
  // those beyond.
  template <int V>
  __device__ __forceinline__ void calibrate(const UpsampleArgs& args, int j, int count,
                                            A (&u)[V]) const {
    const T* from = logits + j * args.class_stride;
#pragma unroll
    for (int k = 0; k < V; ++k, from += args.class_stride) {
      u[k] = kMasked<A>;
      if (k < count) u[k] = to_accumulate(load_one(from));
    }
    if (args.scale) {
      const A* a = static_cast<const A*>(args.scale) + j;
      const A* b = static_cast<const A*>(args.bias) + j;
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (k < count) u[k] = calibrated(u[k], a[k], b[k], c);
    }
    if (args.prior) {
      const A* prior = static_cast<const A*>(args.prior) + j;
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (k < count) u[k] += prior[k];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) u[k] = u[k] < kMasked<A> ? kMasked<A> : u[k];
  }
};

// From a to b by `weight`.
template <class A>
__device__ __forceinline__ A interpolated(A a, A b, A weight) {
  return std::fma(weight, b - a, a);
}

}  // namespace disalign::cuda
