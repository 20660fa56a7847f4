// Row kernels whose targets are class probabilities, of calibrated logits: what
// soft_row_warp_kernel.cuh is to logits without calibration, with the sums that the gradients of
// scale, bias and confidence are made of. Forward and backward are one kernel.
//
// - Maps: row_warp_tile.cuh. A lane keeps its elements of the logits and its share of the class sums in
//   registers, for 255 a thread, its probabilities there or in shared memory. Several warps a scheduler
//   have rows on their way while others compute. Blocks of a team add up their class sums
//   (row_warp_sums.cuh).
// - The exponentials are by the maximum of a few elements of each lane. Where that does not serve, the
//   row is done again by its maximum.
// - What is not the row's own is a logit so low that its exponential is 0, and finite: a row without
//   masked classes has no case to be told apart. Of one with them the sums are not finite, as
//   0 * -infinity is NaN, and it is done again.
// - q_j = factor (ratio exp(u_j - shift) - b_j): the factor is left to what q_j is added to.
// - What is of a row alone is read and made by one lane for 32 rows of the warp at a time, a turn; its
//   share of the confidence's gradient waits in shared memory for the turn's end.
// - Memory: one read of logits and probabilities, one write of the gradient, which may be the logits.
//   Tiles are read again for their gradients.
#pragma once

#include "cuda/kernels/soft_row_sums_tile.cuh"

namespace disalign::cuda {

// By: who keeps a row; of several warps each has its part of it.
template <class T, int By>
__global__ void __launch_bounds__(kSoftSumsThreads, 1) soft_row_sums_kernel(const RowArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (By == kByCluster) {  // not launched: these devices have no clusters
    __trap();
    return;
  }
#endif
  constexpr bool Wide = By != kByWarp;
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>;
  constexpr int K = kSoftSumsVectors<T, By>, P = K * V;
  constexpr A kLow = LowLogit<T>::kLow;
  constexpr A kMasked = -1e37f;  // u of a masked class, finite
  DISALIGN_SHARED_MEMORY(memory);
  const bool tiled = By == kByBlock && args.tiles > 1;
  const bool sum_classes = args.class_gradients && (args.backward || !tiled);
  const SoftTeam team{Cluster::kExists && By != kByCluster && args.class_gradients && !tiled
                          ? static_cast<int>(gridDim.y)
                          : 1};
  const WarpTile<T, K, By> tile(args, team, By == kByCluster || tiled ? blockIdx.y : 0);
  const int lane = tile.lane, warps = blockDim.x / 32;
  unsigned char* turns = memory + kSoftSumsScratchBytes<A, By>;
  using RowTurn = Turn<A, true>;
  const RowTurn turn(turns + tile.warp * kSoftTurnBytes);
  const bool weighs = soft_weighs(args);
  A* class_memory = reinterpret_cast<A*>(turns + warps * kSoftTurnBytes) +
                    (Wide ? tile.warp * soft_class_vectors(args) * 32 * P : 0);
  const ClassVectors<T> classes(args, tile, class_memory, weighs);
  // Those of one vector, in their order: scale, bias, weight, prior.
  const auto load_class = [&](int before, int part, A(&out)[Q]) {
    classes.load(class_memory + before * 32 * P, lane + 32 * (part / N), part % N, out);
  };
  OwnProbabilities<T, By> own_b(
      class_memory + (soft_class_vectors(args) + (Wide ? 0 : tile.warp)) * 32 * P, lane);
  const bool has_edge = tile.edge >= 0;
  const A edge_a = has_edge ? static_cast<const A*>(args.scale)[tile.edge] : A(0);
  const A edge_b = has_edge ? static_cast<const A*>(args.bias)[tile.edge] : A(0);
  BlockSums block_sums(reinterpret_cast<double*>(memory), Wide ? 1 : warps);
  A* group_memory = reinterpret_cast<A*>(memory + kWarpSumsBytes);
  using RowGroup = SoftSumsGroup<A, By>;
  RowGroup group(By == kByCluster ? args.tiles : 32, group_memory);
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  const bool slopes = args.confidence_sums != nullptr || sum_classes;
  if (args.backward && !writes_logits && !slopes) return;
  const A shared = args.backward ? shared_scale(args, inverse_denominator<A>(args)) : A(1);
  // Of the logits' gradient alone: finish_kernel divides the others.
  const A inverse =
      !args.backward && args.grad_logits ? inverse_of<A>(forward_denominator(args)) : A(1);

  A own_weight = 0, own_c = 0;                      // of this lane's row of the turn
  A grad_scale[P + 1] = {}, grad_bias[P + 1] = {};  // the last: the edge's
  const T* from = static_cast<const T*>(args.logits) + tile.row * args.outer_stride + tile.first();
  Raw raw[K] = {};  // of a row; a load writes no element that is not the row's own
  A z_edge = kLow;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) set_element(raw[k], v, from_accumulate<T>(kLow));
  }
