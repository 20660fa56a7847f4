// How a block of the row kernels walks over rows and classes.
//
// - A row is seen as 16-byte vectors, the first beginning at the aligned address at or before the
//   row: only a row's first and last vector may have elements that are not its own, and those two
//   are read and written element by element. Rows whose addresses are alike modulo 16 bytes have
//   the same classes in the same vectors: a block takes such rows only (every `period`-th), so that
//   a thread keeps its classes, and with them its share of the class sums, in registers. Class
//   vectors lie in shared memory in the order of the vectors.
// - Narrow: several rows a block, each by a group of up to 32 neighbouring threads. Wide: one row a
//   block, or one tile of a row, if it has more vectors than a block has registers for.
#pragma once

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/position.cuh"

namespace disalign::cuda {

constexpr int kNarrowThreads = 128;
template <class T>
constexpr int kWideThreads = sizeof(T) == 8 ? 256 : 512;  // 255 and 128 registers a thread

// Vectors that a thread keeps: 16 elements (float64: 8), with their class sums about all that the
// registers hold.
template <class T>
constexpr int kKept = sizeof(T) == 2 ? 2 : 4;
template <class T>
constexpr int kElements = kKept<T> * kVector<T>;
template <class T>
constexpr int kPartsOfVector = kVector<T> / kPart<T>;
template <class T>
constexpr int kParts = kElements<T> / kPart<T>;  // that a thread keeps

// Bytes of shared memory before the class vectors: BlockSums, Group.
template <class A, bool Wide>
constexpr int kRowScratchBytes =
    BlockSums::entries(Wide ? 32 : kNarrowThreads) * static_cast<int>(sizeof(double)) +
    Group<A, Wide>::kScratchEntries * static_cast<int>(sizeof(A));

// The rows of a group, all aligned alike: of the rows that the block's may be, the `first` and every
// `step`-th after it. counted: the first row of that group of its warp that has the most.
struct GroupRows {
  int64_t row, row_step;  // the first, the distance to the next
  int rounds;             // how many: far below 2^31, of which a grid has few each
  int phase;              // elements between an aligned address and the row

  template <class T>
  __device__ __forceinline__ GroupRows(const RowArgs& args, const T* logits, int64_t first,
                                       int64_t step, int64_t counted) {
    const int64_t residue = blockIdx.x & (args.period - 1);
    const int64_t left = ((args.outer - residue + args.period - 1) >> args.period_bits) - counted;
    row = residue + (first << args.period_bits);
    row_step = step << args.period_bits;
    rounds = left > 0 ? static_cast<int>((left + step - 1) / step) : 0;
    phase = reinterpret_cast<uintptr_t>(logits + residue * args.outer_stride) % kVectorBytes /
            sizeof(T);
  }
  __device__ __forceinline__ int64_t row_at(int round) const {
    return row + static_cast<int64_t>(round) * row_step;
  }
  static __device__ __forceinline__ int64_t block(const RowArgs& args) {
    return blockIdx.x >> args.period_bits;
  }
  static __device__ __forceinline__ int64_t blocks(const RowArgs& args) {
    return gridDim.x >> args.period_bits;
  }
};

template <class T, bool Wide>
struct Tile : GroupRows {
  static constexpr int V = kVector<T>;
  static constexpr int K = kKept<T>;

  int lanes, lane, group, groups;
  int first_vector;  // of this thread, which has every `vector_step`-th: a warp has neighbours
  int all_whole;     // none of this thread's vectors is the row's first or last, or past it (bool)
  int first_class;   // of the tile's first element; below 0 where that is not the row's own
  int vectors, classes;

