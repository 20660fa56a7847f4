// Upsampling kernels, forward: calibrated softmax cross-entropy of bilinearly interpolated logits.
//
// - Maps: upsample_tile.cuh. A thread keeps the sums of its outputs in registers and goes over the
//   classes, which neighbouring threads read from the same few entries of shared memory.
// - The exponentials are exp(u - u_t), as in row_warp_kernel.cuh: one pass over the classes. Where a
//   sum of the others is not moderate, its outputs are done again by their maximum.
// - Memory: the low-resolution logits once a tile that they lie around, the target once; nothing is
//   of the output's size but vectors of one entry a position.
#pragma once

#include "cuda/kernels/upsample_tile.cuh"

namespace disalign::cuda {

// Of a thread's outputs, what the loss is made of: in shared memory, where the logits were. A loop
// makes the loss, whose code would be too long for each output.
template <class A, int Rows>
struct UpsampleSums {
  enum Value { kShift, kRest, kTargetLogit, kSmooth, kTarget, kValues };
  static constexpr int kBytes = kValues * Rows * kUpsampleThreads * static_cast<int>(sizeof(A));
  A* own;  // this thread's

  __device__ __forceinline__ explicit UpsampleSums(A* memory) : own(memory + threadIdx.x) {}
  __device__ __forceinline__ A& at(Value value, int r) const {
    return own[(value * Rows + r) * kUpsampleThreads];
  }
  __device__ __forceinline__ int& target(int r) const {
    return reinterpret_cast<int&>(at(kTarget, r));
  }
};

template <class T, int Rows>
__global__ void __launch_bounds__(kUpsampleThreads, kUpsampleBlocks<T>)
    upsample_forward_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<A>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  BlockSums block_sums(reinterpret_cast<double*>(raw_memory), kUpsampleThreads);
  A* memory = reinterpret_cast<A*>(raw_memory + kBlockSumsBytes);
  const RowOptions<A> options(args);
  const bool smoothing = options.label_smoothing > 0;
  A weights = 0;
  if (smoothing) weights = weight_sum<A>(args, 0, static_cast<int>(args.classes), memory);

  for (int64_t t = blockIdx.x; t < args.tiles(); t += gridDim.x) {
    const UpsampleTile<T> tile(args, static_cast<int>(t));
    const int pitch = tile.pitch(args), rounds = tile.rounds(args, Rows);
    bool staged = false;
    for (int round = 0; round < rounds; ++round) {
      const UpsampleOutputs<T, Rows> out(args, tile, round);
      // Calls body(j, upper, difference) for the class vectors from j on.
      const auto for_classes = [&](bool wanted, auto body) {
        tile.for_staged(args, memory, staged, [&](int first, int count) {
          if (!wanted) return;
          const A* from = memory;
          for (int j = first * V; j < (first + count) * V; j += V, from += pitch) {
            A upper[V], difference[V];
            out.at_column(from, upper, difference);
            body(j, upper, difference);
          }
        });
      };
      // Calls body(r, j, u) for each output and class.
      const auto for_logits = [&](bool wanted, auto body) {
        for_classes(wanted, [&](int j, const A(&upper)[V], const A(&difference)[V]) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
#pragma unroll
            for (int r = 0; r < Rows; ++r)
              body(r, j + k, std::fma(out.down[r], difference[k], upper[k]));
          }
        });
      };

