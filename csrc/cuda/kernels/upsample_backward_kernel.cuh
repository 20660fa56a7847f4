// Upsampling kernels, backward: the gradients of the low-resolution logits and their calibration.
//
// - upsample_factors_kernel: what the classes of an output position share, one thread a position.
// - upsample_backward_kernel: a block has a square of low-resolution positions ("nodes") and 32
//   classes, a class a lane. A cell is what lies between four nodes: a warp goes through the output
//   positions of a cell and keeps the cell's share of the gradient of its four nodes in registers.
//   Then each node adds the shares of the four cells around it, always in the same order: no
//   atomics, and no block writes what another adds to. Cells at the square's edge are computed by
//   each block that has a node of theirs.
// - Memory: the low-resolution logits around the square and their gradient; the factors of the
//   output positions, once for every 32 classes and square.
#pragma once

#include "cuda/kernels/upsample_grid.cuh"

namespace disalign::cuda {

constexpr int kUpsampleBackwardThreads = 256;
constexpr int kLanes = 32;  // classes of a block

template <class A>
constexpr int kNodes = sizeof(A) == 8 ? 4 : 8;  // along each side of a block's square
template <class A>
constexpr int kCells = kNodes<A> + 1;
template <class A>
constexpr int kAround = kNodes<A> + 2;  // nodes that the cells lie between

enum Corner { kUpperLeft, kUpperRight, kLowerLeft, kLowerRight, kCorners };

template <class A>
struct UpsampleMemory {
  static constexpr int kColumn =
      kLanes + 1;  // so that writing a node's neighbours is conflict-free
  static constexpr int kValues = kAround<A> * kAround<A> * kColumn;
  static constexpr int kShares = kCells<A> * kCells<A> * kCorners * kLanes;
  static constexpr int kBytes = (kValues + kShares) * static_cast<int>(sizeof(A));
  A* values;  // [kAround][kAround][kColumn]: u; then [kNodes][kNodes][kColumn]: gradients
  A* shares;  // [kCells][kCells][kCorners][kLanes]
};

// [4]: maximum, softmax, smooth, at_target of PositionFactors.
template <class T>
__global__ void __launch_bounds__(kUpsampleBackwardThreads, 1)
    upsample_factors_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  DISALIGN_SHARED_MEMORY(memory);
  A weights = 0;
  if (args.label_smoothing > 0)
    weights = weight_sum<A>(args, 0, static_cast<int>(args.classes), reinterpret_cast<A*>(memory));
  const A inverse = inverse_denominator<A>(args);
  const int64_t image_positions = int64_t{args.y.out} * args.x.out;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.positions();
       i += int64_t{gridDim.x} * blockDim.x) {
    const auto target_logit = [&](int t) -> TargetLogit<A> {
      const int64_t image = i / image_positions;
      const int rest = static_cast<int>(i % image_positions);
      const Neighbours<A> at(args, rest / args.x.out, rest % args.x.out);
      const A u = upsampled_logit<T>(args, image, at, t) - vector_entry<A>(args.margin, t, A(0));
      return {A(0), u};
    };
    const PositionFactors<A> at = position_factors(args, i, A(0), weights, inverse, target_logit);
    args.targets[i] = at.target;
    A* to = static_cast<A*>(args.factors) + 4 * i;
    to[0] = at.maximum, to[1] = at.softmax, to[2] = at.smooth, to[3] = at.at_target;
  }
}

// A block's square, its classes and its place in memory.
template <class T>
struct Square {
  using A = Accumulate<T>;
  int64_t image;
  int y, x;  // of its first node
  int chunk, class_begin;
  int lane, warp, warps;

  __device__ __forceinline__ Square(const UpsampleArgs& args, int64_t square)
      : chunk(blockIdx.y),
        class_begin(chunk * kLanes),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        warps(blockDim.x / 32) {
    const int across = (args.x.in + kNodes<A> - 1) / kNodes<A>;
    const int down = (args.y.in + kNodes<A> - 1) / kNodes<A>;
    image = square / (int64_t{across} * down);
    const int rest = static_cast<int>(square % (int64_t{across} * down));
    y = rest / across * kNodes<A>;
    x = rest % across * kNodes<A>;
  }