  __device__ __forceinline__ explicit Tile(const RowArgs& args)
      : GroupRows(
            args, static_cast<const T*>(args.logits),
            Wide ? block(args) : block(args) * (blockDim.x / args.lanes) + threadIdx.x / args.lanes,
            Wide ? blocks(args) : blocks(args) * (blockDim.x / args.lanes),
            Wide ? block(args) : block(args) * (blockDim.x / args.lanes)),
        lanes(Wide ? static_cast<int>(blockDim.x) : args.lanes),
        lane(threadIdx.x % lanes),
        group(Wide ? 0 : threadIdx.x / lanes),
        groups(Wide ? 1 : blockDim.x / lanes),
        classes(static_cast<int>(args.classes)) {
    const int all = (phase + classes + V - 1) / V;
    const int before = static_cast<int>(blockIdx.y) * args.tile_vectors;
    first_class = before * V - phase;
    vectors = min(max(all - before, 0), args.tile_vectors);
    first_vector = Wide ? threadIdx.x / 32 * 32 * K + threadIdx.x % 32 : lane;
    all_whole = vector(K - 1) < vectors && class_of(0) >= 0 && class_of(K - 1) + V <= classes;
  }

  __device__ __forceinline__ int vector_step() const { return Wide ? 32 : lanes; }
  __device__ __forceinline__ int vector(int k) const { return first_vector + vector_step() * k; }
  // What is read once a row is read for `turns` of the group's rows at a time, by a lane each, and
  // handed round by shuffles; of every warp of the group, so that none waits for another.
  __device__ __forceinline__ int turns() const { return Wide ? 32 : lanes; }
  __device__ __forceinline__ int turn_of(int round) const { return round & (turns() - 1); }
  // The row that this lane reads where turn_of(round) is 0, i being the group's in that round.
  __device__ __forceinline__ int64_t row_of_turn(int64_t i) const {
    return i + (threadIdx.x & (turns() - 1)) * row_step;
  }

  // Of class vectors, for which all threads of a block stage those that its groups share.
  __device__ __forceinline__ int staged_class() const { return first_class; }
  __device__ __forceinline__ int staged_vectors() const { return vectors; }
  static __device__ __forceinline__ int stager() { return threadIdx.x; }
  static __device__ __forceinline__ int stagers() { return blockDim.x; }
  // Vectors that the group has room for.
  __device__ __forceinline__ int capacity() const { return lanes * K; }
  __device__ __forceinline__ int class_of(int k) const { return first_class + vector(k) * V; }
  __device__ __forceinline__ bool own(int j) const {
    return static_cast<unsigned>(j) < static_cast<unsigned>(classes);
  }
  __device__ __forceinline__ bool whole(int j) const { return j >= 0 && j + V <= classes; }

  // Whether class t is in the tile.
  __device__ __forceinline__ bool has(int t) const {
    const unsigned at = static_cast<unsigned>(t - first_class) / V;  // large below the first
    return t >= 0 && at < static_cast<unsigned>(vectors);
  }

  // Which of this thread's elements is class t, or -1.
  __device__ __forceinline__ int slot_of(int t) const {
    const unsigned element = static_cast<unsigned>(t - first_class);
    // Below 0 it is a large number, which is in no vector.
    const unsigned at = element / V, distance = at - static_cast<unsigned>(first_vector);
    if (!has(t)) return -1;
    if constexpr (Wide) {
      const bool here = distance % 32 == 0 && distance / 32 < K;
      return here ? static_cast<int>(distance / 32 * V + element % V) : -1;
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (distance == static_cast<unsigned>(lanes * k)) return k * V + element % V;
      return -1;
    }
  }

  // This thread's vectors of a row, whose vectors lie like the logits' only if `aligned`. What is
  // not the row's own is -inf: its exponential is 0.
  __device__ __forceinline__ void load(const T* from, Raw (&raw)[K], bool aligned = true) const {
    if (aligned && all_whole) {
      const T* first = from + class_of(0);
#pragma unroll
      for (int k = 0; k < K; ++k) raw[k] = load_vector(first + k * vector_step() * V);
      return;
    }
    const T nothing = from_accumulate<T>(negative_infinity<Accumulate<T>>());
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int j = class_of(k);
      if (aligned && vector(k) < vectors && whole(j)) {
        raw[k] = load_vector(from + j);
        continue;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool load = vector(k) < vectors && own(j + v);
        set_element(raw[k], v, load ? load_one(from + j + v) : nothing);
      }
    }
  }

  // Whether the vectors of this row, of another tensor, lie like those of the logits' rows.
  __device__ __forceinline__ bool aligned(const T* row) const {
    return (reinterpret_cast<uintptr_t>(row) + first_class * static_cast<int64_t>(sizeof(T))) %
               kVectorBytes ==
           0;
  }

