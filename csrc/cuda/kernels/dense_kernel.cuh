// Dense kernel: calibrated softmax cross-entropy over class planes, forward and backward.
//
// - Maps, and how the logits come into shared memory: dense_tile.cuh.
// - First pass, of forward: a thread's classes with a running maximum, kDenseUnroll of them at a time;
//   then a thread a position adds up the slices, and makes the loss and the factors of its
//   gradient.
// - Second pass, of backward, and of forward where gradients are wanted: the exponentials once more,
//   from shared memory; the logits' gradient is written, class sums go over a slice's lanes by
//   shuffles into sums of the block.
// - Memory: a tile that fits into a stage is read once, in either direction; else once a pass.
//   grad_logits may be the logits: a position is one block's alone, and its target's logit is read
//   before the block writes.
#pragma once

#include "cuda/kernels/dense_tile.cuh"

namespace disalign::cuda {

template <class T>
constexpr int kDenseUnroll = sizeof(T) == 2 ? 2 : 4;  // classes that share a rise of the maximum
constexpr int kDenseGradientUnroll = 2;               // classes whose sums are shuffled together

// Over a thread's classes that are not its positions' targets.
template <class A, int V>
struct DenseSums {
  A maximum[V], rest[V], smooth[V], weight[V];  // as in PositionSums; the last two with smoothing

  __device__ __forceinline__ DenseSums() {
#pragma unroll
    for (int v = 0; v < V; ++v) maximum[v] = kLowest<A>, rest[v] = smooth[v] = weight[v] = 0;
  }

  // u: -inf of a target. weight_of(i, v): w of class i, 0 of a target; called with smoothing alone.
  template <int U, class Weight>
  __device__ __forceinline__ void add(const A (&u)[U][V], bool smoothing, Weight weight_of) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A top = maximum[v];
#pragma unroll
      for (int i = 0; i < U; ++i) top = larger(top, u[i][v]);
      const A below = maximum[v] - top;
      rest[v] *= exponential(below);
#pragma unroll
      for (int i = 0; i < U; ++i) rest[v] += exponential(u[i][v] - top);
      if (smoothing) {
        if (weight[v] != A(0)) smooth[v] += weight[v] * below;  // else 0 * infinity
#pragma unroll
        for (int i = 0; i < U; ++i) {
          const A w = weight_of(i, v);
          if (w != A(0)) smooth[v] += w * (u[i][v] - top);
          weight[v] += w;
        }
      }
      maximum[v] = top;
    }
  }
};

// Sums Count (a power of two, no more than lanes) values over so many neighbouring lanes. Lane l gets
// that of `spread_index<Count>(l)`: each step halves the values, and the lanes that have them.
template <int Count>
__device__ __forceinline__ int spread_index(int lane) {
  int index = 0;
#pragma unroll
  for (int half = Count / 2, distance = 1; half > 0; half /= 2, distance *= 2)
    index |= (lane & distance) ? half : 0;
  return index;
}
template <int Count, class A>
__device__ __forceinline__ A spread_sum(A (&values)[Count], int lane, int lanes) {
  int distance = 1;
#pragma unroll
  for (int half = Count / 2; half > 0; half /= 2, distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A kept = upper ? values[i + half] : values[i];
      const A given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kFullWarp, given, distance);
    }
  }
  for (; distance < lanes; distance *= 2)
    values[0] += __shfl_xor_sync(kFullWarp, values[0], distance);
  return values[0];
}

// What the second pass wants.
struct DenseWanted {
  bool logits, slopes, sums;
};

// A class and a thread's positions in it: u from z.
template <bool Calibrated, bool Options, class A, int V>
__device__ __forceinline__ void dense_calibrate(const ClassEntry<A>& entry, const A (&z)[V],
                                                const A (&c)[V], A (&u)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    u[v] = Calibrated ? calibrated(z[v], entry.a, entry.b, c[v]) : z[v];
    if constexpr (Options) u[v] += entry.o;
  }
}

// A position's factors into the second pass's entries.
template <class A>
__device__ __forceinline__ void put(A* entries, int positions, int p,
                                    const PositionFactors<A>& factors) {
  entries[kEntryShift * positions + p] = factors.maximum;
  entries[kEntrySoftmax * positions + p] = factors.softmax;
  entries[kEntrySmooth * positions + p] = factors.smooth;
  entries[kEntryTarget * positions + p] = factors.at_target;
  entries[kEntrySlope * positions + p] = factors.target_slope;
}