#pragma unroll 1
  for (int round = 0; round < tile.rounds; ++round) {
    const int at_turn = round % 32;
    const int64_t i = tile.row_at(round);
    if (at_turn == 0) {
      const int64_t own = tile.row_at(round + lane);
      own_weight = own < args.outer ? vector_entry<A>(args.sample_weight, own, A(1)) : A(0);
      own_c = own < args.outer ? confidence_of<A>(args, own) : A(0);
    }
    const A c = __shfl_sync(kFullWarp, own_c, at_turn);

    A e[P + 1];  // u, then exp(u - shift), then q_j / factor
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (k < kSoftCertain<T, By> || tile.has(k)) raw[k] = load_vector(from + 32 * k * V);
    if (has_edge) z_edge = to_accumulate(load_one(from + (tile.edge - tile.first())));
    from += tile.row_step * args.outer_stride;
    {
      A b[P + 1];
      const auto load = [&] {
        if (sizeof(T) == 2 && !args.probabilities_of_a)
          load_probabilities<T>(args, tile, i, b);
        else
          load_probabilities<A>(args, tile, i, b);
      };
      if (!weighs) {  // of one load before a branch the compiler copies every b
        load();
      } else {
        load();
        const SoftOptions<A> options(args);
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A w[Q];  // 0 of what is not the row's own
          load_class(2, part, w);
#pragma unroll
          for (int q = 0; q < Q; ++q) b[part * Q + q] = w[q] * options.of(b[part * Q + q]);
        }
        if (has_edge) b[P] = vector_entry<A>(args.weight, tile.edge, A(1)) * options.of(b[P]);
      }
      own_b.keep(b);
    }
    forget_loads();

    SoftRatio<A> row;
    if (args.backward) row = soft_ratio(args, i, shared);
    PositionSums<A> sums;
    A slope = 0;                // sum_j q_j d_j of this lane's
    A values[3], infinite = 0;  // sums; -infinity where the target asks for a masked class
    A rounding = 0;             // of what is taken off the exponents
    uint64_t absent = 0;        // elements, a bit each, that are masked or not the row's own