  // One of them to a row of another tensor.
  __device__ __forceinline__ void store(T* to, int k, bool aligned, const Raw& raw) const {
    if (aligned && all_whole) {
      store_vector(to + class_of(0) + k * vector_step() * V, raw);
      return;
    }
    const int j = class_of(k);
    if (vector(k) >= vectors) return;
    if (aligned && whole(j)) {
      store_vector(to + j, raw);
      return;
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (own(j + v)) store_one(to + j + v, element<T>(raw, v));
  }
};

// The class vectors of a tile in shared memory, as many vectors as the group has room for; absent
// ones are null. What is not the row's own has a = b = w = o = 0: with a logit of -inf, u is -inf
// there.
template <class T>
struct ClassVectors {
  using A = Accumulate<T>;
  static constexpr int V = kVector<T>;
  static constexpr int Q = kPart<T>;

  const A *scale = nullptr, *bias = nullptr, *weight = nullptr, *prior = nullptr;
  int capacity;  // in vectors

  // Whether a class's weight is needed of every class: by label smoothing, and by class probabilities.
  static __host__ __device__ bool weighs(const LossArgs& args) {
    return args.probabilities ? args.weight != nullptr : args.label_smoothing > 0;
  }
  // How many a launch stages.
  static __host__ __device__ int count(const LossArgs& args) {
    return (args.scale ? 2 : 0) + (args.prior ? 1 : 0) + (weighs(args) ? 1 : 0);
  }

  // Ends with a barrier.
  template <class TileOfRow>
  __device__ __forceinline__ ClassVectors(const RowArgs& args, const TileOfRow& tile, A* memory)
      : ClassVectors(args, tile, memory, args.label_smoothing > 0) {}
  // weighted: what `weighs` says.
  template <class TileOfRow>
  __device__ __forceinline__ ClassVectors(const RowArgs& args, const TileOfRow& tile, A* memory,
                                          bool weighted)
      : capacity(tile.capacity()) {
    if (args.scale) {
      scale = stage(args.scale, A(0), tile, memory);
      bias = stage(args.bias, A(0), tile, memory);
    }
    if (weighted) weight = stage(args.weight, A(1), tile, memory);
    if (args.prior) prior = stage(args.prior, A(0), tile, memory);
    __syncthreads();
  }

  // A part of a vector. A thread's neighbours read neighbouring 16 bytes: all vectors' first parts
  // lie together, then all second ones.
  __device__ __forceinline__ void load(const A* from, int vector, int part, A (&out)[Q]) const {
    load_shared(from + (part * capacity + vector) * Q, out);
  }

  // (1 + c a) z + c b
  template <bool Calibrated>
  __device__ __forceinline__ void calibrate(int vector, int part, const A (&z)[Q], A c,
                                            A (&u)[Q]) const {
    if constexpr (Calibrated) {
      A a[Q], b[Q];
      load(scale, vector, part, a);
      load(bias, vector, part, b);
#pragma unroll
      for (int q = 0; q < Q; ++q) u[q] = calibrated(z[q], a[q], b[q], c);
    } else {
#pragma unroll
      for (int q = 0; q < Q; ++q) u[q] = z[q];
    }
  }

  // u = (1 + c a) z + c b + o
  template <bool Calibrated>
  __device__ __forceinline__ void affine(int vector, int part, const A (&z)[Q], A c,
                                         A (&u)[Q]) const {
    calibrate<Calibrated>(vector, part, z, c, u);
    if (!prior) return;  // a sum with 0 is an instruction
    __syncwarp();        // keeps the compiler from making predicated instructions of this
    A o[Q];
    load(prior, vector, part, o);
#pragma unroll
    for (int q = 0; q < Q; ++q) u[q] += o[q];
  }

  // d = a z + b, 0 where that is not finite: a masked class has no share in what sums it.
  __device__ __forceinline__ void slope(int vector, int part, const A (&z)[Q], A (&d)[Q]) const {
    A a[Q], b[Q];
    load(scale, vector, part, a);
    load(bias, vector, part, b);
#pragma unroll
    for (int q = 0; q < Q; ++q) d[q] = finite_or_zero(a[q] * z[q] + b[q]);
  }