// Options: there is a prior or label smoothing; without, nothing is asked of them in the loops.
template <class T, bool Calibrated, bool Whole, bool Options>
__global__ void __launch_bounds__(kDenseThreads, sizeof(T) == 8 ? 1 : 2)
    dense_kernel(const DenseArgs args) {
  using A = Accumulate<T>;
  using Vector = DenseVector<T, Whole>;
  constexpr int V = kVector<T>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const DenseMemory<T> memory(args, raw_memory);
  const DensePlace place(args);
  const RowOptions<A> options(args);
  const bool smoothing = Options && options.label_smoothing > 0;
  const DenseWanted wanted = {args.grad_logits && !is_made<A>(args),
                              Calibrated && args.grad_confidence,
                              Calibrated && args.class_gradients};
  const bool second_pass = wanted.logits || wanted.slopes || wanted.sums;
  if (args.backward && !second_pass) return;
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, place.classes, reinterpret_cast<A*>(memory.scratch));
    __syncthreads();
  }
  const A inverse = args.backward      ? inverse_denominator<A>(args)
                    : args.grad_logits ? inverse_of<A>(forward_denominator(args))
                                       : A(1);
  if (args.table) {
    for (int j = threadIdx.x; j < place.classes; j += kDenseThreads)
      memory.table[j] = ClassEntry<A>::of(args, j);
  }
  A* const block_class_sums =
      static_cast<A*>(args.class_sums) + int64_t{2} * blockIdx.x * args.classes;
  A* class_sums = args.shared_sums ? memory.class_sums + (place.lane / 32) * 2 * args.classes
                                   : block_class_sums;
  if (wanted.sums) {
    A* all = args.shared_sums ? memory.class_sums : block_class_sums;
    const int64_t count = args.shared_sums ? DenseMemory<T>::sum_entries(args) : 2 * args.classes;
    for (int64_t i = threadIdx.x; i < count; i += kDenseThreads) all[i] = A(0);
  }
  const auto entry_of = [&](int j) -> ClassEntry<A> {
    if constexpr (!Calibrated && !Options) return {A(0), A(0), A(0), A(0)};
    return args.table ? memory.table[j] : ClassEntry<A>::of(args, j);
  };
  const int positions = place.lanes * V, step = place.slices;
  const auto entries_of = [&](int which) { return memory.positions + which * positions; };

  DenseStages<T, Whole> stages(args, place, memory.stages, args.backward ? 1 : 1 + second_pass);
  double loss = 0, divisor = 0;
  while (stages.more()) {
    const int64_t at = stages.first_position();
    const int image = stages.image(), count = stages.count();
    const int64_t first_index = image * args.inner + at;
    // Of a target of this tile, z and u.
    const auto target_logit = [&](int t, int p, A c) -> TargetLogit<A> {
      const T* logits = static_cast<const T*>(args.logits) + image * args.outer_stride + at;
      const A z = to_accumulate(
          args.chunks == 1
              ? *reinterpret_cast<const T*>(stages.begin() + Vector::offset(place, args, t, p))
              : load_one(logits + t * args.class_stride + p));
      const ClassEntry<A> entry = entry_of(t);
      A u = Calibrated ? calibrated(z, entry.a, entry.b, c) : z;
      if constexpr (Options) u += entry.o;
      return {z, u - vector_entry<A>(args.margin, t, A(0))};
    };
    const auto slope_of = [&](int t, A z) {
      const ClassEntry<A> entry = entry_of(t);
      return finite_or_zero(entry.a * z + entry.b);
    };
    if (args.backward) stages.arrive();
#pragma unroll 1
    for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
      const int64_t i = first_index + p;
      const int t = p < count ? target_of(args, i) : kNoTarget;
      memory.targets[p] = t;
      A c = 0;
      if constexpr (Calibrated) {
        if (is_valid(t)) c = confidence_of<A>(args, i);
        entries_of(kEntryC)[p] = c;
      }
      if (!args.backward) continue;
      PositionFactors<A> factors;
      if (is_valid(t)) {
        const TargetLogit<A> at_t = target_logit(t, p, c);
        factors = position_factors(args, i, t, c, weights, inverse, [&](int) { return at_t; });
        factors.at_target = factors.softmax * exponential(at_t.u - factors.maximum) -
                            factors.smooth * vector_entry<A>(args.weight, t, A(1)) -
                            factors.at_target;
        if (wanted.slopes) factors.target_slope = slope_of(t, at_t.z);
      }
      put(entries_of(0), positions, p, factors);
    }
    if (args.backward)
      __syncthreads();
    else
      stages.arrive();
    int target[V];
    A of_c[V];
    Vector::read(place, memory.targets, target);
    if constexpr (Calibrated) Vector::read(place, entries_of(kEntryC), of_c);

    if (!args.backward) {
      DenseSums<A, V> of_slice;
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
        if (chunk > 0) stages.arrive();
        const int first = chunk * args.rounds, rounds = min(args.rounds, place.mine - first);
        int j = place.slice + first * step;
        const auto add = [&](auto unroll, int round) {
          constexpr int U = decltype(unroll)::value;
          A u[U][V], w[U];
#pragma unroll
          for (int k = 0; k < U; ++k) {
            A z[V];
            unpack_vector<T>(stages.vector(round + k), z);
            const ClassEntry<A> entry = entry_of(j + k * step);
            w[k] = entry.w;
            dense_calibrate<Calibrated, Options>(entry, z, of_c, u[k]);
#pragma unroll
            for (int v = 0; v < V; ++v)
              if (j + k * step == target[v]) u[k][v] = negative_infinity<A>();
          }
          of_slice.add(u, smoothing,
                       [&](int k, int v) { return j + k * step == target[v] ? A(0) : w[k]; });
          j += U * step;
        };
        int round = 0;
        for (; round + kDenseUnroll<T> <= rounds; round += kDenseUnroll<T>)
          add(std::integral_constant<int, kDenseUnroll<T>>{}, round);
        for (; round < rounds; ++round) add(std::integral_constant<int, 1>{}, round);
      }
      // [values][slices][positions]
      const int values_of_slices = place.slices * positions;
      A* const exchange = memory.exchange + place.slice * positions;
      Vector::write(place, exchange, of_slice.maximum);
      Vector::write(place, exchange + values_of_slices, of_slice.rest);
      if (smoothing) {
        Vector::write(place, exchange + 2 * values_of_slices, of_slice.smooth);
        Vector::write(place, exchange + 3 * values_of_slices, of_slice.weight);
      }
      __syncthreads();
