// Upsampling kernels, backward: the gradients of the low-resolution logits and their calibration.
//
// - upsample_backward_kernel: a block has tiles of upsample_tile.cuh. A thread goes over the classes
//   and adds what its outputs give to the two low-resolution rows, per column; then threads add the
//   columns, each those around a low-resolution position ("node"), of a few classes at a time.
// - upsample_nodes_kernel: a thread a node. Adds what the tiles around have for it, always in the
//   same order: no atomics. Makes of it the gradients of the logits and of their calibration.
// - Memory: the low-resolution logits around the tiles, the target once; for the nodes of each tile
//   one number of the arithmetic a class, written and read; the logits and their gradient, which may
//   be the logits.
#pragma once

#include "cuda/kernels/upsample_tile.cuh"

namespace disalign::cuda {

constexpr int kUpsampleExchanged = kUpsampleThreads / kNodeThreads;  // class vectors at a time
constexpr int kNodeClasses = 8;  // of a block of upsample_nodes_kernel

// The smallest number with all digits: `reciprocal` takes lesser ones for 0.
template <class A>
constexpr A kSmallest = std::numeric_limits<A>::min();

// Shared memory of which a thread's factors and the columns' sums have their turns.
template <class A, int Rows>
struct UpsampleExchange {
  static constexpr int V = kVector<A>;
  static constexpr int kSlots = 32 + 32 / 8;  // so that cells 4 or 8 columns apart do not collide
  static constexpr int kEntries = kUpsampleExchanged * kUpsampleWarps * 2 * kSlots * V;
  enum Factor { kShift, kSoftmax, kOfTarget, kTarget, kFactors };
  static constexpr int kOwn = kFactors * Rows * kUpsampleThreads;
  static constexpr int kZeros = kSlots * V;
  static constexpr int kBytes =
      (32 + kZeros + (kEntries > kOwn ? kEntries : kOwn)) * static_cast<int>(sizeof(A));
  A* across;  // [32]: the columns' weights
  A* zeros;   // the sums of a warp that there is not
  A* memory;

  __device__ __forceinline__ explicit UpsampleExchange(A* from)
      : across(from), zeros(from + 32), memory(zeros + kZeros) {
    for (int i = threadIdx.x; i < kZeros; i += blockDim.x) zeros[i] = 0;
  }
  __device__ __forceinline__ A& own(Factor factor, int r) const {
    return memory[(factor * Rows + r) * kUpsampleThreads + threadIdx.x];
  }
  __device__ __forceinline__ int& own_target(int r) const {
    return reinterpret_cast<int&>(own(kTarget, r));
  }
  // Of a class vector, a warp's upper (0) or lower (1) row: V sums for each column's slot.
  __device__ __forceinline__ A* sums(int vector, int warp, int row) const {
    return memory + ((vector * kUpsampleWarps + warp) * 2 + row) * kSlots * V;
  }
  static __device__ __forceinline__ int slot(unsigned column) { return (column + column / 8) * V; }
};

// A node of the tile and the columns around it.
struct UpsampleNode {
  int row, column;         // of the tile's
  int begin, middle, end;  // columns of the cells before and after it

  template <class T>
  __device__ __forceinline__ UpsampleNode(const UpsampleArgs& args, const UpsampleTile<T>& tile,
                                          int node)
      : row(node / tile.low_width), column(node - row * tile.low_width) {
    const int x = tile.low_x + column, last = min(args.tile_width, args.x.out - tile.column);
    const auto first_of = [&](int source) {
      return min(max(args.x.first[min(max(source, 0), args.x.in)] - tile.column, 0), last);
    };
    begin = first_of(x - 1), middle = first_of(x), end = first_of(x + 1);
  }

  // Of a class vector, the sums over the columns, by how near they are: of its band those of the
  // upper rows, of the band before those of the lower rows.
  template <class Exchange, class A, int V>
  __device__ __forceinline__ void add(const UpsampleArgs& args, const Exchange& exchange,
                                      int vector, A (&sum)[V]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] = 0;
    for (int w = row * args.warps_of_band; w < (row + 1) * args.warps_of_band; ++w) {
      const int before = w - args.warps_of_band;
      const A* upper = w < kUpsampleWarps ? exchange.sums(vector, w, 0) : exchange.zeros;
      const A* lower = before >= 0 ? exchange.sums(vector, before, 1) : exchange.zeros;
      for (int c = begin; c < end; ++c) {
        const A across = exchange.across[c], near = c < middle ? across : A(1) - across;
        A from_upper[V], from_lower[V];
        load_shared(upper + Exchange::slot(c), from_upper);
        load_shared(lower + Exchange::slot(c), from_lower);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] = std::fma(near, from_upper[k] + from_lower[k], sum[k]);
      }
    }
  }
};

