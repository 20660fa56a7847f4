// Dense kernel: calibrated softmax cross-entropy over class planes, forward and backward.
//
// - Maps, and how the logits come into shared memory: dense_tile.cuh.
// - First pass, of forward: a thread's classes, by the target's logit, which spares them their
//   maximum; then a thread a position adds up the slices, and makes the loss and the factors of its
//   gradient. A tile where the sum of a position's others is not moderate is read once more, by
//   its maxima. Targets are -inf in shared memory meanwhile: no comparison an element.
// - Details (row_details.cuh): after a stage's sums, by all threads, each for a position and some of the
//   stage's classes.
// - Second pass, of backward, and of forward where gradients are wanted: the exponentials once more,
//   from shared memory; the logits' gradient is written; each thread keeps sums of its classes, which
//   are added up at the end.
// - Memory: a tile that fits into a stage is read once, in either direction; else once a pass.
//   grad_logits may be the logits: a position is one block's alone, and its target's logit is read
//   before the block writes.
#pragma once

#include "cuda/kernels/dense_parts.cuh"

namespace disalign::cuda {

template <class T, bool Calibrated, bool Whole, bool Options>
__global__ void __launch_bounds__(kDenseThreads, (kDenseBlocks<T, Calibrated, Whole>))
    dense_kernel(const DenseArgs given) {
  const DenseArgs args = known<Calibrated, Options>(given);
  using A = Accumulate<T>;
  using Vector = DenseVector<T, Whole>;
  constexpr int V = kVector<T>;
  // Classes at a time: what fits into registers.
  [[maybe_unused]] constexpr int kUnroll = V == 8 ? (Calibrated ? 1 : 2) : 4;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const DenseMemory<T> memory(args, raw_memory);
  const DensePlace place(args);
  const RowOptions<A> options(args);
  const bool smoothing = Options && options.label_smoothing > 0;
  const DenseWanted wanted = {args.grad_logits && !is_made<A>(args),
                              Calibrated && args.grad_confidence,
                              Calibrated && args.class_gradients};
  const bool second_pass = wanted.logits || wanted.confidence || wanted.sums;
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
  const auto entry_of = [&](int j) -> ClassEntry<A> {
    if constexpr (!Calibrated && !Options) return {A(0), A(0), A(0), A(0)};
    return args.table ? memory.table[j] : ClassEntry<A>::of(args, j);
  };
  // u of z, but for the target's margin.
  const auto calibrate = [](const ClassEntry<A>& entry, A z, A c) {
    A u = Calibrated ? calibrated(z, entry.a, entry.b, c) : z;
    if constexpr (Options) u += entry.o;
    return u;
  };
  // This thread's of its first class; the next one's are kDenseThreads further on.
  ClassSum<A>* const class_sums =
      threadIdx.x + (args.shared_sums ? memory.class_sums
                                      : static_cast<ClassSum<A>*>(args.thread_sums) +
                                            blockIdx.x * DenseMemory<T>::sum_entries(args));
  if (wanted.sums) {
    for (int k = 0; k < place.mine; ++k) class_sums[k * kDenseThreads] = {A(0), A(0)};
  }
  const int positions = place.lanes * V, step = place.slices;
  // Details: a position's classes are divided among 2^part_bits threads.
  constexpr int kVectorBits = V == 8 ? 3 : V / 2;  // log2(V)
  const int position_bits = args.lane_bits + kVectorBits;
  const int part_bits = max(0, kDenseThreadBits - position_bits);
  const auto entries_of = [&](int which) { return memory.positions + which * positions; };

  DenseStages<T, Whole> stages(args, place, memory.stages, args.backward ? 1 : 1 + second_pass);
  double loss = 0, divisor = 0;
  while (stages.more()) {
    const int64_t at = stages.first_position();
    const int image = stages.image(), count = stages.count();
    const int64_t first_index = image * args.inner + at;
    const T* const logits = static_cast<const T*>(args.logits) + image * args.outer_stride + at;
    // The loops over positions, a thread each, are of barriers on both sides.
#pragma unroll 1
    for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
      const int t = p < count ? target_of(args, first_index + p) : kNoTarget;
      memory.targets[p] = t;
      if constexpr (Calibrated)
        entries_of(kEntryC)[p] = is_valid(t) || (args.details && p < count)
                                     ? confidence_of<A>(args, first_index + p)
                                     : A(0);
    }
    stages.arrive();
    // In forward what the first pass takes off, in backward all factors; of the target, what shall
    // stand in its place.
#pragma unroll 1
    for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
      const int t = memory.targets[p];
      PositionFactors<A> factors;
      A z_t = 0;
      factors.maximum = 0;
      if (is_valid(t)) {
        const int staged = stages.offset(t, p, 0);
        z_t = to_accumulate(staged >= 0 ? stages.element(staged)
                                        : load_one(logits + t * args.class_stride + p));
        const ClassEntry<A> entry = entry_of(t);
        const A c = Calibrated ? entries_of(kEntryC)[p] : A(0);
        const A u_t = calibrate(entry, z_t, c) - vector_entry<A>(args.margin, t, A(0));
        factors.maximum = u_t;
        if (!args.backward) {
          if (staged >= 0) stages.element(staged) = from_accumulate<T>(negative_infinity<A>());
        } else {
          factors = position_factors(args, first_index + p, t, c, weights, inverse,
                                     [&](int) -> TargetLogit<A> { return {z_t, u_t}; });
          factors.at_target = factors.softmax * exponential(u_t - factors.maximum) -
                              factors.smooth * vector_entry<A>(args.weight, t, A(1)) -
                              factors.at_target;
          // A masked class adds 0 to the sums, not its gradient times -inf.
          if (wanted.sums || wanted.confidence) {
            factors.target_slope = finite_or_zero(entry.a * z_t + entry.b);
            if (staged >= 0 && z_t == negative_infinity<A>())
              stages.element(staged) = from_accumulate<T>(A(0));
          }
        }
      }
      if (second_pass) {
        write_factors(entries_of(0), positions, p, factors);
        memory.target_z[p] = z_t;
      } else {
        entries_of(kEntryShift)[p] = factors.maximum;
        if (args.details) memory.target_z[p] = z_t;
      }
    }
    __syncthreads();
    int target[V];
    A of_c[V];
    Vector::read(place, memory.targets, target);
    if constexpr (Calibrated) Vector::read(place, entries_of(kEntryC), of_c);
    // In the places of the targets that the stage has.
    const auto set_targets = [&](int first, auto value_of) {
#pragma unroll 1
      for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
        const int t = memory.targets[p];
        const int staged = is_valid(t) ? stages.offset(t, p, first) : -1;
        if (staged >= 0) stages.element(staged) = from_accumulate<T>(value_of(p));
      }
      __syncthreads();
    };
    const auto mask_targets = [&](int first) {
      set_targets(first, [](int) { return negative_infinity<A>(); });
    };
    const auto restore_targets = [&](int first) {  // 0 for -inf, which would make its sums NaN
      set_targets(first, [&](int p) {
        return memory.target_z[p] == negative_infinity<A>() ? A(0) : memory.target_z[p];
      });
    };

    if (!args.backward) {
      A product[V], rest[V], smooth[V];
      Vector::read(place, entries_of(kEntryShift), product);
#pragma unroll
      for (int v = 0; v < V; ++v) product[v] = shift_product(product[v]), rest[v] = smooth[v] = 0;
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
        const int first = chunk * args.rounds, rounds = min(args.rounds, place.mine - first);
        if (chunk > 0) {
          stages.arrive();
          mask_targets(first);
        }
        int j = place.slice + first * step;
#pragma unroll kUnroll
        for (int round = 0; round < rounds; ++round, j += step) {
          A z[V];
          unpack_vector<T>(stages.vector(round), z);
          const ClassEntry<A> entry = entry_of(j);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A u = calibrate(entry, z[v], of_c[v]);
            rest[v] += shifted_exponential(u, product[v]);
            if (smoothing && j != target[v])
              smooth[v] += entry.w * (u - entries_of(kEntryShift)[Vector::position(place, v)]);
          }
        }
        if (args.details) {
          const int end = min(place.classes, (first + args.rounds) * step);
#pragma unroll 1
          for (int n = threadIdx.x; n < positions << part_bits; n += kDenseThreads) {
            const int p = n & (positions - 1), t = memory.targets[p];
            const A c = Calibrated ? entries_of(kEntryC)[p] : A(0);
            RowDetails<A> found;
            if (chunk > 0) found = RowDetails<A>::read(memory.exchange + n, positions << part_bits);
#pragma unroll 1
            for (int k = first * step + (n >> position_bits); k < end; k += 1 << part_bits) {
              const A z = k == t ? memory.target_z[p]
                                 : to_accumulate(stages.element(stages.offset(k, p, first)));
              found.add(calibrate(entry_of(k), z, c), k, args.entropy != nullptr);
            }
            found.write(memory.exchange + n, positions << part_bits);
          }
        }
      }
      if (args.details) {
        __syncthreads();
#pragma unroll 1
        for (int p = threadIdx.x; p < count; p += kDenseThreads) {
          const int t = memory.targets[p];
          const auto found = all_details(memory.exchange + p, 1 << part_bits, positions);
          found.write(args, first_index + p, is_valid(t));
          if (Calibrated && !is_valid(t)) entries_of(kEntryC)[p] = 0;  // it has no gradients
        }
        __syncthreads();
        if constexpr (Calibrated) Vector::read(place, entries_of(kEntryC), of_c);
      }
      // [values][slices][positions]
      const int of_slices = place.slices * positions;
      A* const exchange = memory.exchange + place.slice * positions;
      Vector::write(place, exchange, rest);
      if (smoothing) Vector::write(place, exchange + of_slices, smooth);
      __syncthreads();
      const auto finish = [&](int p, int t, A u_t, PositionSums<A>& sums) {
        const A w_t = vector_entry<A>(args.weight, t, A(1));
        const A v_i = vector_entry<A>(args.sample_weight, first_index + p, A(1));
        sums.target_logit = u_t;
        sums.weight = weights;
        if (smoothing) sums.smooth += w_t * (u_t - sums.maximum);
        const PositionResult<A> result = position_result(options, sums, w_t);
        write_statistics(args, first_index + p, t, sums, result, v_i);
        loss += static_cast<double>(result.loss * v_i);
        divisor += divisor_share(args, w_t, v_i);
        if (!second_pass) return;
        PositionFactors<A> factors;
        factors.maximum = sums.maximum;
        factors.softmax = v_i * result.softmax, factors.smooth = v_i * result.smooth;
        factors.at_target = v_i * result.at_target;
        const ClassEntry<A> entry = entry_of(t);
        factors.target_slope = finite_or_zero(entry.a * memory.target_z[p] + entry.b);
        write_factors(entries_of(0), positions, p, factors);
      };
      unsigned again = 0;  // a bit for each of this thread's positions
