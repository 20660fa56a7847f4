// Row kernels, rows that a warp keeps in its registers, or, Wide, the warps of a block or of a
// cluster's blocks (sm_90 and newer). Forward, forward with the gradient of the logits, and backward
// are one kernel.
//
// - Maps: row_warp_tile.cuh. The next rows' vectors are on their way to shared memory while this one
//   is computed; a lane reads what it has copied, so that nothing waits for other lanes. Barriers at
//   the ends; Wide, one a row, of the sums, and with the confidence's gradient one a turn.
// - The exponentials are exp(u - u_t): no pass for the maximum, no reduction of it. Where the sum of
//   the others is not moderate (a logit 22 above the target's, NaN) the row is done again by its
//   maximum. Details (row_details.cuh) are made before the loss, always by the maximum.
// - What is of a row alone (target, weights; loss, statistics) is read and made by one lane for 32
//   rows of the warp at a time, one a lane: a turn. Wide, every warp reads, the first one writes.
// - The target's logit is marked -inf in shared memory: its exponential is 0 and it is left out of
//   the sums, as PositionSums wants it. What its gradient is divided by that of the others then
//   takes its place among the exponentials, and gradients are made of all alike.
// - Memory: one read of the logits (besides the target's), one write of their gradient, maybe in place.
#pragma once

#include "cuda/kernels/async_copy.cuh"
#include "cuda/kernels/row_warp_sums.cuh"

namespace disalign::cuda {

// Sums: the class sums are wanted. By: who keeps a row; of several warps each has its part of it.
template <class T, int K, bool Calibrated, bool Sums, int By>
__global__ void __launch_bounds__(kWarpThreads<T, Calibrated, Sums, By>,
                                  Sums || By != kByWarp               ? 1
                                  : Calibrated || K * kVector<T> > 40 ? 2
                                                                      : 3)
    row_warp_kernel(const RowArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (By == kByCluster) {  // not launched: these devices have no clusters
    __trap();
    return;
  }
#endif
  constexpr bool Wide = By != kByWarp;
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>, P = K * V;
  constexpr int kStages = kWarpStages<K>;
  DISALIGN_SHARED_MEMORY(memory);
  const Team<Sums, By> team;
  const WarpTile<T, K, By> tile(args, team);
  const int lane = tile.lane;
  unsigned char* areas = memory + kWarpScratchBytes<A, By>;
  constexpr int kBytes = kWarpBytes<Calibrated>;
  constexpr bool kKeeps = !Calibrated || P <= 40;  // else all registers are taken
  unsigned char* staged = kept_address<kKeeps>(areas + tile.warp * kBytes);
  A* class_memory = reinterpret_cast<A*>(areas + blockDim.x / 32 * kBytes) +
                    (Wide ? tile.warp * ClassVectors<T>::count(args) * 32 * P : 0);

  const ClassVectors<T> classes(args, tile, class_memory);
  const EdgeVectors<A> edge(args, tile.edge, lane,
                            staged + kWarpStagedBytes + Turn<A, Calibrated>::kBytes);
  const RowOptions<A> options(args);
  const bool smoothing = options.label_smoothing > 0;
  const bool slopes = Sums || (Calibrated && args.grad_confidence);
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, tile.classes, reinterpret_cast<A*>(memory));
    __syncthreads();
  }
  BlockSums block_sums(reinterpret_cast<double*>(memory), Wide ? 1 : blockDim.x / 32);
  A* group_memory = reinterpret_cast<A*>(memory + kWarpSumsBytes);
  using RowGroup = WarpGroup<A, By, kWarpThreads<T, Calibrated, Sums, By> <= 256 ? 8 : 16>;
  RowGroup group(By == kByCluster ? args.tiles : 32, group_memory);
  const A inverse = args.backward      ? inverse_denominator<A>(args)
                    : args.grad_logits ? inverse_of<A>(forward_denominator(args))
                                       : A(1);
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  if (args.backward && !writes_logits && !args.grad_confidence && !Sums) return;

  constexpr bool kKeepsOwn = kKeeps && kWarpThreads<T, Calibrated, Sums, By> <= 256;
  unsigned char* own_vectors = kept_address<kKeepsOwn>(staged + lane * kVectorBytes);
  tile.write_missing(own_vectors);
  const auto vector_at = [&](int round, int k) {
    return own_vectors + (round % kStages * K + k) * 32 * kVectorBytes;
  };
  const T* logits = static_cast<const T*>(args.logits);
  int ahead = kNoTarget;  // of this lane's row in the turn of the row that is asked for
  const int64_t step = tile.row_step * args.outer_stride;
  // Of the row that is asked for next: a vector of this lane; of the one after this: its edge.
  const T* from = logits + tile.row * args.outer_stride + (tile.first() + kMiddleVector<K> * V);
  const T* edge_from = from + (tile.edge - tile.first() - kMiddleVector<K> * V);
  const auto ask_for = [&](int round) {
    if (round < tile.rounds) {
      if (round % 32 == 0) {
        const int64_t own = tile.row_at(round + lane);
        ahead = own < args.outer ? target_of(args, own) : kNoTarget;
      }
      if (is_valid(__shfl_sync(kFullWarp, ahead, round % 32)) || args.details)
        copy_vectors(vector_at(round, 0), from, tile.left, std::make_integer_sequence<int, K>{});
      from += step;
    }
    commit_copies();
  };
  const auto edge_of = [&](int round) {
    A z = negative_infinity<A>();
    if (tile.edge >= 0 && round < tile.rounds) z = to_accumulate(load_one(edge_from));
    edge_from += step;
    return z;
  };
