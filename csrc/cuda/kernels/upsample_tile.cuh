// What a block of the upsampling kernels has of the output, and a thread of the block.
//
// - A band is the output rows of one source: they lie between the same two low-resolution rows. A
//   tile is some bands and tile_width output columns. A warp has up to Rows rows of a band, or every
//   so many of a band that has more warps (rounds, where they are too few); a lane has a column.
//   So what a class is in the column is interpolated once for Rows outputs, which are one
//   multiply-add each.
// - The low-resolution logits around the tile, calibrated, lie in shared memory, kVector classes of a
//   position next to each other: as many classes at a time as there is memory for.
#pragma once

#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/upsample_grid.cuh"

namespace disalign::cuda {

constexpr int kUpsampleThreads = 256;
constexpr int kUpsampleWarps = kUpsampleThreads / 32;
template <class T>
constexpr int kUpsampleBlocks = sizeof(T) == 8 ? 1 : 2;  // at once: of 128 registers, or 255
constexpr int kNodeThreads = 64;  // that have the low-resolution positions around a tile
constexpr int kBlockSumsBytes =
    BlockSums::entries(kUpsampleThreads) * static_cast<int>(sizeof(double));

template <class T>
struct UpsampleTile {
  using A = Accumulate<T>;
  static constexpr int V = kVector<A>;
  int64_t image;
  int band, column;      // its first ones
  int low_x, low_width;  // low-resolution columns around; rows are `band` and bands more
  int vectors;           // of classes

  // There are fewer than 2^31: each has outputs, whose targets would fill a GPU.
  __device__ __forceinline__ UpsampleTile(const UpsampleArgs& args, int tile)
      : vectors((static_cast<int>(args.classes) + V - 1) / V) {
    const int across = static_cast<int>(args.tiles_across);
    const int of_image = static_cast<int>(args.tiles_down) * across;
    image = tile / of_image;
    const int rest = tile % of_image;
    band = rest / across * args.bands;
    column = rest % across * args.tile_width;
    low_x = args.x.source[column];
    low_width = args.x.source[min(column + args.tile_width, args.x.out) - 1] + 2 - low_x;
  }

  // Elements of a class vector's positions in shared memory.
  __device__ __forceinline__ int pitch(const UpsampleArgs& args) const {
    return (args.bands + 1) * low_width * V;
  }

  // How often a warp takes so many rows of its band: the most of all. By whole warps.
  __device__ __forceinline__ int rounds(const UpsampleArgs& args, int rows) const {
    const int at_once = rows * args.warps_of_band, y = band + threadIdx.x % kUpsampleWarps;
    int count = 1;
    if (y < min(band + args.bands, args.y.in)) count = args.y.first[y + 1] - args.y.first[y];
    count = (count + at_once - 1) / at_once;
    for (int distance = kUpsampleWarps / 2; distance > 0; distance /= 2)
      count = max(count, __shfl_xor_sync(kFullWarp, count, distance));
    return max(count, 1);
  }

  // So many class vectors from `first` on, by the whole block: 64 threads the positions of a vector.
  // Beyond the logits' edges the last are repeated, where their weight is 0. Returns whether what this
  // thread has staged is finite.
  __device__ __forceinline__ bool stage(const UpsampleArgs& args, int first, int count,
                                        A* memory) const {
    const int around = (args.bands + 1) * low_width;
    bool finite = true;
    for (int n = threadIdx.x % kNodeThreads; n < around; n += kNodeThreads) {
      const int row = n / low_width, column = n - row * low_width;
      const LowPosition<T> low(args, image, min(band + row, args.y.in - 1),
                               min(low_x + column, args.x.in - 1));
      for (int v = threadIdx.x / kNodeThreads; v < count; v += kUpsampleThreads / kNodeThreads) {
        const int j = (first + v) * V;
        A u[V];
        low.calibrate(args, j, static_cast<int>(args.classes) - j, u);
        store_shared(memory + (v * around + n) * V, u);
#pragma unroll
        for (int k = 0; k < V; ++k) finite = finite && u[k] <= -kLowest<A>;
      }
    }
    return finite;
  }

