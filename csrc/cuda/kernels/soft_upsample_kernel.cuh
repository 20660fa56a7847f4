// Upsampling kernels whose targets are class probabilities at the output's size, forward and backward.
//
// - Maps: upsample_tile.cuh. A thread goes over the classes with its outputs' shares of the sums
//   (soft_position.cuh) in registers, and reads the probabilities of a class and an output row next to
//   those of its neighbours.
// - Forward: the maxima of u, from shared memory alone, then the sums. Backward: what a thread's outputs
//   give to the two low-resolution rows; upsample_backward_kernel.cuh adds the columns and the tiles.
// - Memory: the probabilities once in either direction, the low-resolution logits once a tile that they
//   lie around; nothing is of the output's size but vectors of one entry a position.
#pragma once

#include "cuda/kernels/soft_position.cuh"
#include "cuda/kernels/upsample_backward_kernel.cuh"

namespace disalign::cuda {

// b_j of a thread's outputs.
template <class T, int Rows>
class OutputProbabilities {
 public:
  using A = Accumulate<T>;
  static constexpr int V = kVector<A>;

  __device__ __forceinline__ OutputProbabilities(const UpsampleArgs& args, int64_t image,
                                                 const UpsampleOutputs<T, Rows>& out)
      : args_(args),
        options_(args),
        first_(image * args.probability_outer_stride + out.position - image * args.inner),
        count_(out.count) {}

  // Of the classes from j on; 0 of those that there are not. Of outputs beyond the last anything.
  __device__ __forceinline__ void load(int j, A (&b)[V][Rows]) const {
    if (sizeof(T) == 2 && !args_.probabilities_of_a)
      load_of<T>(j, b);
    else
      load_of<A>(j, b);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool there = j + k < static_cast<int>(args_.classes);
      const A w = there ? vector_entry<A>(args_.weight, j + k, A(1)) : A(0);
#pragma unroll
      for (int r = 0; r < Rows; ++r) b[k][r] = w * options_.of(b[k][r]);
    }
  }

 private:
  template <class Y>
  __device__ __forceinline__ void load_of(int j, A (&b)[V][Rows]) const {
    const Y* from =
        static_cast<const Y*>(args_.probabilities) + first_ + j * args_.probability_class_stride;
#pragma unroll
    for (int k = 0; k < V; ++k, from += args_.probability_class_stride) {
      const bool there = j + k < static_cast<int>(args_.classes);
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        b[k][r] = there && r < count_ ? to_accumulate(load_one(from + r * args_.x.out)) : A(0);
    }
  }

  const UpsampleArgs& args_;
  SoftOptions<A> options_;
  int64_t first_;  // of class 0 at the first output
  int count_;
};

template <class T, int Rows>
__global__ void __launch_bounds__(kUpsampleThreads, kUpsampleBlocks<T>)
    soft_upsample_forward_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<A>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  BlockSums block_sums(reinterpret_cast<double*>(raw_memory), kUpsampleThreads);
  A* memory = reinterpret_cast<A*>(raw_memory + kBlockSumsBytes);

  for (int64_t t = blockIdx.x; t < args.tiles(); t += gridDim.x) {
    const UpsampleTile<T> tile(args, static_cast<int>(t));
    const int pitch = tile.pitch(args), rounds = tile.rounds(args, Rows);
    bool staged = false;
    for (int round = 0; round < rounds; ++round) {
      const UpsampleOutputs<T, Rows> out(args, tile, round);
      const OutputProbabilities<T, Rows> probabilities(args, tile.image, out);
      // Calls body(j, upper, difference) for the class vectors from j on.
      const auto for_classes = [&](auto body) {
        tile.for_staged(args, memory, staged, [&](int first, int count) {
          if (out.count == 0) return;
          const A* from = memory;
          for (int j = first * V; j < (first + count) * V; j += V, from += pitch) {
            A upper[V], difference[V];
            out.at_column(from, upper, difference);
            body(j, upper, difference);
          }
        });
      };
      PositionSums<A> sums[Rows];
      for_classes([&](int, const A(&upper)[V], const A(&difference)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int r = 0; r < Rows; ++r)
            sums[r].maximum =
                larger(sums[r].maximum, std::fma(out.down[r], difference[k], upper[k]));
        }
      });