// Of so many class vectors from `first` on, the columns' sums to the nodes of tile t, over or, of a later
// round, on those that are there. By the whole block, a slot's threads for each class vector.
template <class T, class Exchange>
__device__ __forceinline__ void add_columns(const UpsampleArgs& args, const Exchange& exchange,
                                            const UpsampleTile<T>& tile,
                                            const UpsampleNode& first_node, int64_t t, int first,
                                            int count, bool on_sums) {
  using A = Accumulate<T>;
  constexpr int V = kVector<A>;
  const int slot = threadIdx.x / kNodeThreads, nodes = (args.bands + 1) * tile.low_width;
  if (slot >= count) return;
  A* to_tile =
      static_cast<A*>(args.node_sums) + t * tile.vectors * (args.bands + 1) * args.tile_nodes * V;
  UpsampleNode node = first_node;
  for (int n = threadIdx.x % kNodeThreads; n < nodes; n += kNodeThreads) {
    if (n >= kNodeThreads) node = UpsampleNode(args, tile, n);
    A sum[V];
    node.add(args, exchange, slot, sum);
    const int64_t row = int64_t{first + slot} * (args.bands + 1) + node.row;
    A* to = to_tile + (row * args.tile_nodes + node.column) * V;
    if (on_sums) {
      A before[V];
      load_shared(to, before);
#pragma unroll
      for (int k = 0; k < V; ++k) sum[k] += before[k];
    }
    store_shared(to, sum);
  }
}

template <class T, int Rows>
__global__ void __launch_bounds__(kUpsampleThreads, kUpsampleBlocks<T>)
    upsample_backward_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<A>;
  using Exchange = UpsampleExchange<A, Rows>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const Exchange exchange(reinterpret_cast<A*>(raw_memory));
  A* memory = reinterpret_cast<A*>(raw_memory + Exchange::kBytes);
  const RowOptions<A> options(args);
  const bool smoothing = options.label_smoothing > 0, margin = args.margin;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, static_cast<int>(args.classes), memory);
    __syncthreads();
  }
  const A scale = shared_scale(args, inverse_denominator<A>(args));

  for (int64_t t = blockIdx.x; t < args.tiles(); t += gridDim.x) {
    const UpsampleTile<T> tile(args, static_cast<int>(t));
    const int pitch = tile.pitch(args), rounds = tile.rounds(args, Rows);
    bool staged = false, finite = true;
    if (threadIdx.x < 32 && tile.column + lane < args.x.out)
      exchange.across[lane] = static_cast<const A*>(args.x.weight)[tile.column + lane];
    for (int round = 0; round < rounds; ++round) {
      const UpsampleOutputs<T, Rows> out(args, tile, round);
      int target[Rows];
      out.read_targets(args, target);
#pragma unroll
      for (int r = 0; r < Rows; ++r) exchange.own_target(r) = target[r];
      // In a loop, as its code would be too long for each output. Of an ignored one, softmax is 0.
      bool exact = false;
      A smooth = 0, smooth_down = 0;
      const auto keep_factors = [&](int first, int count) {
        int64_t i = out.position;
#pragma unroll 1
        for (int r = 0; r < Rows; ++r, i += args.x.out) {
          const int j = exchange.own_target(r), k = max(j, 0) - first * V;
          if (static_cast<unsigned>(k) >= static_cast<unsigned>(count * V)) continue;
          PositionFactors<A> at;
          A of_target = 0;
          if (j >= 0) {
            const A down = static_cast<const A*>(args.y.weight)[out.y + r];
            A u = 0;
            if (margin || options.focal_gamma > 0)
              u = out.logit(memory, pitch, k, down) - vector_entry<A>(args.margin, j, A(0));
            at =
                position_factors(args, options, i, j, A(0), weights, gradient_scale(args, i, scale),
                                 [&](int) -> TargetLogit<A> { return {A(0), u}; });
            exact = exact || !is_near(at.maximum);
            of_target = at.at_target;
            if (margin)  // else the exponential is that of any class
              of_target = std::fabs(at.softmax) < kSmallest<A>
                              ? A(0)
                              : exponential(u - at.maximum) - at.at_target * reciprocal(at.softmax);
            if (!margin && is_near(at.maximum)) at.softmax *= correction(at.maximum);
            smooth += at.smooth;
            smooth_down += at.smooth * down;
          }
          exchange.own(Exchange::kShift, r) = at.maximum;
          exchange.own(Exchange::kSoftmax, r) = at.softmax;
          exchange.own(Exchange::kOfTarget, r) = of_target;
        }
      };
      finite = tile.for_staged(args, memory, staged, keep_factors) && finite;
      A shift[Rows], softmax[Rows], softmax_down[Rows], of_target[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        shift[r] = exchange.own(Exchange::kShift, r);
        softmax[r] = exchange.own(Exchange::kSoftmax, r);
        of_target[r] = exchange.own(Exchange::kOfTarget, r);
      }
      // Also a barrier: what others have kept may be written over. Where a logit is not finite, the
      // exponential of an ignored output is not 0.
      const bool direct = __syncthreads_or(exact || margin || !finite);
      if (!direct) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) shift[r] = shift_product(shift[r]);
      }