      // Of ignored outputs the shift makes all exponentials 0.
      int target[Rows];
      A target_logit[Rows], shift[Rows], product[Rows], rest[Rows], largest[Rows];
      int best[Rows];
      bool valid = false;
#pragma unroll
      for (int r = 0; r < Rows; ++r) target[r] = kNoTarget;
      if (args.target) out.read_targets(args, target);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        target_logit[r] = 0, shift[r] = 0, product[r] = -kLowest<A>, rest[r] = 0;
        valid = valid || target[r] >= 0;
      }
      tile.for_staged(args, memory, staged, [&](int first, int count) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const int k = target[r] - first * V;  // of an ignored one negative
          if (static_cast<unsigned>(k) >= static_cast<unsigned>(count * V)) continue;
          target_logit[r] = out.logit(memory, pitch, k, out.down[r]) -
                            vector_entry<A>(args.margin, target[r], A(0));
          shift[r] = target_logit[r];
          product[r] = shift_product(shift[r]);
        }
      });

      // The largest logit of the classes that are not the target, and its class.
      const auto find_largest = [&](bool wanted) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) largest[r] = kLowest<A>, best[r] = 0;
        for_logits(wanted, [&](int r, int j, A u) {
          if (j != target[r] && u > largest[r]) largest[r] = u, best[r] = j;
        });
      };
      if (args.prediction) {
        find_largest(out.count > 0);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          if (r >= out.count) continue;
          int found = best[r];
          if (target[r] >= 0) {
            // Without the margin, which only training knows. Of equals the first.
            const A u = target_logit[r] + vector_entry<A>(args.margin, target[r], A(0));
            if (u > largest[r] || (u == largest[r] && target[r] < found)) found = target[r];
          }
          args.prediction[out.position + int64_t{r} * args.x.out] = found;
        }
        if (!args.target) continue;
      }
      for_logits(valid, [&](int r, int j, A u) {
        const A e = shifted_exponential(u, product[r]);
        if (j != target[r]) rest[r] += e;
      });
      bool again = false;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if (target[r] < 0) continue;
        again |= !(rest[r] <= kModerate<A>) | !is_near(target_logit[r]) |
                 !(target_logit[r] > kNothing<A>);
        rest[r] *= correction(shift[r]);
      }
      if (__syncthreads_or(again)) {
        find_largest(again);
        if (again) {
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            if (target[r] < 0) continue;
            rest[r] = 0;
            shift[r] = larger(larger(largest[r], target_logit[r]), kLowest<A>);
            if (!(shift[r] > kNothing<A>)) shift[r] = static_cast<A>(NAN);  // no class is left
          }
        }
        for_logits(again, [&](int r, int j, A u) {
          const A e = exponential(u - shift[r]);
          if (j != target[r]) rest[r] += e;
        });
      }
      // sum_j w_j (u_j - shift) is between those of the two low-resolution rows, for a shift that all
      // outputs share.
      A base = 0, upper_sum = 0, lower_sum = 0;
      if (smoothing) {
#pragma unroll
        for (int r = 0; r < Rows; ++r)
          if (target[r] >= 0) base = shift[r];
        for_classes(valid, [&](int j, const A(&upper)[V], const A(&difference)[V]) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            if (j + k >= args.classes) continue;
            const A w = vector_entry<A>(args.weight, j + k, A(1));
            upper_sum += w * (upper[k] - base);
            lower_sum += w * (upper[k] + difference[k] - base);
          }
        });
      }

      __syncthreads();  // nobody reads the logits any more
      staged = false;
      const UpsampleSums<A, Rows> sums_of(memory);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        sums_of.at(sums_of.kShift, r) = shift[r];
        sums_of.at(sums_of.kRest, r) = rest[r];
        sums_of.at(sums_of.kTargetLogit, r) = target_logit[r];
        sums_of.target(r) = target[r];
        if (!smoothing) continue;
        // A masked class may make a sum infinite, which 0 must not be multiplied by.
        const A upper = upper_sum * (A(1) - out.down[r]);
        const A lower = out.down[r] > 0 ? lower_sum * out.down[r] : A(0);
        sums_of.at(sums_of.kSmooth, r) = upper + lower + weights * (base - shift[r]);
      }
      A loss = 0, divisor = 0;
      int64_t i = out.position;
#pragma unroll 1
      for (int r = 0; r < out.count; ++r, i += args.x.out) {
        const int at = sums_of.target(r);
        PositionSums<A> sums;
        sums.maximum = sums_of.at(sums_of.kShift, r);
        sums.rest = sums_of.at(sums_of.kRest, r);
        sums.target_logit = sums_of.at(sums_of.kTargetLogit, r);
        sums.weight = weights;
        const A target_weight = at < 0 ? A(1) : vector_entry<A>(args.weight, at, A(1));
        const A margin = at < 0 ? A(0) : vector_entry<A>(args.margin, at, A(0));
        if (smoothing) sums.smooth = sums_of.at(sums_of.kSmooth, r) - target_weight * margin;
        const A v = at < 0 ? A(0) : vector_entry<A>(args.sample_weight, i, A(1));
        const PositionResult<A> result = position_result(options, sums, target_weight);
        write_position(args, i, at, sums, result, v, A(0));
        if (args.probability) {
          // Without the margin, which only training knows.
          const A z = sums.target_logit + margin;
          const A maximum = z > sums.maximum ? z : sums.maximum;
          const A e = exponential(z - maximum);
          static_cast<A*>(args.probability)[i] =
              at < 0 ? A(0) : e / (sums.rest * exponential(sums.maximum - maximum) + e);
        }
        if (at < 0) continue;
        loss += result.loss * v;
        divisor += static_cast<A>(divisor_share(args, target_weight, v));
      }
      block_sums.add(threadIdx.x, loss, divisor);
    }
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

}  // namespace disalign::cuda