#pragma unroll 1
      for (int p = threadIdx.x, bit = 1; p < positions; p += kDenseThreads, bit *= 2) {
        const int t = memory.targets[p];
        if (is_valid(t)) {
          PositionSums<A> sums;
          sums.maximum = entries_of(kEntryShift)[p];
          const A* from = memory.exchange + p;
#pragma unroll 4
          for (int slice = 0; slice < place.slices; ++slice, from += positions) {
            sums.rest += *from;
            if (smoothing) sums.smooth += from[of_slices];
          }
          if (sums.rest <= kModerate<A> && is_near(sums.maximum)) {
            sums.rest *= correction(sums.maximum);
            finish(p, t, sums.maximum, sums);
          } else {
            again |= bit;
          }
        } else if (p < count) {
          write_statistics(args, first_index + p, t, PositionSums<A>(), PositionResult<A>(), A(0));
        }
      }
      if (__syncthreads_or(again != 0)) {
        DenseSums<A, V> by_maximum;
        const T* from = logits + place.slice * args.class_stride + Vector::position(place, 0);
#pragma unroll 1
        for (int j = place.slice; j < place.classes; j += step, from += step * args.class_stride) {
          A z[V];
          unpack_vector<T>(Vector::load(place, from, count), z);
          const ClassEntry<A> entry = entry_of(j);
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (j != target[v])
              by_maximum.add(v, calibrate(entry, z[v], of_c[v]), entry.w, smoothing);
        }
        Vector::write(place, exchange, by_maximum.maximum);
        Vector::write(place, exchange + of_slices, by_maximum.rest);
        if (smoothing) {
          Vector::write(place, exchange + 2 * of_slices, by_maximum.smooth);
          Vector::write(place, exchange + 3 * of_slices, by_maximum.weight);
        }
        __syncthreads();
#pragma unroll 1
        for (int p = threadIdx.x, bit = 1; p < positions; p += kDenseThreads, bit *= 2) {
          if (!(again & bit)) continue;
          const A u_t = entries_of(kEntryShift)[p];
          PositionSums<A> sums = DenseSums<A, V>::of_position(memory.exchange + p, place.slices,
                                                              positions, u_t, smoothing);
          finish(p, memory.targets[p], u_t, sums);
        }
      }
    }
    if (!second_pass) continue;
    if (!args.backward) {
      if (args.chunks == 1)
        restore_targets(0);
      else
        __syncthreads();
    }
    A shift[V], softmax[V], at_target[V], slope[V], target_slope[V], highest[V];
    Vector::read(place, entries_of(kEntryShift), shift);
    Vector::read(place, entries_of(kEntrySoftmax), softmax);
    Vector::read(place, entries_of(kEntryTarget), at_target);
    // The sum of q over the classes is 0, but for the rounding of the target's in backward.
    if (Calibrated && args.backward) Vector::read(place, entries_of(kEntrySlope), target_slope);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!Calibrated || !args.backward) target_slope[v] = 0;
      slope[v] = 0;
      // Whatever is in an ignored position's logits, its exponentials are 0.
      highest[v] = is_valid(target[v]) ? -negative_infinity<A>() : negative_infinity<A>();
    }
    const A factor = args.backward ? A(1) : inverse;
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      const int first = chunk * args.rounds, rounds = min(args.rounds, place.mine - first);
      if (args.chunks > 1) {
        if (chunk > 0 || !args.backward) stages.arrive();
        restore_targets(first);
      }
      const int64_t grad_step = step * args.grad_class_stride;
      T* grad = static_cast<T*>(args.grad_logits) + image * args.grad_outer_stride + at +
                place.slice * args.grad_class_stride + first * grad_step;
      ClassSum<A>* sums_of_class = class_sums + first * kDenseThreads;
      int j = place.slice + first * step;
