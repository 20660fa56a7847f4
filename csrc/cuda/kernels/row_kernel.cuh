// Row kernels, forward: calibrated softmax cross-entropy over rows of logits.
//
// - Maps: row_tile.cuh. A group's vectors of a row stay in registers from the one read of them to
//   the class sums; the next row's are on their way meanwhile.
// - row_forward_kernel: the maximum of u, the exponentials and their sums, the row's loss, and with
//   these known the row's share of the gradients of scale, bias and confidence (position.cuh).
// - With details (row_details.cuh) it finds them before the target's logit is taken out of its place.
// - With more vectors than a block keeps each block sums a tile and row_combine_kernel adds the tiles;
//   class sums are then made by row_backward_kernel.cuh from a second read.
// - Memory: the logits are read once (but for that second read).
// - Whatever reduction divides by is known when all blocks are done: finish_kernel.cuh divides.
#pragma once

#include "cuda/kernels/position.cuh"
#include "cuda/kernels/row_details.cuh"
#include "cuda/kernels/row_tile.cuh"

namespace disalign::cuda {

// The sums of row i of a shard.
template <class A>
__device__ __forceinline__ void write_shard_sums(const LossArgs& args, int64_t i, bool valid,
                                                 const PositionSums<A>& sums) {
  const A values[kShardValues] = {sums.maximum, sums.rest, sums.target_logit, sums.target_slope,
                                  sums.smooth};
  A* to = static_cast<A*>(args.shard_sums) + i;
#pragma unroll
  for (int k = 0; k < kShardValues; ++k) to[k * args.outer] = valid ? values[k] : A(0);
}

template <class T>
struct FetchedRow {
  Raw raw[kKept<T>] = {};  // of an ignored row anything, of which nothing but details is made
  RowHead<Accumulate<T>> head;

  // turn: this lane's, of the rounds around this one.
  template <bool Wide>
  __device__ __forceinline__ void fetch(const RowArgs& args, const Tile<T, Wide>& tile,
                                        RowHead<Accumulate<T>>& turn, int round, int64_t i) {
    if (tile.turn_of(round) == 0) turn.read(args, tile.row_of_turn(i), args.details);
    head = turn.of_lane(tile.turn_of(round), tile.turns());
    if (is_valid(head.target) || (args.details && i < args.outer))
      tile.load(static_cast<const T*>(args.logits) + i * args.outer_stride, raw);
  }
};

template <class T, bool Calibrated, bool Wide>
__global__ void __launch_bounds__(Wide ? kWideThreads<T> : kNarrowThreads, 1)
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
  const bool writes_logits = args.grad_logits && !tiled;
  const A inverse = writes_logits ? inverse_of<A>(forward_denominator(args)) : A(1);
  const bool slopes = Calibrated && args.grad_confidence;
  const A* class_weight = static_cast<const A*>(args.weight);
  A grad_scale[kElements<T>] = {}, grad_bias[kElements<T>] = {};