#pragma unroll
      for (int r = 0; r < Rows; ++r) softmax_down[r] = softmax[r] * out.down[r];

      // Of a class vector, what this thread's outputs give to the two rows in its column.
      const auto add_outputs = [&](int j, const A* from, int slot, auto exponential_of) {
        A upper[V], difference[V], sum[V], lower[V];
        out.at_column(from, upper, difference);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          sum[k] = 0, lower[k] = 0;
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            const A e = exponential_of(std::fma(out.down[r], difference[k], upper[k]), r, j + k);
            sum[k] = std::fma(softmax[r], e, sum[k]);
            lower[k] = std::fma(softmax_down[r], e, lower[k]);
          }
        }
        if (smoothing) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            if (j + k >= args.classes) continue;
            const A w = vector_entry<A>(args.weight, j + k, A(1));
            sum[k] -= w * smooth;
            lower[k] -= w * smooth_down;
          }
        }
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] -= lower[k];
        store_shared(exchange.sums(slot, warp, 0) + Exchange::slot(lane), sum);
        store_shared(exchange.sums(slot, warp, 1) + Exchange::slot(lane), lower);
      };
      // Takes the targets' terms off those of the class vectors from `first` on.
      const auto subtract_targets = [&](int first, int count) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const int k = target[r] - first * V;  // of an ignored one negative
          if (static_cast<unsigned>(k) >= static_cast<unsigned>(count * V)) continue;
          const int slot = k / V, at = Exchange::slot(lane) + k % V;
          const A lower = of_target[r] * out.down[r];
          exchange.sums(slot, warp, 0)[at] -= of_target[r] - lower;
          exchange.sums(slot, warp, 1)[at] -= lower;
        }
      };
      const UpsampleNode first_node(args, tile, threadIdx.x % kNodeThreads);
      tile.for_staged(args, memory, staged, [&](int first, int count) {
        for (int begin = 0; begin < count; begin += kUpsampleExchanged) {
          const int some = min(count - begin, kUpsampleExchanged);
          const A* from = memory + begin * pitch;
          for (int slot = 0; slot < some; ++slot, from += pitch) {
            const int j = (first + begin + slot) * V;
            if (!direct) {
              add_outputs(j, from, slot,
                          [&](A u, int r, int) { return shifted_exponential(u, shift[r]); });
            } else {
              add_outputs(j, from, slot, [&](A u, int r, int k) -> A {
                if (margin && k == target[r]) return of_target[r];
                if (target[r] < 0) return 0;
                return margin || !is_near(shift[r])
                           ? exponential(u - shift[r])
                           : shifted_exponential(u, shift_product(shift[r]));
              });
            }
          }
          if (!margin) subtract_targets(first + begin, some);
          __syncthreads();
          add_columns<T>(args, exchange, tile, first_node, t, first + begin, some, round > 0);
          __syncthreads();
        }
      });
    }
  }
}

