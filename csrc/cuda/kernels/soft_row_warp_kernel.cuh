// Row kernels whose targets are class probabilities, of rows that a warp keeps in its registers, or,
// Wide, the warps of a block or of a cluster's blocks (sm_90 and newer), or of which a block keeps a
// tile. Forward, forward with the gradient of the logits, and backward are one kernel. Of logits
// without calibration: class sums need more registers (soft_row_sums_kernel.cuh).
//
// - Maps: row_warp_tile.cuh. A lane has the same classes of the logits, of the probabilities and of the
//   gradient. Several warps a scheduler have rows on their way while others compute. By blocks alone:
//   vectors of the probabilities and of the gradient that do not lie like those of the logits.
// - Forward: the maximum of u, then the sums (soft_position.cuh), by one reduction each: of shuffles
//   where a warp has a row. Backward has both from forward. Of a row of tiles soft_combine_kernel adds
//   them, and gradients are a second launch's.
// - What is of a row alone (sample weight; loss, statistics) is read and made by one lane for 32 rows of
//   the warp at a time, one a lane: a turn. Wide, every warp reads, the first one writes.
// - Memory: one read of logits and probabilities, one write of the gradient, which may be the logits: a
//   lane has read a vector before it writes it, and needs no other of the row. Tiles are read again for
//   their gradients.
#pragma once

#include "cuda/kernels/row_details.cuh"
#include "cuda/kernels/row_warp_tile.cuh"
#include "cuda/kernels/soft_position.cuh"

namespace disalign::cuda {

// Vectors of the logits that a lane keeps, with as many elements of the probabilities: for 168
// registers a thread, or, Wide, 128.
template <class T, int By>
constexpr int kSoftWarpVectors = (By == kByWarp ? 40 : 32) / kVector<T>;
template <int By>
constexpr int kSoftWarpThreads = By == kByWarp ? 128 : 512;
constexpr int kSoftMostWarps = kSoftWarpThreads<kByBlock> / 32;
template <class A, int By>
using SoftWarpGroup = std::conditional_t<By == kByCluster, ClusterGroup<A, kSoftMostWarps, 3>,
                                         Group<A, By != kByWarp, kSoftMostWarps>>;
// What a lane keeps of its row of a turn, in shared memory: of each warp with rows of its own.
constexpr int kSoftTurnEntries = 4 * 32;
// Bytes of shared memory before the class vectors.
template <class A, int By>
constexpr int kSoftWarpScratchBytes =
    kWarpSumsBytes + (SoftWarpGroup<A, By>::kScratchEntries +
                      kSoftTurnEntries * (By == kByWarp ? kSoftWarpThreads<By> / 32 : 1)) *
                         static_cast<int>(sizeof(A));

// Whether b_j is more than y_j: then weights lie in shared memory, 1 where there are none.
static __host__ __device__ inline bool soft_weighs(const LossArgs& args) {
  return args.weight || args.share != 0;
}
// Class vectors in shared memory.
static __host__ __device__ inline int soft_class_vectors(const LossArgs& args) {
  return (args.scale ? 2 : 0) + (args.prior ? 1 : 0) + (soft_weighs(args) ? 1 : 0);
}

// Vectors that every lane has: a row that a narrow group does not keep has more than 32 * kElements
// elements, fewer than two vectors of them at its edges.
template <class T, int By>
constexpr int kSoftCertain = By == kByWarp ? kElements<T> / kVector<T> - 1 : 0;

// A row's y_j of this lane, that at the row's edges last; 0 of what the lane has not.
template <class Y, class T, int K, int By>
__device__ __forceinline__ void load_probabilities(const RowArgs& args,
                                                   const WarpTile<T, K, By>& tile, int64_t i,
                                                   Accumulate<T> (&b)[K * kVector<T> + 1]) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, W = kVector<Y>;  // a vector of T is one or two of Y
  const Y* row = static_cast<const Y*>(args.probabilities) + i * args.probability_outer_stride;
  b[K * V] = tile.edge >= 0 ? to_accumulate(load_one(row + tile.edge)) : A(0);
  const Y* first = row + tile.first();
  if (By == kByBlock && reinterpret_cast<uintptr_t>(first) % kVectorBytes != 0) {
#pragma unroll
    for (int p = 0; p < K * V; ++p)
      b[p] = tile.has(p / V) ? to_accumulate(load_one(first + p / V * 32 * V + p % V)) : A(0);
    return;
  }
  Raw raw[K * V / W];
#pragma unroll
  for (int n = 0; n < K * V / W; ++n) {
    const int k = n * W / V;
    if (k >= kSoftCertain<T, By>) raw[n] = {};
    if (k < kSoftCertain<T, By> || tile.has(k))
      raw[n] = load_vector(first + 32 * k * V + n * W % V);
  }
#pragma unroll
  for (int n = 0; n < K * V / W; ++n) {
    A y[W];
    unpack_vector<Y>(raw[n], y);
#pragma unroll
    for (int w = 0; w < W; ++w) b[n * W + w] = y[w];
  }
}