#pragma unroll
  for (int round = 0; round < kStages - 1; ++round) ask_for(round);
  A next_edge = edge_of(0);
  int own_target = kNoTarget;  // of this lane's row of the turn
  using RowTurn = Turn<A, Calibrated>;
  const RowTurn turn(staged + kWarpStagedBytes);
  // Whether no sum of this warp's slopes was NaN yet: they are made as if all logits were finite.
  bool finite = Wide && sizeof(T) == sizeof(float) && tile.left + lane >= 32 * K;
  A grad_scale[Sums ? P + 1 : 1] = {}, grad_bias[Sums ? P + 1 : 1] = {};  // the last: the edge's
  for (int round = 0; round < tile.rounds; ++round) {
    const int at_turn = round % 32;
    if (at_turn == 0) {
      __syncwarp();
      own_target = ahead;  // whose row is of this turn by now
      turn.read(args, logits, tile.row_at(round + lane), own_target, lane, inverse);
      if (Calibrated && args.details) {  // an ignored row has a prediction
        const int64_t own = tile.row_at(round + lane);
        if (!is_valid(own_target) && own < args.outer)
          turn.at(RowTurn::kC, lane) = confidence_of<A>(args, own);
      }
      __syncwarp();
    }
    ask_for(round + kStages - 1);
    const A z_edge = next_edge;
    next_edge = edge_of(round + 1);
    const int target = __shfl_sync(kFullWarp, own_target, at_turn);
    const auto of_row = [&](auto value) { return turn.at(value, at_turn); };
    const auto grad_row = [&] {
      return static_cast<T*>(args.grad_logits) + tile.row_at(round) * args.grad_outer_stride;
    };
    wait_for_copies<kStages - 1>();

    const A c = Calibrated ? of_row(RowTurn::kC) : A(0);
    // u of this lane's; the last is the edge's.
    const auto read_row = [&](A(&u)[P + 1]) {
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A z[Q], of_part[Q];
        unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
        classes.template calibrate<Calibrated>(lane + 32 * (part / N), part % N, z, c, of_part);
#pragma unroll
        for (int q = 0; q < Q; ++q) u[part * Q + q] = of_part[q];
      }
      u[P] = calibrated(z_edge, edge.scale(), edge.bias(), c) + edge.prior();
    };
    const auto add_prior = [&](A(&u)[P + 1]) {
      if (!classes.prior) return;
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A o[Q];
        classes.load(classes.prior, lane + 32 * (part / N), part % N, o);
#pragma unroll
        for (int q = 0; q < Q; ++q) u[part * Q + q] += o[q];
      }
    };

    if (args.details) {
      A u[P + 1];
      read_row(u);
      add_prior(u);
      const auto found = row_details<true>(
          u, [&](int p) { return tile.class_of(p); }, args.entropy != nullptr, group);
      if (tile.is_first() && lane == 0) found.write(args, tile.row_at(round), is_valid(target));
      forget_loads();
    }
    if (!is_valid(target)) {
      if (writes_logits) tile.store(grad_row(), {});
    } else {
      const TargetPlace<T, K> place(tile, target);
      const auto stage_target = [&](A z) {
        if (place.holds)
          *reinterpret_cast<T*>(vector_at(round, place.k) + place.v * sizeof(T)) =
              from_accumulate<T>(z);
      };
      stage_target(negative_infinity<A>());

      PositionSums<A> sums;
      sums.target_logit = of_row(RowTurn::kTargetLogit);
      sums.weight = weights;
      // u, then exp(u - shift); the last is the edge's. The shift is the target's logit, which spares
      // the rows their maximum, or, where the sum of the others is not moderate, the maximum.
      A e[P + 1];
      A correction, values[2];
      sums.maximum = sums.target_logit;
#pragma unroll 1
      for (int by_maximum = 0;; by_maximum = 1) {
        read_row(e);
        if constexpr (Calibrated)
          place.set(e, negative_infinity<A>());  // a factor 1 + c a below 0 has made it +inf
        else if (place.at_edge)
          e[P] = negative_infinity<A>();
        add_prior(e);
        if (by_maximum) sums.maximum = larger(sums.target_logit, group.max(maximum_of(e)));
        values[1] = 0;
        if (smoothing) {
          const TargetPlace<T, K> here = place.made_anew();
#pragma unroll
          for (int part = 0; part < K * N; ++part) {
            A w[Q];
            classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
              // What is not the row's own is -inf, and would add 0 * -inf.
              const bool own = tile.has(part / N) && !here.is(part * Q + q);
              values[1] += own ? w[q] * (e[part * Q + q] - sums.maximum) : A(0);
            }
          }
          if (tile.edge >= 0 && !place.at_edge) values[1] += edge.weight() * (e[P] - sums.maximum);
        }
        correction = make_exponentials(e, sums.maximum);
        values[0] = sum_of(e);
        if (smoothing)
          group.sum(values);
        else
          sum_first<1>(group, values);
        if (values[0] <= kModerate<A>) break;
        if (by_maximum) break;  // NaN or infinity
        forget_loads();
      }
      sums.rest = values[0] * correction;
      const A w_t = of_row(RowTurn::kWeight);
      if (smoothing) sums.smooth = values[1] + w_t * (sums.target_logit - sums.maximum);
      if (lane == at_turn) turn.keep(at_turn, sums);

      if (writes_logits || slopes) {
        forget_loads();
        const PositionResult<A> result = position_result(options, sums, w_t, false);
        const A of_e = result.softmax * correction;
        // Of the target, what makes softmax e_t its gradient, smoothing's share left out.
        A e_t = -values[0];
        if (smoothing) e_t = of_e == A(0) ? A(0) : (result.at_target + result.smooth * w_t) / of_e;
        place.set(e, e_t);
        const A v_i = of_row(RowTurn::kFactor);
        if (writes_logits) {
          const A factor = args.backward ? v_i : v_i * inverse;
          const A softmax = factor * of_e, smooth = factor * result.smooth;
          A g[P + 1];
#pragma unroll
          for (int p = 0; p <= P; ++p) g[p] = softmax * e[p];
          if (smoothing) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A w[Q];
              classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
              for (int q = 0; q < Q; ++q) g[part * Q + q] -= smooth * w[q];
            }
            g[P] -= smooth * edge.weight();
          }
          if constexpr (Calibrated) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A a[Q];
              classes.load(classes.scale, lane + 32 * (part / N), part % N, a);
