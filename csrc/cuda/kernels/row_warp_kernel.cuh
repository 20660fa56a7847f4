// Row kernels, rows that a warp keeps in its registers, or, Wide, the warps of a block. Forward,
// forward with the gradient of the logits, and backward are one kernel.
//
// - Maps: row_warp_tile.cuh. The next rows' vectors are on their way to shared memory while this one
//   is computed; a lane reads what it has copied, so that nothing waits for other lanes. Barriers at
//   the ends; Wide, two a row, of the maximum and of the sums.
// - What is of a row alone (target, weights; loss, statistics) is read and made by one lane for 32
//   rows of the warp at a time, one a lane: a turn. Wide, every warp reads, the first one writes.
// - The target's logit is marked -inf in shared memory: its exponential is 0 and it is left out of
//   the sums, as PositionSums wants it.
// - Memory: one read of the logits (besides the target's), one write of their gradient (the target's
//   over what was written of the mark), which may be the logits.
#pragma once

#include "cuda/kernels/row_warp_tile.cuh"

namespace disalign::cuda {

// Sums: the class sums are wanted. Wide: a row is a block's, and each warp has its part of it.
template <class T, int K, bool Calibrated, bool Sums, bool Wide>
__global__ void __launch_bounds__(Sums || Wide ? kWarpSumsThreads : kWarpRowThreads,
                                  Sums || Wide                        ? 1
                                  : Calibrated || K * kVector<T> > 40 ? 2
                                                                      : 3)
    row_warp_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>, P = K * V;
  constexpr int kStages = kWarpStages<K>;
  DISALIGN_SHARED_MEMORY(memory);
  const WarpTile<T, K, Wide> tile(args);
  const int lane = tile.lane;
  unsigned char* areas = memory + kWarpScratchBytes<A, Wide>;
  unsigned char* staged = areas + tile.warp * kWarpBytes;
  A* class_memory = reinterpret_cast<A*>(areas + blockDim.x / 32 * kWarpBytes) +
                    (Wide ? tile.warp * ClassVectors<T>::count(args) * 32 * P : 0);