  // Calls body(first, count) for all class vectors, so many at a time, when they are in `memory`.
  // staged: whether all are there already, and whether they are then. By the whole block. Returns
  // whether what this thread has staged is finite.
  template <class Body>
  __device__ __forceinline__ bool for_staged(const UpsampleArgs& args, A* memory, bool& staged,
                                             Body body) const {
    bool finite = true;
    for (int first = 0; first < vectors; first += args.staged_vectors) {
      const int count = min(args.staged_vectors, vectors - first);
      if (!staged) {
        __syncthreads();  // others still read what was there
        finite = stage(args, first, count, memory) && finite;
        __syncthreads();
      }
      staged = count == vectors;
      body(first, count);
    }
    return finite;
  }
};

// A thread's outputs: up to Rows neighbouring ones of a column, of one band.
template <class T, int Rows>
struct UpsampleOutputs {
  using A = Accumulate<T>;
  static constexpr int V = kVector<A>;
  int64_t position;  // of its first output
  int y, count;
  A across;
  A down[Rows];
  int place;  // of the upper left neighbour in a class vector's positions
  int low_width;

  __device__ __forceinline__ UpsampleOutputs(const UpsampleArgs& args, const UpsampleTile<T>& tile,
                                             int round)
      : low_width(tile.low_width) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / args.warps_of_band, source = tile.band + row;
    const int x = tile.column + lane;
    const bool here = source < args.y.in && lane < args.tile_width && x < args.x.out;
    y = 0, count = 0;
    if (here) {
      y = args.y.first[source] + (round * args.warps_of_band + warp % args.warps_of_band) * Rows;
      count = max(min(args.y.first[source + 1] - y, Rows), 0);
    }
    across = count > 0 ? static_cast<const A*>(args.x.weight)[x] : A(0);
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      down[r] = r < count ? static_cast<const A*>(args.y.weight)[y + r] : A(0);
    position = (tile.image * args.y.out + y) * args.x.out + x;
    place = row * low_width + (count > 0 ? args.x.source[x] - tile.low_x : 0);
  }

  // kNoTarget for those that are ignored, and beyond the last.
  __device__ __forceinline__ void read_targets(const UpsampleArgs& args,
                                               int (&target)[Rows]) const {
    switch (args.target_type) {
      case IndexType::kUInt8:
        return read_targets<uint8_t>(args, target);
      case IndexType::kInt16:
        return read_targets<int16_t>(args, target);
      case IndexType::kInt32:
        return read_targets<int32_t>(args, target);
      default:
        return read_targets<int64_t>(args, target);
    }
  }
  template <class Index>
  __device__ __forceinline__ void read_targets(const UpsampleArgs& args,
                                               int (&target)[Rows]) const {
    const Index* from = static_cast<const Index*>(args.target) + position;
    Index read[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r, from += args.x.out) read[r] = r < count ? *from : Index(0);
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      target[r] = r < count ? checked_target(args, read[r]) : kNoTarget;
  }

  // A class vector at this column: on the upper of the two low-resolution rows, and the
  // difference of the lower one. from: its positions.
  __device__ __forceinline__ void at_column(const A* from, A (&upper)[V],
                                            A (&difference)[V]) const {
    from += place * V;
    A left[V], right[V], low_left[V], low_right[V];
    load_shared(from, left);
    load_shared(from + V, right);
    load_shared(from + low_width * V, low_left);
    load_shared(from + low_width * V + V, low_right);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      upper[k] = interpolated(left[k], right[k], across);
      difference[k] = interpolated(low_left[k], low_right[k], across) - upper[k];
    }
  }

  // Class k of those whose class vectors are at `from`.
  __device__ __forceinline__ A logit(const A* from, int pitch, unsigned k, A down_of_row) const {
    from += k / V * pitch + place * V + k % V;
    const A upper = interpolated(from[0], from[V], across);
    const A lower = interpolated(from[low_width * V], from[low_width * V + V], across);
    return std::fma(down_of_row, lower - upper, upper);
  }
};

}  // namespace disalign::cuda