#pragma unroll 1
      for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
        const int t = memory.targets[p];
        PositionFactors<A> factors;
        const bool valid = is_valid(t);
        if (valid) {
          const TargetLogit<A> at_t =
              target_logit(t, p, Calibrated ? entries_of(kEntryC)[p] : A(0));
          const A u_t = at_t.u;
          const A w_t = vector_entry<A>(args.weight, t, A(1));
          const A v_i = vector_entry<A>(args.sample_weight, first_index + p, A(1));
          PositionSums<A> sums;
          sums.maximum = larger(u_t, kLowest<A>);
          const A* from = memory.exchange + p;
#pragma unroll 4
          for (int slice = 0; slice < place.slices; ++slice)
            sums.maximum = larger(sums.maximum, from[slice * positions]);
#pragma unroll 4
          for (int slice = 0; slice < place.slices; ++slice, from += positions) {
            const A below = *from - sums.maximum;
            sums.rest += from[values_of_slices] * exponential(below);
            if (!smoothing) continue;
            const A weight = from[3 * values_of_slices];
            sums.smooth += from[2 * values_of_slices];
            if (weight != A(0)) sums.smooth += weight * below;  // else 0 * infinity
          }
          sums.target_logit = u_t;
          sums.weight = weights;
          if (smoothing) sums.smooth += w_t * (u_t - sums.maximum);
          const PositionResult<A> result = position_result(options, sums, w_t);
          write_statistics(args, first_index + p, t, sums, result, v_i);
          loss += static_cast<double>(result.loss * v_i);
          divisor += divisor_share(args, w_t, v_i);
          factors.maximum = sums.maximum;
          factors.softmax = v_i * result.softmax, factors.smooth = v_i * result.smooth;
          factors.at_target = v_i * result.at_target;
          if (wanted.slopes) factors.target_slope = slope_of(t, at_t.z);
        } else if (p < count) {
          write_statistics(args, first_index + p, t, PositionSums<A>(), PositionResult<A>(), A(0));
        }
        if (second_pass) put(entries_of(0), positions, p, factors);
      }
    }
    if (!second_pass) continue;
    if (!args.backward) __syncthreads();
    A shift[V], softmax[V], smooth[V], at_target[V], target_slope[V], slope[V], highest[V];
    Vector::read(place, entries_of(kEntryShift), shift);
    Vector::read(place, entries_of(kEntrySoftmax), softmax);
    Vector::read(place, entries_of(kEntrySmooth), smooth);
    Vector::read(place, entries_of(kEntryTarget), at_target);
    if (wanted.slopes) Vector::read(place, entries_of(kEntrySlope), target_slope);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      slope[v] = 0;
      // Whatever is in an ignored position's logits, its exponentials are 0.
      highest[v] = is_valid(target[v]) ? -negative_infinity<A>() : negative_infinity<A>();
    }
    const A factor = args.backward ? A(1) : inverse;
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      if (args.chunks > 1 && (chunk > 0 || !args.backward)) stages.arrive();
      const int first = chunk * args.rounds, rounds = min(args.rounds, place.mine - first);
      // Those that all slices have, as they shuffle together, and those that any has.
      const int common =
          min(args.rounds, (place.classes >> (kDenseThreadBits - args.lane_bits)) - first);
      const int most = min(
          args.rounds, ((place.classes + step - 1) >> (kDenseThreadBits - args.lane_bits)) - first);
      const int64_t grad_step = step * args.grad_class_stride;
      T* grad = static_cast<T*>(args.grad_logits) + image * args.grad_outer_stride + at +
                place.slice * args.grad_class_stride + first * grad_step;
      const auto add = [&](auto unroll, int round) {
        constexpr int U = decltype(unroll)::value;
        A sums[2 * U];
#pragma unroll
        for (int k = 0; k < U; ++k) {
          const int j = place.slice + (first + round + k) * step;
          sums[2 * k] = sums[2 * k + 1] = 0;
          if (U == 1 && round >= rounds) break;
          A z[V], u[V], g[V];
          unpack_vector<T>(stages.vector(round + k), z);
#pragma unroll
          for (int v = 0; v < V; ++v) z[v] = std::fmin(z[v], highest[v]);
          const ClassEntry<A> entry = entry_of(j);
          dense_calibrate<Calibrated, Options>(entry, z, of_c, u);
          A scale_sum = 0, bias_sum = 0;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const bool is_target = j == target[v];
            A q = softmax[v] * exponential(u[v] - shift[v]);
            if (smoothing) q -= smooth[v] * entry.w;
            if (Calibrated && wanted.slopes) {
              // A masked class has d = 0 where it has a share of the smoothing; else q = 0.
              const A zq = z[v] == negative_infinity<A>() ? A(0) : z[v] * q;
              const A share = smoothing
                                  ? q * (finite_or_zero(entry.a * z[v] + entry.b) - target_slope[v])
                                  : entry.a * zq + q * (entry.b - target_slope[v]);
              slope[v] += is_target ? A(0) : share;
            }
            if (is_target) q = at_target[v];
            if (Calibrated && wanted.sums) {
              // A masked class adds 0, not 0 * -inf.
              const A qc = q * of_c[v];
              scale_sum += z[v] == negative_infinity<A>() ? A(0) : qc * z[v];
              bias_sum += qc;
            }
            g[v] = q * (Calibrated ? (entry.a * of_c[v] + A(1)) * factor : factor);
          }
          if (wanted.logits) Vector::store(place, grad, count, g);
          grad += grad_step;
          sums[2 * k] = scale_sum, sums[2 * k + 1] = bias_sum;
        }
        if (Calibrated && wanted.sums) {
          const int lanes = min(place.lanes, 32), lane = threadIdx.x & (lanes - 1);
          const A sum = spread_sum(sums, lane, lanes);
          if (lane < 2 * U) {
            const int index = spread_index<2 * U>(lane);
            const int j = place.slice + (first + round + index / 2) * step;
            if (j < place.classes) class_sums[index % 2 * args.classes + j] += sum;
          }
        }
      };
      int round = 0;
      for (; round + kDenseGradientUnroll <= common; round += kDenseGradientUnroll)
        add(std::integral_constant<int, kDenseGradientUnroll>{}, round);
      for (; round < most; ++round) add(std::integral_constant<int, 1>{}, round);
    }
    if (wanted.slopes) {
      Vector::write(place, memory.exchange + place.slice * positions, slope);
      __syncthreads();
#pragma unroll 1
      for (int p = threadIdx.x; p < count; p += kDenseThreads) {
        const A c = entries_of(kEntryC)[p];
        A sum = 0;
        for (int slice = 0; slice < place.slices; ++slice)
          sum += memory.exchange[slice * positions + p];
        static_cast<A*>(args.grad_confidence)[first_index + p] = c * (A(1) - c) * sum;
      }
    }
    __syncthreads();  // the tile's shared memory is the next one's
  }
  if (args.block_sums) {
    loss = block_sum(loss, memory.scratch);
    __syncthreads();
    divisor = block_sum(divisor, memory.scratch);
    if (threadIdx.x == 0) {
      args.block_sums[2 * blockIdx.x] = loss;
      args.block_sums[2 * blockIdx.x + 1] = divisor;
    }
  }
  if (wanted.sums && args.shared_sums) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * place.classes; i += kDenseThreads) {
      A sum = 0;
      for (int64_t from = i; from < DenseMemory<T>::sum_entries(args); from += 2 * args.classes)
        sum += memory.class_sums[from];
      block_class_sums[i] = sum;
    }
  }
}

}  // namespace disalign::cuda