// By: who keeps a row; of several warps each has its part of it.
template <class T, int By>
__global__ void __launch_bounds__(kSoftWarpThreads<By>, By == kByWarp ? 3 : 1)
    soft_row_warp_kernel(const RowArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (By == kByCluster) {  // not launched: these devices have no clusters
    __trap();
    return;
  }
#endif
  constexpr bool Wide = By != kByWarp;
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>;
  constexpr int K = kSoftWarpVectors<T, By>, P = K * V;
  DISALIGN_SHARED_MEMORY(memory);
  const WarpTile<T, K, By> tile(args, Team<false, By>(), Wide ? blockIdx.y : 0);
  const bool tiled = By == kByBlock && args.tiles > 1;
  const int lane = tile.lane;
  A* class_memory = reinterpret_cast<A*>(memory + kSoftWarpScratchBytes<A, By>) +
                    (Wide ? tile.warp * soft_class_vectors(args) * 32 * P : 0);
  const bool weighs = soft_weighs(args);
  const ClassVectors<T> classes(args, tile, class_memory, weighs);
  // Those of one vector, after so many others: a pointer is made where it is used, as registers are few.
  const auto load_class = [&](int before, int part, A(&out)[Q]) {
    classes.load(class_memory + before * 32 * P, lane + 32 * (part / N), part % N, out);
  };
  const bool has_edge = tile.edge >= 0;
  BlockSums block_sums(reinterpret_cast<double*>(memory), Wide ? 1 : blockDim.x / 32);
  SoftWarpGroup<A, By> group(By == kByCluster ? args.tiles : 32,
                             reinterpret_cast<A*>(memory + kWarpSumsBytes));
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  if (args.backward && !writes_logits) return;
  const A scale = args.backward      ? shared_scale(args, inverse_denominator<A>(args))
                  : args.grad_logits ? inverse_of<A>(forward_denominator(args))
                                     : A(1);

  A own_weight = 0;  // of the samples: of this lane's row of the turn
  // Its sums; a lane reads what it has written.
  A* own_sums = reinterpret_cast<A*>(memory + kWarpSumsBytes) +
                SoftWarpGroup<A, By>::kScratchEntries + (Wide ? 0 : tile.warp * kSoftTurnEntries) +
                lane;
#pragma unroll 1
  for (int round = 0; round < tile.rounds; ++round) {
    const int at_turn = round % 32;
    const int64_t i = tile.row_at(round);
    if (at_turn == 0 && !args.backward) {
      const int64_t own = tile.row_at(round + lane);
      own_weight = own < args.outer ? vector_entry<A>(args.sample_weight, own, A(1)) : A(0);
    }

    A e[P + 1], b[P + 1];  // u, then exp(u - shift); b_j; the last: the edge's
    {
      const T* row = static_cast<const T*>(args.logits) + i * args.outer_stride;
      Raw raw[K];
      Raw nothing;  // what is not the row's own is -inf: its exponential is 0
#pragma unroll
      for (int v = 0; v < V; ++v)
        set_element(nothing, v, from_accumulate<T>(negative_infinity<A>()));
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k >= kSoftCertain<T, By>) raw[k] = nothing;
        if (k < kSoftCertain<T, By> || tile.has(k))
          raw[k] = load_vector(row + tile.first() + 32 * k * V);
      }
      e[P] = has_edge ? to_accumulate(load_one(row + tile.edge)) : negative_infinity<A>();
      if (sizeof(T) == 2 && !args.probabilities_of_a)
        load_probabilities<T>(args, tile, i, b);
      else
        load_probabilities<A>(args, tile, i, b);
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A z[Q];
        unpack<T>(raw[part / N], part % N, z);
#pragma unroll
        for (int q = 0; q < Q; ++q) e[part * Q + q] = z[q];
      }
    }
    if (args.prior) {
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A o[Q];
        load_class(weighs ? 1 : 0, part, o);
#pragma unroll
        for (int q = 0; q < Q; ++q) e[part * Q + q] += o[q];
      }
      if (has_edge) e[P] += static_cast<const A*>(args.prior)[tile.edge];
    }
    if (weighs) {
      const SoftOptions<A> options(args);
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A w[Q];  // 0 of what is not the row's own
        load_class(0, part, w);
#pragma unroll
        for (int q = 0; q < Q; ++q) b[part * Q + q] = w[q] * options.of(b[part * Q + q]);
      }
      if (has_edge) b[P] = vector_entry<A>(args.weight, tile.edge, A(1)) * options.of(b[P]);
    }

    SoftFactors<A> row;
    if (args.backward) {
      row = soft_factors(args, i, scale);
#pragma unroll
      for (int p = 0; p <= P; ++p) e[p] = exponential(e[p] - row.shift);
    } else {
      if (args.details)
        write_soft_details<true, P + 1>(
            args, e, kLowest<A>, [&](int p) { return tile.class_of(p); }, group, i,
            tile.block_of_row, tiled, lane == 0 && (tiled ? tile.warp == 0 : tile.is_first()));
      PositionSums<A> sums;
#pragma unroll
      for (int p = 0; p <= P; ++p) sums.maximum = larger(sums.maximum, e[p]);
      sums.maximum = group.max(sums.maximum);
      A values[3] = {};
#pragma unroll
      for (int p = 0; p <= P; ++p) {
        const A below = e[p] - sums.maximum;
        e[p] = exponential(below);
        values[0] += e[p];
        if (b[p] != A(0)) values[1] = std::fma(b[p], below, values[1]);  // soft_term
        values[2] += b[p];
      }
      group.sum(values);
      sums.rest = values[0], sums.smooth = values[1], sums.weight = values[2];
      if (tiled) {
        if (threadIdx.x == 0)
          sums.write(static_cast<A*>(args.tile_sums) + tile.block_of_row * args.outer + i,
                     args.tiles * args.outer);
        continue;
      }
      row = soft_factors(sums, __shfl_sync(kFullWarp, own_weight, at_turn), true);
      row.softmax *= scale, row.smooth *= scale;
      if (lane == at_turn && tile.is_first()) {
        own_sums[0] = sums.maximum, own_sums[32] = sums.rest;
        own_sums[64] = sums.smooth, own_sums[96] = sums.weight;
      }
    }
    if (writes_logits) {
#pragma unroll
      for (int p = 0; p <= P; ++p) e[p] = row.softmax * e[p] - row.smooth * b[p];
      tile.made_anew().template store<By != kByBlock>(
          static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride, e);
    }

    if (args.backward || !tile.is_first() || (at_turn < 31 && round + 1 < tile.rounds)) continue;
    double loss = 0, divisor = 0;
    if (lane <= at_turn) {
      PositionSums<A> sums;
      sums.maximum = own_sums[0], sums.rest = own_sums[32];
      sums.smooth = own_sums[64], sums.weight = own_sums[96];
      loss = write_soft_position(args, tile.row_at(round - at_turn + lane), sums, own_weight);
      divisor = divisor_share(args, A(1), own_weight);
    }
    if (!args.block_sums) continue;
    loss = warp_sum(loss), divisor = warp_sum(divisor);
    if (lane == 0) block_sums.add(tile.warp, loss, divisor);
  }
  if (args.block_sums && !tiled && tile.block_of_row == 0) block_sums.write_and_finish<A>(args);
}

}  // namespace disalign::cuda