  constexpr bool kAhead = !(Wide && Calibrated);
  RowHead<A> turn;
  FetchedRow<T> next;
  int64_t i = tile.row;
  if (tile.rounds > 0) next.fetch(args, tile, turn, 0, i);
  for (int round = 0; round < tile.rounds; ++round, i += tile.row_step) {
    if (!kAhead && round > 0) next.fetch(args, tile, turn, round, i);
    const FetchedRow<T> row = next;
    if (kAhead && round + 1 < tile.rounds)
      next.fetch(args, tile, turn, round + 1, i + tile.row_step);
    const int target = row.head.target;
    const bool valid = is_valid(target);
    A c = row.head.c;
    const int slot = tile.slot_of(target);

    PositionSums<A> sums;
    A e[kElements<T>];  // u, then exp(u - maximum), which is 0 of the target
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      A z[Q], u[Q];
      unpack<T>(row.raw[part / N], part % N, z);
      classes.template affine<Calibrated>(tile.vector(part / N), part % N, z, c, u);
#pragma unroll
      for (int q = 0; q < Q; ++q) e[part * Q + q] = u[q];
    }
    if (args.details) {
      RowDetails<A> found = row_details<false>(
          e, [&](int p) { return tile.vector(p / V) * V + p % V; }, args.entropy != nullptr, group);
      if (found.at >= 0) found.at += tile.first_class;
      if (tile.lane == 0 && i < args.outer) found.write(args, i, valid, blockIdx.y, tiled);
      if (!valid) c = 0;  // it has details, and no gradients
    }
    // The target's u, and d of its confidence. One thread of the group has them. Selects, no
    // branches on slot == p: in these the compiler would index the registers by slot, and move them
    // to memory.
    A target_terms[Calibrated ? 2 : 1] = {};
    if (slot >= 0) {
      A z_t = 0, u_t = 0;
#pragma unroll
      for (int p = 0; p < kElements<T>; ++p) {
        const bool here = p == slot;
        u_t = here ? e[p] : u_t;
        e[p] = here ? negative_infinity<A>() : e[p];
        if constexpr (Calibrated)
          z_t = here ? to_accumulate(element<T>(row.raw[p / V], p % V)) : z_t;
      }
      target_terms[0] = u_t - vector_entry<A>(args.margin, target, A(0));
      sums.maximum = larger(sums.maximum, target_terms[0]);
      if constexpr (Calibrated)
        target_terms[1] = finite_or_zero(static_cast<const A*>(args.scale)[target] * z_t +
                                         static_cast<const A*>(args.bias)[target]);
    }
#pragma unroll
    for (int p = 0; p < kElements<T>; ++p) sums.maximum = larger(sums.maximum, e[p]);
    sums.maximum = group.max(sums.maximum, slot >= 0, tile.has(target), target_terms);
    sums.target_logit = target_terms[0];
    if constexpr (Calibrated) sums.target_slope = target_terms[1];

    if (smoothing) {
#pragma unroll
      for (int part = 0; part < kParts<T>; ++part) {
        const int k = part / N, first = part * Q;
        A w[Q], d[Q] = {};
        classes.load(classes.weight, tile.vector(k), part % N, w);
        if constexpr (Calibrated) {
          A z[Q];
          unpack<T>(row.raw[k], part % N, z);
          if (slopes) classes.slope(tile.vector(k), part % N, z, d);
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          // What is not the row's own is -inf, and would add 0 * -inf; the target is added below.
          const bool own = first + q != slot && tile.vector(k) < tile.vectors &&
                           tile.own(tile.class_of(k) + part % N * Q + q);
          sums.smooth += own ? w[q] * (e[first + q] - sums.maximum) : A(0);
          sums.smooth_slope += w[q] * d[q];
        }
      }
    }
    const A correction = make_exponentials(e, sums.maximum);
#pragma unroll
    for (int p = 0; p < kElements<T>; ++p) sums.rest += e[p];
    if constexpr (Calibrated) {
      if (slopes) {
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) {
          A z[Q], d[Q];
          unpack<T>(row.raw[part / N], part % N, z);
          classes.slope(tile.vector(part / N), part % N, z, d);
#pragma unroll
          for (int q = 0; q < Q; ++q) sums.rest_slope += e[part * Q + q] * d[q];
        }
      }
    }
    if (smoothing && slot >= 0)
      sums.smooth +=
          vector_entry<A>(args.weight, target, A(1)) * (sums.target_logit - sums.maximum);
    A values[4] = {sums.rest, sums.rest_slope, sums.smooth, sums.smooth_slope};
    if (smoothing)
      group.sum(values);
    else if constexpr (Calibrated)
      sum_first<2>(group, values);
    else
      sum_first<1>(group, values);
    sums.rest = values[0] * correction;
    sums.rest_slope = values[1] * correction;
    sums.smooth = values[2], sums.smooth_slope = values[3], sums.weight = weights;

    if (tiled) {
      if (tile.lane == 0)
        sums.write(static_cast<A*>(args.tile_sums) + blockIdx.y * args.outer + i,
                   args.tiles * args.outer);
      continue;
    }

    const bool first = tile.lane == 0 && i < args.outer;
    if (!first && !sum_classes && !writes_logits) continue;
    const A target_weight = target >= 0 && class_weight ? class_weight[target] : A(1);
    const A v_i = valid ? vector_entry<A>(args.sample_weight, i, A(1)) : A(0);
    const PositionResult<A> result =
        position_result(RowOptions<A>(args), sums, target_weight, first);
    if (first) {
      if (args.shard_sums)
        write_shard_sums(args, i, valid, sums);
      else
        write_position(args, i, target, sums, result, v_i, c);
      if (valid)
        block_sums.add(tile.group, result.loss * v_i, divisor_share(args, target_weight, v_i));
    }
    if (writes_logits && i < args.outer) {
      T* grad = static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride;
      const bool aligned = tile.aligned(grad);
      const A factor = v_i * inverse;
      const A of_e = factor * result.softmax * correction, of_w = factor * result.smooth;
#pragma unroll
      for (int k = 0; k < kKept<T>; ++k) {
        Raw out = {};
#pragma unroll
        for (int part = 0; part < N; ++part) {
          A g[Q];
#pragma unroll
          for (int q = 0; q < Q; ++q) g[q] = valid ? of_e * e[k * V + part * Q + q] : A(0);
          if (smoothing) {
            A w[Q];
            classes.load(classes.weight, tile.vector(k), part, w);
#pragma unroll
            for (int q = 0; q < Q; ++q) g[q] -= of_w * w[q];
          }
          if constexpr (Calibrated) {
            A a[Q];
            classes.load(classes.scale, tile.vector(k), part, a);
#pragma unroll
            for (int q = 0; q < Q; ++q) g[q] *= a[q] * c + A(1);
          }
          pack<T>(g, part, out);
        }
        tile.store(grad, k, aligned, out);
      }
      if (slot >= 0) {  // over what this thread has written there
        const A a = vector_entry<A>(args.scale, target, A(0));
        store_one(grad + target, from_accumulate<T>(factor * result.at_target * (a * c + A(1))));
      }
    }
    if (!sum_classes || !valid) continue;
    const A softmax = v_i * c * result.softmax * correction, smooth = v_i * c * result.smooth;
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      A z[Q];
      unpack<T>(row.raw[part / N], part % N, z);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int p = part * Q + q;
        const A g = softmax * e[p];
        // A masked class, of which g is 0, adds 0 and not 0 * -inf.
        grad_scale[p] += g * larger(z[q], kLowest<A>);
        grad_bias[p] += g;
      }
    }
    if (!smoothing && slot < 0) continue;
    const A at_target = v_i * c * result.at_target;
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      A z[Q], w[Q] = {};
      unpack<T>(row.raw[part / N], part % N, z);
      if (smoothing) classes.load(classes.weight, tile.vector(part / N), part % N, w);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const int p = part * Q + q;
        const A g = p == slot ? at_target : -smooth * w[q];
        grad_scale[p] += g * (z[q] == negative_infinity<A>() ? A(0) : z[q]);
        grad_bias[p] += g;
      }
    }
  }
  if (tiled) return;
  if (args.block_sums) block_sums.write_and_finish<A>(args);
  if (sum_classes) {
    if constexpr (Calibrated)
      write_class_sums<T, Wide>(args, tile, grad_scale, grad_bias, class_memory);
  }
}