#pragma unroll 1
    for (int again = 0;; again = 1) {
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A z[Q], scale[Q], bias[Q];
        unpack<T>(raw[part / N], part % N, z);
        load_class(0, part, scale);
        load_class(1, part, bias);
#pragma unroll
        for (int q = 0; q < Q; ++q)
          e[part * Q + q] = std::fma(c, std::fma(scale[q], z[q], bias[q]), z[q]);
      }
      e[P] = std::fma(c, std::fma(edge_a, z_edge, edge_b), z_edge);
      if (args.prior) {
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A o[Q];
          load_class(weighs ? 3 : 2, part, o);
#pragma unroll
          for (int q = 0; q < Q; ++q) e[part * Q + q] += o[q];
        }
        if (has_edge) e[P] += static_cast<const A*>(args.prior)[tile.edge];
      }
      if (again) {
#pragma unroll
        for (int p = 0; p <= P; ++p)
          if (absent >> p & 1) e[p] = kMasked;
      }
      // Of a row that is done again those of the first time are written over.
      if (args.details)
        write_soft_details<true, P + 1>(
            args, e, kMasked / 2, [&](int p) { return tile.class_of(p); }, group, i,
            tile.block_of_row, tiled, lane == 0 && (tiled ? tile.warp == 0 : tile.is_first()));
      sums.maximum = row.shift;
      if (!args.backward) {
        sums.maximum = kLowest<A>;
        if (again || args.shard_sums) {  // a shard's maximum is no guess
#pragma unroll
          for (int p = kSoftGuessed; p <= P; ++p) sums.maximum = larger(sums.maximum, e[p]);
        }
#pragma unroll
        for (int p = 0; p < kSoftGuessed; ++p) sums.maximum = larger(sums.maximum, e[p]);
        sums.maximum = group.max(sums.maximum);
      }
      A product = sums.maximum * kLog2E;
      if (again) {
        product = 0;
#pragma unroll
        for (int p = 0; p <= P; ++p) e[p] -= sums.maximum;
      }
      values[0] = 0, values[1] = infinite, values[2] = 0;
      const auto add = [&](int p, A b) {
        const A exponent = std::fma(e[p], kLog2E, -product);
        e[p] = power_of_two(exponent);
        values[0] += e[p];
        values[1] = std::fma(b, exponent, values[1]);
        values[2] += b;
      };
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A b[Q];
        own_b.load(part, b);