  // The calibrated logits of the square and of the nodes around it; at the logits' edge those
  // beyond repeat the last, where their weight is 0. Neighbouring threads read neighbouring nodes.
  __device__ __forceinline__ void load(const UpsampleArgs& args, A* values) const {
    constexpr int kAll = kAround<A> * kAround<A>;
    for (int i = threadIdx.x; i < kAll * kLanes; i += blockDim.x) {
      const int node = i % kAll, k = i / kAll, j = class_begin + k;
      if (j >= args.classes) continue;
      const int at_y = min(max(y - 1 + node / kAround<A>, 0), args.y.in - 1);
      const int at_x = min(max(x - 1 + node % kAround<A>, 0), args.x.in - 1);
      values[node * UpsampleMemory<A>::kColumn + k] =
          LowPosition<T>(args, image, at_y, at_x).calibrated(args, j);
    }
  }

  // The shares of a cell's corners in class j, over the output positions of the cell.
  __device__ __forceinline__ void cell(const UpsampleArgs& args, int j, int cell_y, int cell_x,
                                       const A* values, A (&shares)[kCorners]) const {
    const int source_y = y - 1 + cell_y, source_x = x - 1 + cell_x;
    if (source_y < 0 || source_y >= args.y.in || source_x < 0 || source_x >= args.x.in) return;
    const A* upper = values + (cell_y * kAround<A> + cell_x) * UpsampleMemory<A>::kColumn + lane;
    const A* lower = upper + kAround<A> * UpsampleMemory<A>::kColumn;
    const A upper_left = upper[0], upper_right = upper[UpsampleMemory<A>::kColumn];
    const A lower_left = lower[0], lower_right = lower[UpsampleMemory<A>::kColumn];
    const A w = args.label_smoothing > 0 ? vector_entry<A>(args.weight, j, A(1)) : A(0);
    const A m = vector_entry<A>(args.margin, j, A(0));
    const int last_y = args.y.first[source_y + 1], last_x = args.x.first[source_x + 1];
    for (int out_y = args.y.first[source_y]; out_y < last_y; ++out_y) {
      const A down = static_cast<const A*>(args.y.weight)[out_y];
      const int64_t row = (image * args.y.out + out_y) * args.x.out;
      A left = 0, right = 0;
      for (int out_x = args.x.first[source_x]; out_x < last_x; ++out_x) {
        const int t = args.targets[row + out_x];
        if (t < 0) continue;
        const A* at = static_cast<const A*>(args.factors) + 4 * (row + out_x);
        const A across = static_cast<const A*>(args.x.weight)[out_x];
        A u = between(upper_left, upper_right, lower_left, lower_right, down, across);
        if (j == t) u -= m;
        A q = at[1] * exponential(u - at[0]) - at[2] * w;
        if (j == t) q -= at[3];
        left += q * (A(1) - across);
        right += q * across;
      }
      shares[kUpperLeft] += left * (A(1) - down);
      shares[kUpperRight] += right * (A(1) - down);
      shares[kLowerLeft] += left * down;
      shares[kLowerRight] += right * down;
    }
  }

  // The gradient of the node's u in this lane's class.
  __device__ __forceinline__ A gather(const A* shares, int node_y, int node_x) const {
    const auto share = [&](int cell_y, int cell_x, int corner) {
      return shares[((cell_y * kCells<A> + cell_x) * kCorners + corner) * kLanes + lane];
    };
    return share(node_y, node_x, kLowerRight) + share(node_y, node_x + 1, kLowerLeft) +
           share(node_y + 1, node_x, kUpperRight) + share(node_y + 1, node_x + 1, kUpperLeft);
  }
};