// K class vectors of one node and of the tiles around it, added.
template <class T, int K>
__device__ __forceinline__ void add_tiles(const UpsampleArgs& args, int64_t image, int y, int x,
                                          int first_vector,
                                          Accumulate<T> (&g)[K * kVector<Accumulate<T>>]) {
  using A = Accumulate<T>;
  constexpr int V = kVector<A>;
#pragma unroll
  for (int k = 0; k < K * V; ++k) g[k] = 0;
  const int begin = args.x.first[max(x - 1, 0)], end = args.x.first[x + 1];
  const int64_t vectors = (args.classes + V - 1) / V;
  const int nodes = (args.bands + 1) * args.tile_nodes;
  for (int down = max(y - 1, 0) / args.bands; down <= y / args.bands; ++down) {
    if (begin == end) continue;  // no outputs around
    for (int across = begin / args.tile_width; across * args.tile_width < end; ++across) {
      const int64_t tile = (image * args.tiles_down + down) * args.tiles_across + across;
      const int low_x = args.x.source[across * args.tile_width];
      const A* from = static_cast<const A*>(args.node_sums) +
                      ((tile * vectors + first_vector) * nodes +
                       (y - down * args.bands) * args.tile_nodes + (x - low_x)) *
                          V;
#pragma unroll
      for (int n = 0; n < K; ++n) {
        if (first_vector + n >= vectors) continue;
        A of_tile[V];
        load_shared(from + n * nodes * V, of_tile);
#pragma unroll
        for (int k = 0; k < V; ++k) g[n * V + k] += of_tile[k];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kUpsampleThreads, 1)
    upsample_nodes_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  constexpr int C = kNodeClasses, K = C / kVector<A>;
  DISALIGN_SHARED_MEMORY(memory);
  const int first = blockIdx.y * C;  // class
  const int classes = min(static_cast<int>(args.classes) - first, C);
  const int64_t image_nodes = int64_t{args.y.in} * args.x.in;
  A scale_sums[C] = {}, bias_sums[C] = {};
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.low_positions();
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t image = i / image_nodes;
    const int rest = static_cast<int>(i % image_nodes);
    const int y = rest / args.x.in, x = rest % args.x.in;
    A g[C];
    add_tiles<T, K>(args, image, y, x, first / kVector<A>, g);
    const LowPosition<T> low(args, image, y, x);
    T* to = static_cast<T*>(args.grad_logits) + image * args.grad_outer_stride +
            first * args.grad_class_stride + y * args.grad_y_stride + x * args.grad_x_stride;
    A slope = 0;
#pragma unroll
    for (int k = 0; k < C; ++k) {
      if (k >= classes) continue;
      if (args.scale) {
        const A a = static_cast<const A*>(args.scale)[first + k];
        if (args.class_gradients || args.confidence_sums) {
          const A b = static_cast<const A*>(args.bias)[first + k], z = low.logit(args, first + k);
          scale_sums[k] += g[k] * low.c * (z == negative_infinity<A>() ? A(0) : z);
          bias_sums[k] += g[k] * low.c;
          slope += g[k] * finite_or_zero(a * z + b);
        }
        g[k] *= a * low.c + A(1);
      }
      if (args.grad_logits) store_one(to + k * args.grad_class_stride, from_accumulate<T>(g[k]));
    }
    if (args.confidence_sums)
      static_cast<A*>(args.confidence_sums)[blockIdx.y * args.low_positions() + i] =
          low.c * (A(1) - low.c) * slope;
  }
  if (!args.class_gradients) return;
  A* sums = static_cast<A*>(args.class_sums) + 2 * blockIdx.x * args.classes + first;
  A* scratch = reinterpret_cast<A*>(memory);
#pragma unroll
  for (int k = 0; k < C; ++k) {
    if (k >= classes) continue;
    const A scale = block_sum(scale_sums[k], scratch);
    const A bias = block_sum(bias_sums[k], scratch + kUpsampleWarps);
    if (threadIdx.x == 0) sums[k] = scale, sums[args.classes + k] = bias;
    __syncthreads();
  }
}

}  // namespace disalign::cuda