// The tiles of each row added up; a warp a row.
template <class A>
__global__ void __launch_bounds__(kNarrowThreads, 1) row_combine_kernel(const RowArgs args) {
  DISALIGN_SHARED_MEMORY(memory);
  const bool smoothing = args.label_smoothing > 0;
  const int64_t stride = args.tiles * args.outer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  BlockSums block_sums(reinterpret_cast<double*>(memory), warps);
  for (int64_t i = int64_t{blockIdx.x} * warps + warp; i < args.outer;
       i += int64_t{gridDim.x} * warps) {
    const int t = target_of(args, i);
    if (args.details) combine_details<A>(args, i, lane, is_valid(t));
    PositionSums<A> sums;
    for (int tile = lane; tile < args.tiles; tile += 32)
      sums.add(PositionSums<A>::read(static_cast<const A*>(args.tile_sums) + tile * args.outer + i,
                                     stride),
               smoothing);
    for (int distance = 16; distance > 0; distance /= 2)
      sums.add(sums.of_lane(distance), smoothing);
    if (lane > 0) continue;
    const A target_weight = t < 0 ? A(1) : vector_entry<A>(args.weight, t, A(1));
    const A v_i = is_valid(t) ? vector_entry<A>(args.sample_weight, i, A(1)) : A(0);
    const PositionResult<A> result = position_result(RowOptions<A>(args), sums, target_weight);
    if (args.shard_sums)
      write_shard_sums(args, i, is_valid(t), sums);
    else
      write_position(args, i, t, sums, result, v_i, confidence_of<A>(args, i));
    if (!is_valid(t)) continue;
    block_sums.add(warp, result.loss * v_i, divisor_share(args, target_weight, v_i));
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

}  // namespace disalign::cuda