template <class T>
__global__ void __launch_bounds__(kUpsampleBackwardThreads, 1)
    upsample_backward_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  constexpr int kColumn = UpsampleMemory<A>::kColumn;
  DISALIGN_SHARED_MEMORY(raw_memory);
  UpsampleMemory<A> memory;
  memory.values = reinterpret_cast<A*>(raw_memory);
  memory.shares = memory.values + UpsampleMemory<A>::kValues;
  const int64_t squares = args.outer * ((args.y.in + kNodes<A> - 1) /
                                        kNodes<A>)*((args.x.in + kNodes<A> - 1) / kNodes<A>);
  A scale_sum = 0, bias_sum = 0;

  for (int64_t s = blockIdx.x; s < squares; s += gridDim.x) {
    const Square<T> square(args, s);
    const int lane = square.lane, j = square.class_begin + lane;
    const bool own = j < args.classes;
    square.load(args, memory.values);
    __syncthreads();
    for (int c = square.warp; c < kCells<A> * kCells<A>; c += square.warps) {
      A shares[kCorners] = {};
      if (own) square.cell(args, j, c / kCells<A>, c % kCells<A>, memory.values, shares);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner)
        memory.shares[(c * kCorners + corner) * kLanes + lane] = shares[corner];
    }
    __syncthreads();
    for (int n = square.warp; n < kNodes<A> * kNodes<A>; n += square.warps) {
      const int y = square.y + n / kNodes<A>, x = square.x + n % kNodes<A>;
      if (y >= args.y.in || x >= args.x.in) continue;
      A g = own ? square.gather(memory.shares, n / kNodes<A>, n % kNodes<A>) : A(0);
      if (args.confidence) {
        const LowPosition<T> low(args, square.image, y, x);
        const A a = own ? static_cast<const A*>(args.scale)[j] : A(0);
        if (args.class_gradients || args.confidence_sums) {
          const A b = own ? static_cast<const A*>(args.bias)[j] : A(0);
          const A z = own ? low.logit(args, j) : A(0);
          scale_sum += g * low.c * (z == negative_infinity<A>() ? A(0) : z);
          bias_sum += g * low.c;
          A slope = g * finite_or_zero(a * z + b);
          for (int distance = 16; distance > 0; distance /= 2)
            slope += __shfl_xor_sync(kFullWarp, slope, distance);
          if (args.confidence_sums && lane == 0)
            static_cast<A*>(args.confidence_sums)[square.chunk * args.low_positions() +
                                                  (square.image * args.y.in + y) * args.x.in + x] =
                low.c * (A(1) - low.c) * slope;
        }
        g *= a * low.c + A(1);
      }
      memory.values[n * kColumn + lane] = g;  // nobody reads u any more
    }
    __syncthreads();
    if (args.grad_logits) {
      constexpr int kAll = kNodes<A> * kNodes<A>;
      for (int i = threadIdx.x; i < kAll * kLanes; i += blockDim.x) {
        const int n = i % kAll, k = i / kAll;
        const int y = square.y + n / kNodes<A>, x = square.x + n % kNodes<A>;
        if (y >= args.y.in || x >= args.x.in || square.class_begin + k >= args.classes) continue;
        store_one(static_cast<T*>(args.grad_logits) + square.image * args.grad_outer_stride +
                      (square.class_begin + k) * args.grad_class_stride + y * args.grad_y_stride +
                      x * args.grad_x_stride,
                  from_accumulate<T>(memory.values[n * kColumn + k]));
      }
    }
    __syncthreads();
  }
  if (!args.class_gradients) return;
  // The warps' sums, in their order.
  memory.shares[2 * threadIdx.x] = scale_sum;
  memory.shares[2 * threadIdx.x + 1] = bias_sum;
  __syncthreads();
  const int64_t j = int64_t{blockIdx.y} * kLanes + threadIdx.x % 32;
  if (threadIdx.x >= 2 * kLanes || j >= args.classes) return;
  const int which = threadIdx.x / kLanes;
  A sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp)
    sum += memory.shares[2 * (warp * 32 + threadIdx.x % 32) + which];
  static_cast<A*>(args.class_sums)[(2 * blockIdx.x + which) * args.classes + j] = sum;
}

// A contiguous gradient over the logits: while blocks still read their neighbours' logits, none may
// write its own.
template <class T>
__global__ void __launch_bounds__(kUpsampleBackwardThreads, 1)
    upsample_overwrite_kernel(const UpsampleArgs args) {
  const int64_t all = args.low_positions() * args.classes;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t x = i % args.x.in, y = i / args.x.in % args.y.in;
    const int64_t plane = i / (int64_t{args.x.in} * args.y.in);
    T* to = static_cast<T*>(const_cast<void*>(args.logits)) +
            plane / args.classes * args.outer_stride + plane % args.classes * args.class_stride +
            y * args.y_stride + x * args.x_stride;
    store_one(to, load_one(static_cast<const T*>(args.grad_logits) + i));
  }
}

}  // namespace disalign::cuda
