// How a block of the dense kernels walks over positions and classes.
//
// - Logits (N, C, S), the positions of a class plane next to each other. A thread has one position
//   and every `slices`-th class: neighbouring threads read neighbouring positions of one class. A
//   tile is as many positions as the block has threads for, 32 for each `slices` warps. Blocks take
//   tiles in turn.
// - Class sums go over positions: for these a thread has a class, and the tile's logits lie in
//   shared memory, if they fit, so that they are read from global memory once.
#pragma once

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/position.cuh"

namespace disalign::cuda {

constexpr int kDenseThreads = 256;
constexpr int kDenseUnroll = 4;  // classes whose loads are on their way together

constexpr int dense_positions(int slices) { return kDenseThreads / slices; }  // of a tile

// Shared memory of a block, in this order.
template <class A>
struct DenseMemory {
  static constexpr int kShared = 5;  // vectors of one entry a position, see ClassPhase

  double* block_sums;
  A* exchange;   // [PositionSums::kValues][slices][positions], where there are slices; ClassPhase's
                 // [2][threads]
  A* positions;  // [kShared][positions]
  int* targets;  // [positions]
  A* logits;     // [classes][stride], where resident

  // A column more than there are positions: threads with neighbouring classes read other banks.
  static __host__ __device__ constexpr int stride(int positions) { return positions + 1; }

  static __host__ __device__ int exchange_entries(const DenseArgs& args) {
    if (args.slices > 1) return PositionSums<A>::kValues * kDenseThreads;
    return args.class_gradients ? 2 * kDenseThreads : 0;
  }

  static __host__ __device__ int64_t bytes(const DenseArgs& args) {
    const int64_t positions = kDenseThreads / args.slices;
    const int64_t exchange = exchange_entries(args);
    const int64_t entries =
        exchange + kShared * positions +
        (args.resident ? args.classes * stride(static_cast<int>(positions)) : 0);
    return BlockSums::entries(static_cast<int>(positions)) * static_cast<int64_t>(sizeof(double)) +
           entries * static_cast<int64_t>(sizeof(A)) +
           positions * static_cast<int64_t>(sizeof(int));
  }

  __device__ __forceinline__ DenseMemory(const DenseArgs& args, unsigned char* memory) {
    const int count = kDenseThreads / args.slices;
    block_sums = reinterpret_cast<double*>(memory);
    exchange = reinterpret_cast<A*>(block_sums + BlockSums::entries(count));
    positions = exchange + exchange_entries(args);
    logits = positions + kShared * count;
    targets = reinterpret_cast<int*>(logits +
                                     (args.resident ? args.classes * stride(count) : int64_t{0}));
  }
};

// A thread's place in the tile, and the tile's in the logits.
template <class T>
struct DenseTile {
  int positions, position, slice, slices, classes;
  int64_t tiles, tile;
  // Of the present tile.
  int64_t offset;  // of its first position in class 0 of the logits
  int64_t grad;    // and in those of their gradient
  int64_t first;   // of its first position, counted over all images
  int count;       // positions that there are
  bool inside;     // whether this thread's is one of them

  __device__ __forceinline__ explicit DenseTile(const DenseArgs& args)
      : positions(kDenseThreads / args.slices),
        // A warp has 32 positions of one slice.
        position(threadIdx.x / (32 * args.slices) * 32 + threadIdx.x % 32),
        slice(threadIdx.x / 32 % args.slices),
        slices(args.slices),
        classes(static_cast<int>(args.classes)),
        tiles(args.outer * args.image_tiles),
        tile(blockIdx.x) {}

  __device__ __forceinline__ void enter(const DenseArgs& args) {
    const int64_t image = tile / args.image_tiles;
    const int64_t at = (tile - image * args.image_tiles) * positions;
    offset = image * args.outer_stride + at;
    grad = image * args.grad_outer_stride + at;
    first = image * args.inner + at;
    const int64_t left = args.inner - at;
    count = static_cast<int>(left < positions ? left : positions);
    inside = position < count;
  }