#pragma unroll
        for (int q = 0; q < Q; ++q) add(part * Q + q, b[q]);
      }
      add(P, own_b.edge);
      if (!args.backward) group.sum(values);
      if (again) {
        if (sums.maximum <= kMasked / 2) values[0] = 0;  // they are all masked
        break;
      }
      rounding = std::fma(-sums.maximum, kLog2E, product);
      bool ordinary = std::fabs(sums.maximum) < LowLogit<T>::kNear &&
                      std::fabs(values[1]) <= -kLowest<A> && values[0] <= kModerate<A>;
      if (args.backward) ordinary = !__any_sync(kFullWarp, !ordinary);
      if (ordinary) break;
      rounding = 0;
      const auto mask = [&](int p, A b, A bias) {
        absent |= uint64_t{1} << p;
        if (b != A(0)) infinite = negative_infinity<A>();
        slope = std::fma(b, bias, slope);  // it has no d_j
      };
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        forget_loads();  // else the loads of all parts take the class sums' registers
        A z[Q], b[Q], bias[Q];
        unpack<T>(raw[part / N], part % N, z);
        own_b.load(part, b);
        load_class(1, part, bias);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const int p = part * Q + q;
          if (z[q] == negative_infinity<A>()) {
            mask(p, b[q], bias[q]);
            set_element(raw[part / N], p % V, from_accumulate<T>(0));
          }
          if (!tile.has(p / V)) absent |= uint64_t{1} << p;
        }
      }
      if (z_edge == negative_infinity<A>()) mask(P, own_b.edge, edge_b), z_edge = 0;
      if (!has_edge) absent |= uint64_t{1} << P;
    }
    const A correction = power_of_two(rounding);
    if (args.backward) {
      row.ratio *= correction;
    } else {
      sums.rest = values[0] * correction;
      sums.smooth = kLn2 * std::fma(values[2], rounding, values[1]);
      sums.weight = values[2];
      if (tiled) {
        if (threadIdx.x == 0)
          sums.write(static_cast<A*>(args.tile_sums) + tile.block_of_row * args.outer + i,
                     args.tiles * args.outer);
        continue;
      }
      row.ratio = sums.weight * reciprocal(values[0]);
      row.factor = __shfl_sync(kFullWarp, own_weight, at_turn);
      if (lane == at_turn && tile.is_first()) {
        turn.keep(at_turn, sums);
        turn.at(RowTurn::kWeight, at_turn) = sums.weight;
      }
    }

    if (writes_logits || slopes) {
      forget_loads();
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A b[Q];
        own_b.load(part, b);
#pragma unroll
        for (int q = 0; q < Q; ++q) e[part * Q + q] = std::fma(row.ratio, e[part * Q + q], -b[q]);
      }
      e[P] = std::fma(row.ratio, e[P], -own_b.edge);
      if (slopes) {
        const A factor = row.factor * c;
        const auto add = [&](int p, A z, A scale, A bias) {
          const A qz = e[p] * z;
          slope = std::fma(scale, qz, std::fma(bias, e[p], slope));
          grad_scale[p] = std::fma(factor, qz, grad_scale[p]);
          grad_bias[p] = std::fma(factor, e[p], grad_bias[p]);
        };
        forget_loads();
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A z[Q], scale[Q], bias[Q];
          unpack<T>(raw[part / N], part % N, z);
          load_class(0, part, scale);
          load_class(1, part, bias);
#pragma unroll
          for (int q = 0; q < Q; ++q) add(part * Q + q, z[q], scale[q], bias[q]);
        }
        add(P, z_edge, edge_a, edge_b);
        turn.keep_slope(at_turn, row.factor * slope, lane);
      }
      if (writes_logits) {
        const A factor = row.factor * inverse, of_scale = factor * c;
        forget_loads();
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A scale[Q];
          load_class(0, part, scale);
#pragma unroll
          for (int q = 0; q < Q; ++q) e[part * Q + q] *= std::fma(scale[q], of_scale, factor);
        }
        e[P] *= std::fma(edge_a, of_scale, factor);
        tile.made_anew().template store<By != kByBlock>(
            static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride, e);
      }
    }

    if (at_turn < 31 && round + 1 < tile.rounds) continue;
    if (slopes) {  // their shares are there
      if constexpr (Wide)
        __syncthreads();
      else
        __syncwarp();
    }
    A own_slope = 0;
    if constexpr (By == kByCluster) {
      if (slopes) {
        A* of_blocks =
            group_memory + RowGroup::kScratchEntries + round / 32 % 2 * (kClusterSlopes<By> / 2);
        if (tile.warp == 0)
          Cluster::of_block(of_blocks, 0)[tile.block_of_row * 32 + lane] =
              turn.slope(lane, warps, kSoftTurnBytes);
        Cluster::barrier();
        if (tile.is_first())
          for (int block = 0; block < args.tiles; ++block)
            own_slope += of_blocks[block * 32 + lane];
      }
    } else {
      if (slopes && (!Wide || tile.warp == 0))
        own_slope = turn.slope(lane, Wide ? warps : 1, kSoftTurnBytes);
      if (Wide && slopes && args.backward) __syncthreads();  // before the shares of the next turn
    }
    if (Wide && (tile.warp > 0 || (By == kByCluster && !tile.is_first()))) continue;
    double loss = 0, divisor = 0;
    if (lane <= at_turn) {
      const int64_t own = tile.row_at(round - at_turn + lane);
      if (args.confidence_sums)
        static_cast<A*>(args.confidence_sums)[(tiled ? tile.block_of_row : 0) * args.outer + own] =
            own_c * (A(1) - own_c) * own_slope;
      if (!args.backward) {
        PositionSums<A> kept;
        kept.maximum = turn.at(RowTurn::kMaximum, lane), kept.rest = turn.at(RowTurn::kRest, lane);
        kept.smooth = turn.at(RowTurn::kSmooth, lane),
        kept.weight = turn.at(RowTurn::kWeight, lane);
        loss = write_soft_position(args, own, kept, own_weight);
        divisor = divisor_share(args, A(1), own_weight);
      }
    }
    if (args.backward || !args.block_sums) continue;
    loss = warp_sum(loss), divisor = warp_sum(divisor);
    if (lane == 0) block_sums.add(tile.warp, loss, divisor);
  }
  if (args.block_sums && !tiled && tile.block_of_row == 0)
    block_sums.write_and_finish<A>(args, blockIdx.x * team.size() + team.member());
  if (sum_classes) {
    __syncthreads();  // the class vectors are read no more
    write_warp_sums<T, K, By, kSoftClassSumsBytes<T, By>>(args, tile, grad_scale, grad_bias,
                                                          turns + warps * kSoftTurnBytes, team);
  }
}

}  // namespace disalign::cuda