#pragma unroll(V == 8 ? 1 : 2)
      for (int round = 0; round < rounds; ++round, j += step) {
        A z[V], q[V];
        unpack_vector<T>(stages.vector(round), z);
        const ClassEntry<A> entry = entry_of(j);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          z[v] = std::fmin(z[v], highest[v]);
          q[v] = calibrate(entry, z[v], of_c[v]);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) q[v] = softmax[v] * exponential(q[v] - shift[v]);
        if (smoothing) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            q[v] -= entries_of(kEntrySmooth)[Vector::position(place, v)] * entry.w;
        }
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (j == target[v]) q[v] = at_target[v];
        if (Calibrated && (wanted.confidence || wanted.sums)) {
          ClassSum<A> of_class = {A(0), A(0)};
          if (wanted.sums) of_class = *sums_of_class;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            // A masked class adds 0: its q is, but for its share of the smoothing.
            const bool masked = smoothing && z[v] == negative_infinity<A>();
            const A zq = masked ? A(0) : larger(z[v], kLowest<A>) * q[v];
            const A b = (masked ? A(0) : entry.b) - target_slope[v];
            slope[v] = std::fma(entry.a, zq, std::fma(b, q[v], slope[v]));
            of_class.scale += of_c[v] * zq;
            of_class.bias += of_c[v] * q[v];
          }
          if (wanted.sums) *sums_of_class = of_class;
          sums_of_class += kDenseThreads;
        }
        if (wanted.logits) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            q[v] *= Calibrated ? (entry.a * of_c[v] + A(1)) * factor : factor;
          Vector::store(place, grad, count, q);
          grad += grad_step;
        }
      }
    }
    if (wanted.confidence) {
      Vector::write(place, memory.exchange + place.slice * positions, slope);
      __syncthreads();
#pragma unroll 1
      for (int p = threadIdx.x; p < count; p += kDenseThreads) {
        const int t = memory.targets[p];
        const A c = entries_of(kEntryC)[p];
        A sum = 0;
        for (int slice = 0; slice < place.slices; ++slice)
          sum += memory.exchange[slice * positions + p];
        // A masked target had a slope of b in the loop, and has none.
        if (is_valid(t) && memory.target_z[p] == negative_infinity<A>())
          sum -= entries_of(kEntryTarget)[p] * entry_of(t).b;
        static_cast<A*>(args.grad_confidence)[first_index + p] = c * (A(1) - c) * sum;
      }
    }
    __syncthreads();  // the tile's shared memory is the next one's
  }
  if (args.block_sums) write_block_share<A>(args, loss, divisor, memory.scratch);
  if (wanted.sums) write_dense_sums<T>(args, place, class_sums - threadIdx.x);
}

}  // namespace disalign::cuda