#pragma unroll
              for (int q = 0; q < Q; ++q) g[part * Q + q] *= a[q] * c + A(1);
            }
            g[P] *= edge.scale() * c + A(1);
          }
          tile.store(grad_row(), g);
        }
        if (Calibrated && slopes) {
          const A z_t = of_row(RowTurn::kTargetZ);
          stage_target(z_t);
          const A z_of_edge = place.at_edge ? z_t : z_edge;
          const A softmax = v_i * c * of_e;
          A slope, ez[P];  // slope: sum_j q_j d_j of this lane's, of q_j = e_j
          const auto add = [&](int p, A of_z, A a, A b) {
            slope = std::fma(a, of_z, std::fma(b, e[p], slope));
          };
          const auto add_up = [&](auto all_finite) {
            slope = 0;
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A z[Q], a[Q], b[Q];
              const Raw raw = read_shared(vector_at(round, part / N));
              if constexpr (decltype(all_finite)::value)
                unpack<T>(raw, part % N, z);
              else
                unpack_finite<T>(raw, part % N, z);
              classes.load(classes.scale, lane + 32 * (part / N), part % N, a);
              classes.load(classes.bias, lane + 32 * (part / N), part % N, b);
#pragma unroll
              for (int q = 0; q < Q; ++q) {
                const int p = part * Q + q;
                ez[p] = e[p] * z[q];
                add(p, ez[p], a[q], b[q]);
              }
            }
          };
          const auto all_are_finite = [&] {
            add_up(std::true_type{});
            return !__any_sync(kFullWarp, slope != slope);  // 0 * -inf
          };
          forget_loads();
          if (!finite || !all_are_finite()) {
            finite = false;
            add_up(std::false_type{});
          }
          const A ez_of_edge = e[P] * larger(z_of_edge, kLowest<A>);
          add(P, ez_of_edge, edge.scale(), edge.bias());
          if constexpr (Sums) {
#pragma unroll
            for (int p = 0; p <= P; ++p) {
              grad_scale[p] = std::fma(softmax, p < P ? ez[p] : ez_of_edge, grad_scale[p]);
              grad_bias[p] = std::fma(softmax, e[p], grad_bias[p]);
            }
          }
          slope *= of_e;
          if (smoothing) {
            const A smooth = v_i * c * result.smooth;
            A smooth_slope = 0;
            const auto subtract = [&](int p, A z, A d, A w) {
              smooth_slope += w * d;
              if constexpr (Sums) {
                grad_scale[p] -= smooth * w * (z == negative_infinity<A>() ? A(0) : z);
                grad_bias[p] -= smooth * w;
              }
            };
            forget_loads();
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A z[Q], d[Q], w[Q];
              unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
              classes.slope(lane + 32 * (part / N), part % N, z, d);
              classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
              for (int q = 0; q < Q; ++q) subtract(part * Q + q, z[q], d[q], w[q]);
            }
            if (tile.edge >= 0)
              subtract(P, z_of_edge, finite_or_zero(edge.scale() * z_of_edge + edge.bias()),
                       edge.weight());
            slope -= result.smooth * smooth_slope;
          }
          turn.keep_slope(at_turn, slope, lane);
        }
      }
    }

    if (at_turn < 31 && round + 1 < tile.rounds) continue;
    if (slopes) {  // their shares are there
      if constexpr (Wide)
        __syncthreads();
      else
        __syncwarp();
    }
    A* of_blocks = nullptr;  // the sums of the cluster's blocks
    if constexpr (By == kByCluster) {
      if (slopes) {
        of_blocks =
            group_memory + RowGroup::kScratchEntries + round / 32 % 2 * (kClusterSlopes<By> / 2);
        if (tile.warp == 0)
          Cluster::of_block(of_blocks, 0)[tile.block_of_row * 32 + lane] =
              turn.slope(lane, blockDim.x / 32, kBytes);
        Cluster::barrier();
      }
    }
    if (!tile.is_first()) continue;
    double loss = 0, divisor = 0;
    if (lane <= at_turn) {
      const int64_t own = tile.row_at(round - at_turn + lane);
      const bool valid = is_valid(own_target);
      PositionSums<A> sums;
      A w_t = 1, v_i = 0, c = 0;
      if (valid) {  // of an ignored row there is nothing in the turn
        sums = turn.kept(lane, weights);
        w_t = turn.at(RowTurn::kWeight, lane), v_i = turn.at(RowTurn::kFactor, lane);
        c = turn.at(RowTurn::kC, lane);
      }
      PositionResult<A> result = position_result(options, sums, w_t, !args.backward);
      if (Calibrated && slopes && valid) {
        A slope = 0;
        if constexpr (By == kByCluster)
          for (int block = 0; block < args.tiles; ++block) slope += of_blocks[block * 32 + lane];
        else
          slope = turn.slope(lane, Wide ? blockDim.x / 32 : 1, kBytes);
        result.confidence = slope + result.at_target * turn.at(RowTurn::kNoSlope, lane);
      }
      if (!args.backward) {
        write_position(args, own, own_target, sums, result, v_i, c);
        if (valid) {
          loss = static_cast<double>(result.loss * v_i);
          divisor = divisor_share(args, w_t, v_i);
        }
      } else if (args.grad_confidence) {
        static_cast<A*>(args.grad_confidence)[own] =
            valid ? v_i * c * (A(1) - c) * result.confidence : A(0);
      }
    }
    if (!args.block_sums) continue;
    loss = warp_sum(loss), divisor = warp_sum(divisor);
    if (lane == 0) block_sums.add(tile.warp, loss, divisor);
  }
  if (args.block_sums && tile.block_of_row == 0)
    block_sums.write_and_finish<A>(args, blockIdx.x * team.size() + team.member());
  if constexpr (Sums) write_warp_sums<T, K, By>(args, tile, grad_scale, grad_bias, areas);
}

}  // namespace disalign::cuda