  const ClassVectors<T> classes(args, tile, class_memory);
  const EdgeVectors<A> edge(args, tile.edge, lane,
                            staged + 32 * kWarpStaged * kVectorBytes + Turn<T>::kBytes);
  const RowOptions<A> options(args);
  const bool smoothing = options.label_smoothing > 0;
  const bool slopes = Calibrated && args.grad_confidence;
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, tile.classes, reinterpret_cast<A*>(memory));
    __syncthreads();
  }
  BlockSums block_sums(reinterpret_cast<double*>(memory), Wide ? 1 : blockDim.x / 32);
  Group<A, Wide> group(32, reinterpret_cast<A*>(memory + kWarpSumsBytes));
  const A inverse = args.backward      ? inverse_denominator<A>(args)
                    : args.grad_logits ? inverse_of<A>(forward_denominator(args))
                                       : A(1);
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  if (args.backward && !writes_logits && !args.grad_confidence && !Sums) return;

  const auto vector_at = [&](int round, int k) {
    return staged + ((round % kStages * K + k) * 32 + lane) * kVectorBytes;
  };
  if (!tile.has(K - 1)) {  // what is no vector is -inf, for good
    Raw nothing;
#pragma unroll
    for (int v = 0; v < V; ++v) set_element(nothing, v, from_accumulate<T>(negative_infinity<A>()));
    for (int k = max(tile.left + 31, 0) / 32; k < K; ++k) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) write_shared(vector_at(stage, k), nothing);
    }
  }

  const T* logits = static_cast<const T*>(args.logits);
  int ahead = kNoTarget;  // of this lane's row in the turn of the row that is asked for
  const int64_t step = tile.row_step * args.outer_stride;
  // Of the row that is asked for next: its first vector of this lane; of the one after this: its edge.
  const T* from = logits + tile.row * args.outer_stride + tile.first();
  const T* edge_from = from + (tile.edge - tile.first());
  const auto ask_for = [&](int round) {
    if (round < tile.rounds) {
      if (round % 32 == 0) {
        const int64_t own = tile.row_at(round + lane);
        ahead = own < args.outer ? target_of(args, own) : kNoTarget;
      }
      if (is_valid(__shfl_sync(kFullWarp, ahead, round % 32)))
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
  const Turn<T> turn(staged + 32 * kWarpStaged * kVectorBytes);
  A grad_scale[Sums ? P + 1 : 1] = {}, grad_bias[Sums ? P + 1 : 1] = {};  // the last: the edge's
  for (int round = 0; round < tile.rounds; ++round) {
    const int at_turn = round % 32;
    if (at_turn == 0) {
      __syncwarp();
      own_target = ahead;  // whose row is of this turn by now
      turn.read(args, tile.row_at(round + lane), own_target, lane, inverse);
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
    const auto write = [&](T* grad, const A(&g)[P + 1]) {
      T* to = grad + tile.first();
      if (reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (tile.has(k)) store_vector(to + 32 * k * V, packed<T>(&g[k * V]));
      } else {
#pragma unroll
        for (int p = 0; p < P; ++p)
          if (tile.has(p / V)) store_one(to + p / V * 32 * V + p % V, from_accumulate<T>(g[p]));
      }
      if (tile.edge >= 0) store_one(grad + tile.edge, from_accumulate<T>(g[P]));
    };
    wait_for_copies<kStages - 1>();

    if (!is_valid(target)) {
      if (writes_logits) write(grad_row(), {});
    } else {
      const A c = Calibrated ? of_row(Turn<T>::kC) : A(0);
      const TargetPlace<T, K> place(tile, target);
      if (place.holds)
        *reinterpret_cast<T*>(vector_at(round, place.k) + place.v * sizeof(T)) =
            from_accumulate<T>(negative_infinity<A>());

      PositionSums<A> sums;
      sums.target_logit = of_row(Turn<T>::kTargetLogit);
      sums.weight = weights;
      A e[P + 1];  // u, then exp(u - maximum); the last is the edge's
      e[P] = place.at_edge ? negative_infinity<A>()
                           : calibrated(z_edge, edge.scale(), edge.bias(), c) + edge.prior();
      sums.maximum = larger(larger(sums.maximum, sums.target_logit), e[P]);
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A z[Q], u[Q];
        unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
        classes.template calibrate<Calibrated>(lane + 32 * (part / N), part % N, z, c, u);
#pragma unroll
        for (int q = 0; q < Q; ++q) e[part * Q + q] = u[q];
      }
      if (classes.prior) {
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A o[Q];
          classes.load(classes.prior, lane + 32 * (part / N), part % N, o);
#pragma unroll
          for (int q = 0; q < Q; ++q) e[part * Q + q] += o[q];
        }
      }
#pragma unroll
      for (int p = 0; p < P; p += 2) sums.maximum = larger(sums.maximum, larger(e[p], e[p + 1]));
      sums.maximum = group.max(sums.maximum);

      if (smoothing) {
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A w[Q];
          classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            // What is not the row's own is -inf, and would add 0 * -inf.
            const bool own = tile.has(part / N) && !place.is(part * Q + q);
            sums.smooth += own ? w[q] * (e[part * Q + q] - sums.maximum) : A(0);
          }
        }
        if (tile.edge >= 0 && !place.at_edge) sums.smooth += edge.weight() * (e[P] - sums.maximum);
      }
      const A correction = make_exponentials(e, sums.maximum);
      sums.rest = sum_of(e);
      // exp(u - maximum) z of some vectors, as many as registers hold: it is used twice. 0 of the
      // target and of a masked class, and not 0 * -inf.
      constexpr int kProducts = Sums && sizeof(T) == 4 ? 4 : 0;
      A products[kProducts + 1];
      const auto product = [&](int p, A z) { return e[p] * larger(z, kLowest<A>); };
      if constexpr (Sums) {
        forget_loads();
#pragma unroll
        for (int part = 0; part < kProducts / Q; ++part) {
          A z[Q];
          unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
#pragma unroll
          for (int q = 0; q < Q; ++q) products[part * Q + q] = product(part * Q + q, z[q]);
        }
      }
      if (Calibrated && slopes) {
        forget_loads();
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A z[Q], a[Q], b[Q];
          unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
          classes.load(classes.scale, lane + 32 * (part / N), part % N, a);
          classes.load(classes.bias, lane + 32 * (part / N), part % N, b);
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            const int p = part * Q + q;
            const A weighted = p < kProducts ? products[p < kProducts ? p : 0] : product(p, z[q]);
            sums.rest_slope = std::fma(a[q], weighted, std::fma(b[q], e[p], sums.rest_slope));
          }
        }
        const A weighted = product(P, z_edge);
        sums.rest_slope += edge.scale() * weighted + edge.bias() * e[P];
        if (smoothing) {
          forget_loads();
#pragma unroll
          for (int part = 0; part < K * N; ++part) {
            A z[Q], d[Q], w[Q];
            unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
            classes.slope(lane + 32 * (part / N), part % N, z, d);  // 0 of the target
            classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
            for (int q = 0; q < Q; ++q) sums.smooth_slope += w[q] * d[q];
          }
          const A d = finite_or_zero(edge.scale() * z_edge + edge.bias());
          if (!place.at_edge) sums.smooth_slope += edge.weight() * d;
        }
      }
      A values[4] = {sums.rest, sums.rest_slope, sums.smooth, sums.smooth_slope};
      if (smoothing) {
        group.sum(values);
        const A w_t = of_row(Turn<T>::kWeight);
        values[2] += w_t * (sums.target_logit - sums.maximum);
        if (slopes) values[3] += w_t * of_row(Turn<T>::kTargetSlope);
      } else if (slopes) {
        sum_first<2>(group, values);
      } else {
        sum_first<1>(group, values);
      }
      sums.rest = values[0] * correction;
      sums.rest_slope = values[1] * correction;
      sums.smooth = values[2], sums.smooth_slope = values[3];
      if (lane == at_turn) turn.keep(at_turn, sums, slopes, smoothing);

      if (writes_logits || Sums) {
        forget_loads();
        const A w_t = of_row(Turn<T>::kWeight), v_i = of_row(Turn<T>::kFactor);
        const PositionResult<A> result = position_result(options, sums, w_t, false);
        const A of_e = result.softmax * correction;
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
          T* grad = grad_row();
          write(grad, g);
          if (place.holds || place.at_edge) {  // over what it has written of the marked one
            A g_t = factor * result.at_target;
            if constexpr (Calibrated) g_t *= static_cast<const A*>(args.scale)[target] * c + A(1);
            store_one(grad + target, from_accumulate<T>(g_t));
          }
        }
        if constexpr (Sums) {
          const A softmax = v_i * c * of_e, smooth = v_i * c * result.smooth;
          forget_loads();
#pragma unroll
          for (int part = 0; part < K * N; ++part) {
            A z[Q];
            unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
              const int p = part * Q + q;
              const A ez = p < kProducts ? products[p < kProducts ? p : 0] : product(p, z[q]);
              grad_scale[p] = std::fma(softmax, ez, grad_scale[p]);
              grad_bias[p] = std::fma(softmax, e[p], grad_bias[p]);
            }
          }
          grad_scale[P] = std::fma(softmax, product(P, z_edge), grad_scale[P]);
          grad_bias[P] = std::fma(softmax, e[P], grad_bias[P]);
          if (smoothing) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A z[Q], w[Q];
              unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
              classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
              for (int q = 0; q < Q; ++q) {
                const int p = part * Q + q;
                const A g = place.is(p) ? A(0) : -smooth * w[q];
                grad_scale[p] += g * (z[q] == negative_infinity<A>() ? A(0) : z[q]);
                grad_bias[p] += g;
              }
            }
            const A g = place.at_edge ? A(0) : -smooth * edge.weight();
            grad_scale[P] += g * (z_edge == negative_infinity<A>() ? A(0) : z_edge);
            grad_bias[P] += g;
          }
          const A g = v_i * c * result.at_target;
          const A g_z = g * of_row(Turn<T>::kTargetZ);
          // Selects on what differs between lanes, which must not index registers.
          if (place.k >= 0)
            at_index<0, K>(place.k, [&](auto index) {
              constexpr int k = decltype(index)::value;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const bool here = place.holds && v == place.v;
                grad_scale[k * V + v] += here ? g_z : A(0);
                grad_bias[k * V + v] += here ? g : A(0);
              }
            });
          grad_scale[P] += place.at_edge ? g_z : A(0);
          grad_bias[P] += place.at_edge ? g : A(0);
        }
      }
    }

    if (at_turn < 31 && round + 1 < tile.rounds) continue;
    if (Wide && tile.warp > 0) continue;
    double loss = 0, divisor = 0;
    if (lane <= at_turn) {
      const int64_t own = tile.row_at(round - at_turn + lane);
      const bool valid = is_valid(own_target);
      PositionSums<A> sums;
      A w_t = 1, v_i = 0, c = 0;
      if (valid) {  // of an ignored row there is nothing in the turn
        sums = turn.kept(lane, slopes, smoothing, weights);
        w_t = turn.at(Turn<T>::kWeight, lane), v_i = turn.at(Turn<T>::kFactor, lane);
        c = turn.at(Turn<T>::kC, lane);
      }
      const PositionResult<A> result = position_result(options, sums, w_t, !args.backward);
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
  if (args.block_sums) block_sums.write_and_finish<A>(args);
  if constexpr (Sums) write_warp_sums<T, K, Wide>(args, tile, grad_scale, grad_bias, areas);
}

}  // namespace disalign::cuda
