// Upsampling kernels, forward: calibrated softmax cross-entropy of bilinearly interpolated logits.
//
// - Maps: a block has a tile of output positions, a thread one position at a time, with all
// classes.
//   The low-resolution logits around the tile, calibrated, lie in shared memory, class after class:
//   neighbouring threads read the same few entries.
// - One pass over the classes with a running maximum, as in dense_kernel.cuh.
// - Memory: the low-resolution logits once a tile that they lie around, the target once; nothing is
//   of the output's size but vectors of one entry a position.
#pragma once

#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/upsample_grid.cuh"

namespace disalign::cuda {

constexpr int kUpsampleThreads = 256;
constexpr int kUpsampleUnroll = 4;

// The low-resolution positions around a tile.
template <class T>
struct UpsampleTile {
  using A = Accumulate<T>;
  int64_t image;
  int y, x, height, width;  // of the output
  int low_y, low_x, low_height, low_width;
  const A* staged;  // [classes][low_height][low_width]

  __device__ __forceinline__ UpsampleTile(const UpsampleArgs& args, int64_t tile, A* memory)
      : staged(memory) {
    const int across = (args.x.out + args.tile_width - 1) / args.tile_width;
    const int down = (args.y.out + args.tile_height - 1) / args.tile_height;
    image = tile / (int64_t{across} * down);
    const int rest = static_cast<int>(tile % (int64_t{across} * down));
    y = rest / across * args.tile_height;
    x = rest % across * args.tile_width;
    height = min(args.tile_height, args.y.out - y);
    width = min(args.tile_width, args.x.out - x);
    low_y = args.y.source[y];
    low_x = args.x.source[x];
    low_height = min(args.y.source[y + height - 1] + 2, args.y.in) - low_y;
    low_width = min(args.x.source[x + width - 1] + 2, args.x.in) - low_x;
  }

  // By the whole block; a barrier must follow.
  __device__ __forceinline__ void stage(const UpsampleArgs& args, A* memory) const {
    const int around = low_height * low_width;
    for (int n = threadIdx.x; n < around; n += blockDim.x) {
      const LowPosition<T> low(args, image, low_y + n / low_width, low_x + n % low_width);
      for (int j = 0; j < args.classes; ++j) memory[j * around + n] = low.calibrated(args, j);
    }
  }

  __device__ __forceinline__ A logit(const UpsampleArgs& args, const Neighbours<A>& at,
                                     int j) const {
    if (!args.staged) return upsampled_logit<T>(args, image, at, j);
    const A* from = staged + j * low_height * low_width;
    const int top = (at.top - low_y) * low_width, bottom = (at.bottom - low_y) * low_width;
    const int left = at.left - low_x, right = at.right - low_x;
    return between(from[top + left], from[top + right], from[bottom + left], from[bottom + right],
                   at.down, at.across);
  }
};

template <class T>
__global__ void __launch_bounds__(kUpsampleThreads, 1)
    upsample_forward_kernel(const UpsampleArgs args) {
  using A = Accumulate<T>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  BlockSums block_sums(reinterpret_cast<double*>(raw_memory), blockDim.x);
  A* memory = reinterpret_cast<A*>(raw_memory) +
              BlockSums::entries(kUpsampleThreads) * (sizeof(double) / sizeof(A));
  const bool smoothing = args.label_smoothing > 0;
  const int classes = static_cast<int>(args.classes);
  const int64_t tiles = args.outer * ((args.y.out + args.tile_height - 1) / args.tile_height) *
                        ((args.x.out + args.tile_width - 1) / args.tile_width);
  for (int64_t k = blockIdx.x; k < tiles; k += gridDim.x) {
    const UpsampleTile<T> tile(args, k, memory);
    __syncthreads();  // the tile before is done with the memory
    if (args.staged) tile.stage(args, memory);
    __syncthreads();
    for (int p = threadIdx.x; p < tile.height * tile.width; p += blockDim.x) {
      const int y = tile.y + p / tile.width, x = tile.x + p % tile.width;
      const int64_t i = (tile.image * args.y.out + y) * args.x.out + x;
      const int t = args.target ? target_of(args, i) : kNoTarget;
      PositionSums<A> sums;
      int best = 0;
      if (t >= 0 || args.prediction) {
        const Neighbours<A> at(args, y, x);
        A greatest = kLowest<A>;
        for (int from = 0; from < classes; from += kUpsampleUnroll) {
          A u[kUpsampleUnroll];
          A maximum = sums.maximum;
#pragma unroll
          for (int n = 0; n < kUpsampleUnroll; ++n) {
            const int j = from + n;
            u[n] = negative_infinity<A>();
            if (j >= classes) continue;
            u[n] = tile.logit(args, at, j);
            if (u[n] > greatest) greatest = u[n], best = j;
            if (j == t) {
              u[n] -= vector_entry<A>(args.margin, j, A(0));
              sums.target_logit = u[n];
            }
            maximum = u[n] > maximum ? u[n] : maximum;
          }
          if (maximum > sums.maximum) sums.raise(maximum, smoothing);
#pragma unroll
          for (int n = 0; n < kUpsampleUnroll; ++n) {
            const int j = from + n;
            if (j >= classes) continue;
            sums.rest += j == t ? A(0) : exponential(u[n] - maximum);
            if (!smoothing) continue;
            const A w = vector_entry<A>(args.weight, j, A(1));
            sums.smooth += w * (u[n] - maximum);
            sums.weight += w;
          }
        }
        if (!(greatest > kNothing<A>)) sums.maximum = static_cast<A>(NAN);
      }
      if (args.prediction) args.prediction[i] = best;
      if (!args.target) continue;
      const A target_weight = t < 0 ? A(1) : vector_entry<A>(args.weight, t, A(1));
      const A v = t < 0 ? A(0) : vector_entry<A>(args.sample_weight, i, A(1));
      const PositionResult<A> result = position_result(RowOptions<A>(args), sums, target_weight);
      write_position(args, i, t, sums, result, v, A(0));
      if (args.probability) {
        // Without the margin, which only training knows.
        const A z = t < 0 ? A(0) : sums.target_logit + vector_entry<A>(args.margin, t, A(0));
        const A maximum = z > sums.maximum ? z : sums.maximum;
        const A e = exponential(z - maximum);
        static_cast<A*>(args.probability)[i] =
            t < 0 ? A(0) : e / (sums.rest * exponential(sums.maximum - maximum) + e);
      }
      if (t >= 0)
        block_sums.add(threadIdx.x, result.loss * v, divisor_share(args, target_weight, v));
    }
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

}  // namespace disalign::cuda