#pragma unroll
      for (int r = 0; r < Rows; ++r)  // no class is left
        if (!(sums[r].maximum > kNothing<A>)) sums[r].maximum = static_cast<A>(NAN);
      for_classes([&](int j, const A(&upper)[V], const A(&difference)[V]) {
        A b[V][Rows];
        probabilities.load(j, b);
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            const A below = std::fma(out.down[r], difference[k], upper[k]) - sums[r].maximum;
            sums[r].rest += exponential(below);
            sums[r].smooth += soft_term(b[k][r], below);
            sums[r].weight += b[k][r];
          }
        }
      });
      A loss = 0, divisor = 0;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if (r >= out.count) continue;
        const int64_t i = out.position + int64_t{r} * args.x.out;
        const A v_i = vector_entry<A>(args.sample_weight, i, A(1));
        loss += write_soft_position(args, i, sums[r], v_i);
        divisor += static_cast<A>(divisor_share(args, A(1), v_i));
      }
      block_sums.add(threadIdx.x, loss, divisor);
    }
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

template <class T, int Rows>
__global__ void __launch_bounds__(kUpsampleThreads, kUpsampleBlocks<T>)
    soft_upsample_backward_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<A>;
  using Exchange = UpsampleExchange<A, Rows>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const Exchange exchange(reinterpret_cast<A*>(raw_memory));
  A* memory = reinterpret_cast<A*>(raw_memory + Exchange::kBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const A shared = shared_scale(args, inverse_denominator<A>(args));

  for (int64_t t = blockIdx.x; t < args.tiles(); t += gridDim.x) {
    const UpsampleTile<T> tile(args, static_cast<int>(t));
    const int pitch = tile.pitch(args), rounds = tile.rounds(args, Rows);
    bool staged = false;
    if (threadIdx.x < 32 && tile.column + lane < args.x.out)
      exchange.across[lane] = static_cast<const A*>(args.x.weight)[tile.column + lane];
    for (int round = 0; round < rounds; ++round) {
      const UpsampleOutputs<T, Rows> out(args, tile, round);
      const OutputProbabilities<T, Rows> probabilities(args, tile.image, out);
      SoftFactors<A> factors[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        if (r < out.count)
          factors[r] = soft_factors(args, out.position + int64_t{r} * args.x.out, shared);
      const UpsampleNode first_node(args, tile, threadIdx.x % kNodeThreads);
      // Of a class vector, what this thread's outputs give to the two rows in its column.
      const auto add_outputs = [&](int j, const A* from, int slot) {
        A upper[V], difference[V], sum[V], lower[V], b[V][Rows];
        probabilities.load(j, b);
        out.at_column(from, upper, difference);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          sum[k] = 0, lower[k] = 0;
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            const A u = std::fma(out.down[r], difference[k], upper[k]);
            A q = factors[r].softmax * exponential(u - factors[r].shift);
            q = r < out.count ? q - factors[r].smooth * b[k][r] : A(0);
            sum[k] += q;
            lower[k] = std::fma(q, out.down[r], lower[k]);
          }
          sum[k] -= lower[k];
        }
        store_shared(exchange.sums(slot, warp, 0) + Exchange::slot(lane), sum);
        store_shared(exchange.sums(slot, warp, 1) + Exchange::slot(lane), lower);
      };
      tile.for_staged(args, memory, staged, [&](int first, int count) {
        for (int begin = 0; begin < count; begin += kUpsampleExchanged) {
          const int some = min(count - begin, kUpsampleExchanged);
          const A* from = memory + begin * pitch;
          for (int slot = 0; slot < some; ++slot, from += pitch)
            add_outputs((first + begin + slot) * V, from, slot);
          __syncthreads();
          add_columns<T>(args, exchange, tile, first_node, t, first + begin, some, round > 0);
          __syncthreads();
        }
      });
    }
  }
}

}  // namespace disalign::cuda