 private:
  template <class TileOfRow>
  __device__ __forceinline__ const A* stage(const void* from, A absent, const TileOfRow& tile,
                                            A*& memory) const {
    A* to = memory;
    for (int vector = tile.stager(); vector < capacity; vector += tile.stagers()) {
      const int j = tile.staged_class() + vector * V;
      const bool there = vector < tile.staged_vectors();
#pragma unroll
      for (int part = 0; part < V / Q; ++part) {
        A values[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q)
          values[q] = there && tile.own(j + part * Q + q)
                          ? vector_entry<A>(from, j + part * Q + q, absent)
                          : A(0);
        store_shared(to + (part * capacity + vector) * Q, values);
      }
    }
    memory += capacity * V;
    return to;
  }
};

// What a row's threads need of its position from the start.
template <class A>
struct RowHead {
  int target = kNoTarget;
  A c = 0;  // its confidence after the sigmoid

  // details: of ignored rows, too.
  __device__ __forceinline__ void read(const LossArgs& args, int64_t i, bool details) {
    target = i < args.outer ? target_of(args, i) : kNoTarget;
    c = is_valid(target) || (details && i < args.outer) ? confidence_of<A>(args, i) : A(0);
  }
  __device__ __forceinline__ RowHead of_lane(int lane, int lanes) const {
    return {__shfl_sync(kFullWarp, target, lane, lanes), __shfl_sync(kFullWarp, c, lane, lanes)};
  }
};

// A thread's class sums to the block's, for all classes of the tile. Ends without a barrier.
// Wide: each class is one thread's, and `memory`, where the class vectors were, puts neighbours next
// to each other for the stores. Narrow: those of a warp's groups are added by shuffles, then warp
// after warp adds its own in `memory`, which has 2 * tile_vectors * V entries.
template <class T, bool Wide>
__device__ __forceinline__ void write_class_sums(const RowArgs& args, const Tile<T, Wide>& tile,
                                                 Accumulate<T> (&scale)[kElements<T>],
                                                 Accumulate<T> (&bias)[kElements<T>],
                                                 Accumulate<T>* memory) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, K = kKept<T>;
  A* to = static_cast<A*>(args.class_sums) + int64_t{2} * blockIdx.x * tile.classes;
  if constexpr (Wide) {
    const int threads = static_cast<int>(blockDim.x), entries = threads * K * V;
    __syncthreads();  // the class vectors are read no more
#pragma unroll
    for (int p = 0; p < K * V; ++p) {
      memory[p * threads + threadIdx.x] = scale[p];
      memory[entries + p * threads + threadIdx.x] = bias[p];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.vectors * V; i += threads) {
      const int j = tile.first_class + i, vector = i / V;
      if (!tile.own(j)) continue;
      const int thread = vector / (32 * K) * 32 + vector % 32, p = vector / 32 % K * V + i % V;
      to[j] = memory[p * threads + thread];
      to[tile.classes + j] = memory[entries + p * threads + thread];
    }
  } else {
    const int entries = tile.vectors * V;
    for (int distance = tile.lanes; distance < 32; distance *= 2) {
#pragma unroll
      for (int p = 0; p < K * V; ++p) {
        scale[p] += __shfl_xor_sync(kFullWarp, scale[p], distance);
        bias[p] += __shfl_xor_sync(kFullWarp, bias[p], distance);
      }
    }
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) {
      __syncthreads();  // the first: everyone is done with what `memory` was before
      if (static_cast<int>(threadIdx.x / 32) != warp ||
          static_cast<int>(threadIdx.x % 32) >= tile.lanes)
        continue;
#pragma unroll
      for (int p = 0; p < K * V; ++p) {
        const int i = tile.vector(p / V) * V + p % V;
        if (tile.vector(p / V) >= tile.vectors) continue;
        memory[i] = warp == 0 ? scale[p] : memory[i] + scale[p];
        memory[entries + i] = warp == 0 ? bias[p] : memory[entries + i] + bias[p];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < entries; i += blockDim.x) {
      const int j = tile.first_class + i;
      if (!tile.own(j)) continue;
      to[j] = memory[i];
      to[tile.classes + j] = memory[entries + i];
    }
  }
}

}  // namespace disalign::cuda