  __device__ __forceinline__ int64_t index() const { return first + position; }
  __device__ __forceinline__ const T* logit(const DenseArgs& args, int j) const {
    return static_cast<const T*>(args.logits) + offset + j * args.class_stride;
  }
};

// Over a position's slices; each of its threads gets it. By the whole block.
template <class A, class T>
__device__ __forceinline__ A sum_of_slices(const DenseMemory<A>& memory, const DenseTile<T>& tile,
                                           A value) {
  if (tile.slices == 1) return value;
  memory.exchange[tile.slice * tile.positions + tile.position] = value;
  __syncthreads();
  value = 0;
  for (int slice = 0; slice < tile.slices; ++slice)
    value += memory.exchange[slice * tile.positions + tile.position];
  __syncthreads();
  return value;
}

// The class sums of a tile. The block's positions put what q_j needs into shared memory; then each
// thread takes a class (and its every blockDim.x-th after it) through all positions. Sums over the
// block's tiles are kept in global memory, each class by the same thread.
template <class T, bool Forward>
class ClassPhase {
 public:
  using A = Accumulate<T>;

  __device__ __forceinline__ ClassPhase(const DenseArgs& args, const DenseMemory<A>& memory)
      : sums_(static_cast<A*>(args.class_sums) + int64_t{2} * blockIdx.x * args.classes),
        memory_(memory) {
    if (!args.class_sums) return;  // none are wanted
    for (int64_t i = threadIdx.x; i < args.classes; i += blockDim.x)
      sums_[i] = sums_[args.classes + i] = A(0);
  }

  // By one thread a position. at_target: in forward q_t itself, else what is taken off it.
  __device__ __forceinline__ void put(const DenseTile<T>& tile, int target, A c, A maximum,
                                      A softmax, A smooth, A at_target) {
    const A values[DenseMemory<A>::kShared] = {c, maximum, softmax, smooth, at_target};
#pragma unroll
    for (int k = 0; k < DenseMemory<A>::kShared; ++k)
      memory_.positions[k * tile.positions + tile.position] = values[k];
    memory_.targets[tile.position] = target;
  }

  // By the whole block, between two barriers. Where there are fewer classes than threads, several
  // threads share a class: each takes a part of the positions, added up in their order.
  __device__ __forceinline__ void run(const DenseArgs& args, const DenseTile<T>& tile) {
    const int threads = blockDim.x, id = threadIdx.x;
    const int parts = tile.classes < threads ? threads / tile.classes : 1;
    const int step = parts > 1 ? tile.classes : threads;
    const int part = id / step;
    A scale = 0, bias = 0;
    for (int j = part < parts ? id % step : tile.classes; j < tile.classes; j += step) {
      scale = bias = 0;
      add(args, tile, j, tile.count * part / parts, tile.count * (part + 1) / parts, scale, bias);
      if (parts > 1) break;
      sums_[j] += scale;
      sums_[tile.classes + j] += bias;
    }
    if (parts == 1) return;
    memory_.exchange[id] = scale;
    memory_.exchange[threads + id] = bias;
    __syncthreads();
    if (part > 0) return;
    for (int other = 1; other < parts; ++other) {
      scale += memory_.exchange[other * tile.classes + id];
      bias += memory_.exchange[threads + other * tile.classes + id];
    }
    sums_[id] += scale;
    sums_[tile.classes + id] += bias;
  }

 private:
  // The share of the positions [begin, end) in class j.
  __device__ __forceinline__ void add(const DenseArgs& args, const DenseTile<T>& tile, int j,
                                      int begin, int end, A& scale, A& bias) const {
    const A* at = memory_.positions;
    const A a = static_cast<const A*>(args.scale)[j], b = static_cast<const A*>(args.bias)[j];
    const A o = vector_entry<A>(args.prior, j, A(0)), w = vector_entry<A>(args.weight, j, A(1));
    const A m = Forward ? A(0) : vector_entry<A>(args.margin, j, A(0));
    const T* row = tile.logit(args, j);
    for (int p = begin; p < end; ++p) {
      const int t = memory_.targets[p];
      if (t < 0) continue;
      const A z = args.resident ? memory_.logits[j * DenseMemory<A>::stride(tile.positions) + p]
                                : to_accumulate(load_one(row + p));
      const A c = at[p], maximum = at[tile.positions + p], softmax = at[2 * tile.positions + p];
      const A smooth = at[3 * tile.positions + p], at_target = at[4 * tile.positions + p];
      const A u = calibrated(z, a, b, c) + o - (j == t ? m : A(0));
      A q = softmax * exponential(u - maximum) - smooth * w;
      if (j == t) q = Forward ? at_target : q - at_target;
      // A masked class adds 0, not 0 * -inf.
      scale += q * c * (z == negative_infinity<A>() ? A(0) : z);
      bias += q * c;
    }
  }

  A* sums_;
  const DenseMemory<A>& memory_;
};

}  // namespace disalign::cuda
