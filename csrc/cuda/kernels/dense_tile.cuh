// How a block of the dense kernels walks over positions and classes.
//
// - Logits (N, C, S), the positions of a class plane next to each other. A thread has a vector of
//   positions, 16 bytes of a plane, and every `slices`-th class; neighbouring lanes have
//   neighbouring vectors of one class. A tile is the positions of a slice's lanes. Blocks take tiles
//   in turn.
// - Where planes are not all aligned to 16 bytes (not Whole), a thread's positions are as many lanes
//   apart as a slice has: loads and stores of single elements, which a warp does next to each other.
// - Stages: a thread copies its vectors into shared memory, the next stage's while it works on this
//   one's, and reads them there, twice where its gradients are wanted too. No other thread reads
//   them but the one that wants a target's logit, and those that make details. A tile that does not
//   fit has several stages, which for its gradients come once more.
#pragma once

#include <algorithm>

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/async_copy.cuh"
#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/position.cuh"
#include "cuda/kernels/row_details.cuh"

namespace disalign::cuda {

constexpr int kDenseThreads = 256;
constexpr int kDenseThreadBits = 8;
constexpr int kDenseStages = 2;
constexpr int kDenseRoundBytes =
    kDenseThreads * kVectorBytes;  // of a stage, a class of each thread

// What a thread needs of a class vector's entry j.
template <class A>
struct alignas(4 * sizeof(A)) ClassEntry {
  A a, b, o, w;

  static __device__ __forceinline__ ClassEntry of(const LossArgs& args, int j) {
    return {vector_entry<A>(args.scale, j, A(0)), vector_entry<A>(args.bias, j, A(0)),
            vector_entry<A>(args.prior, j, A(0)), vector_entry<A>(args.weight, j, A(1))};
  }
};

// Whether there is anything in them that exponentials or gradients need.
static DISALIGN_METHOD bool needs_class_entries(const LossArgs& args) {
  return args.scale || args.prior || args.label_smoothing > 0;
}

// A thread's share of the gradients of a class's scale and bias.
template <class A>
struct alignas(2 * sizeof(A)) ClassSum {
  A scale, bias;
};

// What the threads of a position share: what the second pass multiplies by.
enum PositionEntry { kEntryC, kEntryShift, kEntrySoftmax, kEntrySmooth, kEntryTarget, kEntrySlope };
constexpr int kPositionEntries = 6;

// Shared memory of a block, in this order; offsets in bytes, which the host knows.
template <class T>
struct DenseMemory {
  using A = Accumulate<T>;

  unsigned char* stages;    // [kDenseStages][rounds][threads][16]
  double* scratch;          // [kScratch], of the sums over the block
  ClassEntry<A>* table;     // [classes], where args.table
  A* exchange;              // [values][slices][positions]; of details [values][parts][positions]
  A* positions;             // [kPositionEntries][positions]
  ClassSum<A>* class_sums;  // [classes of a thread][threads], where args.shared_sums
  A* target_z;              // [positions]
  int* targets;             // [positions]

  static constexpr int kScratch = 32;
  // Of the first pass's sums, at most: see DenseSums.
  static __host__ __device__ int values(const DenseArgs& args) {
    return args.label_smoothing > 0 ? 4 : 2;
  }
  static __host__ __device__ int64_t sum_entries(const DenseArgs& args) {
    const int64_t slices = kDenseThreads >> args.lane_bits;
    return (args.classes + slices - 1) / slices * kDenseThreads;
  }
  // Sets the offsets. Returns the bytes of all.
  static int64_t divide(DenseArgs& args, bool second_pass) {
    int64_t bytes = kDenseStages * int64_t{args.rounds} * kDenseRoundBytes;
    const auto take = [&](int64_t entries, size_t size) {
      const int64_t begin = bytes;
      bytes += entries * static_cast<int64_t>(size);
      return static_cast<int32_t>(begin);
    };
    const int64_t positions = int64_t{kVector<T>} << args.lane_bits;
    args.scratch_at = take(kScratch, sizeof(double));
    args.table_at = take(args.table ? args.classes : 0, sizeof(ClassEntry<A>));
    const int64_t exchanged = !args.backward ? values(args) : args.grad_confidence ? 1 : 0;
    // Room for details even where there are none: tiles, and so bits, are the same with them.
    const int64_t of_sums = exchanged * kDenseThreads * kVector<T>;
    const int64_t of_details =
        args.backward ? 0 : RowDetails<A>::kValues * std::max<int64_t>(kDenseThreads, positions);
    args.exchange_at = take(std::max(of_sums, of_details), sizeof(A));
    args.positions_at = take((second_pass ? kPositionEntries : 2) * positions, sizeof(A));
    args.class_sums_at = take(args.shared_sums ? sum_entries(args) : 0, sizeof(ClassSum<A>));
    args.target_z_at = take(positions, sizeof(A));
    args.targets_at = take(positions, sizeof(int));
    return bytes;
  }

  __device__ __forceinline__ DenseMemory(const DenseArgs& args, unsigned char* memory)
      : stages(memory),
        scratch(reinterpret_cast<double*>(memory + args.scratch_at)),
        table(reinterpret_cast<ClassEntry<A>*>(memory + args.table_at)),
        exchange(reinterpret_cast<A*>(memory + args.exchange_at)),
        positions(reinterpret_cast<A*>(memory + args.positions_at)),
        class_sums(reinterpret_cast<ClassSum<A>*>(memory + args.class_sums_at)),
        target_z(reinterpret_cast<A*>(memory + args.target_z_at)),
        targets(reinterpret_cast<int*>(memory + args.targets_at)) {}
};

// A thread's place in every tile.
struct DensePlace {
  int lanes, lane, slice, slices, classes;
  int mine;  // this thread's classes: slice, slice + slices, ...

  __device__ __forceinline__ explicit DensePlace(const DenseArgs& args)
      : lanes(args.lanes),
        lane(threadIdx.x & (lanes - 1)),
        slice(threadIdx.x >> args.lane_bits),
        slices(args.slices),
        classes(static_cast<int>(args.classes)),
        mine((classes - slice + slices - 1) >> (kDenseThreadBits - args.lane_bits)) {}
};

// The tiles of a block, one after the other. Their number in an image is no more than 2^31.
struct DenseTiles {
  int image, tile;  // of the image
  int image_step, tile_step;

  __device__ __forceinline__ explicit DenseTiles(const DenseArgs& args)
      : image(static_cast<int>(blockIdx.x / static_cast<unsigned>(args.image_tiles))),
        tile(static_cast<int>(blockIdx.x % static_cast<unsigned>(args.image_tiles))),
        image_step(static_cast<int>(gridDim.x / static_cast<unsigned>(args.image_tiles))),
        tile_step(static_cast<int>(gridDim.x % static_cast<unsigned>(args.image_tiles))) {}

  __device__ __forceinline__ void next(const DenseArgs& args) {
    image += image_step, tile += tile_step;
    if (tile >= args.image_tiles) tile -= args.image_tiles, ++image;
  }
};

// The class sums of a block's threads, [classes of a thread][threads], added up and written. By the whole
// block.
template <class T>
__device__ __forceinline__ void write_dense_sums(const DenseArgs& args, const DensePlace& place,
                                                 const ClassSum<Accumulate<T>>* of_threads) {
  using A = Accumulate<T>;
  __syncthreads();
  A* to = static_cast<A*>(args.class_sums) + int64_t{2} * blockIdx.x * args.classes;
  for (int j = threadIdx.x; j < place.classes; j += kDenseThreads) {
    const int slice = j & (place.slices - 1), round = j >> (kDenseThreadBits - args.lane_bits);
    const ClassSum<A>* from = of_threads + round * kDenseThreads + slice * place.lanes;
    ClassSum<A> sum = {A(0), A(0)};
#pragma unroll 4
    for (int lane = 0; lane < place.lanes; ++lane)
      sum.scale += from[lane].scale, sum.bias += from[lane].bias;
    to[j] = sum.scale, to[args.classes + j] = sum.bias;
  }
}

// The positions of a thread's vector, Whole or not.
template <class T, bool Whole>
struct DenseVector {
  static constexpr int V = kVector<T>;

  // Of element v, counted from the tile's first.
  static __device__ __forceinline__ int position(const DensePlace& place, int v) {
    return Whole ? place.lane * V + v : place.lane + v * place.lanes;
  }
  // Where a stage that has all classes has the tile's position p of class t, in bytes.
  static __device__ __forceinline__ int offset(const DensePlace& place, const DenseArgs& args,
                                               int t, int p) {
    const int slice = t & (place.slices - 1), round = t >> (kDenseThreadBits - args.lane_bits);
    const int lane = Whole ? p / V : p & (place.lanes - 1);
    const int v = Whole ? p % V : p >> args.lane_bits;
    return (round * kDenseThreads + slice * place.lanes + lane) * kVectorBytes +
           v * static_cast<int>(sizeof(T));
  }
  // This thread's of one entry a position.
  template <class E>
  static __device__ __forceinline__ void read(const DensePlace& place, const E* entries,
                                              E (&out)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = entries[position(place, v)];
  }
  template <class E>
  static __device__ __forceinline__ void write(const DensePlace& place, E* entries,
                                               const E (&values)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) entries[position(place, v)] = values[v];
  }

  // Of planes `step` apart, in the first of which the tile begins at `from`, into so many rounds of a
  // stage; 0 where the tile has no position. Whole: on its way, as copy_vector's.
  static __device__ __forceinline__ void copy(const DensePlace& place, unsigned char* to,
                                              const T* from, int64_t step, int rounds, int count) {
    from += position(place, 0);
    if (Whole && place.lane * V < count) {
#pragma unroll 4
      for (int round = 0; round < rounds; ++round, from += step)
        copy_vector(to + round * kDenseRoundBytes, from);
      return;
    }
#pragma unroll(Whole ? 1 : kPart<T> * 4 / V)
    for (int round = 0; round < rounds; ++round, from += step)
      write_shared(to + round * kDenseRoundBytes, load(place, from, count));
  }
  // One of them; from: this thread's first position.
  static __device__ __forceinline__ Raw load(const DensePlace& place, const T* from, int count) {
    Raw raw = {};
    if constexpr (Whole) {
      if (place.lane * V < count) raw = load_vector(from);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (position(place, v) < count) set_element(raw, v, load_one(from + v * place.lanes));
    }
    return raw;
  }
  static __device__ __forceinline__ void store(const DensePlace& place, T* to, int count,
                                               const Accumulate<T> (&g)[V]) {
    if constexpr (Whole) {
      if (place.lane * V >= count) return;
      Raw raw = {};
#pragma unroll
      for (int part = 0; part < V / kPart<T>; ++part) pack<T>(g + part * kPart<T>, part, raw);
      store_vector(to + place.lane * V, raw);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (position(place, v) < count)
          store_one(to + position(place, v), from_accumulate<T>(g[v]));
    }
  }
};

// The stages of a block's tiles, in the order in which it works on them.
template <class T, bool Whole>
class DenseStages {
 public:
  // passes: over a tile of several stages.
  __device__ __forceinline__ DenseStages(const DenseArgs& args, const DensePlace& place,
                                         unsigned char* stages, int passes)
      : args_(args),
        place_(place),
        own_(stages + threadIdx.x * kVectorBytes),
        logits_(static_cast<const T*>(args.logits) + place.slice * args.class_stride),
        stage_bytes_(args.rounds * kDenseRoundBytes),
        passes_(args.chunks == 1 ? 1 : passes),
        tiles_(args) {
    ask();
  }

  // Of the stage that arrives next: whether there is one, its image, its tile's first position in the
  // image, how many positions the tile has.
  __device__ __forceinline__ bool more() const { return count_ > 0; }
  __device__ __forceinline__ int image() const { return image_; }
  __device__ __forceinline__ int64_t first_position() const { return at_; }
  __device__ __forceinline__ int count() const { return count_; }

  // It has arrived, for all threads, and the one after it is on its way: until then threads may still
  // read the one before. By the whole block.
  __device__ __forceinline__ void arrive() {
    wait_for_copies<0>();
    __syncthreads();
    current_ = own_ + (next_ ^ 1) * stage_bytes_;
    ask();
  }

  // This thread's vector of a round of the stage, and the stage's first byte.
  __device__ __forceinline__ Raw vector(int round) const {
    return read_shared(current_ + round * kDenseRoundBytes);
  }
  // Where the stage, whose first round is `first`, has position p of class t; -1: it has not.
  __device__ __forceinline__ int offset(int t, int p, int first) const {
    const int bytes = DenseVector<T, Whole>::offset(place_, args_, t, p) - first * kDenseRoundBytes;
    return static_cast<unsigned>(bytes) < static_cast<unsigned>(stage_bytes_) ? bytes : -1;
  }
  __device__ __forceinline__ T& element(int offset) const {
    return *reinterpret_cast<T*>(current_ - threadIdx.x * kVectorBytes + offset);
  }

 private:
  __device__ __forceinline__ void ask() {
    count_ = 0;
    if (tiles_.image < args_.outer) {
      const int positions = place_.lanes * kVector<T>;
      image_ = tiles_.image;
      at_ = int64_t{tiles_.tile} * positions;
      count_ = tiles_.tile == args_.image_tiles - 1 ? args_.last_positions : positions;
      const int first = chunk_ * args_.rounds;
      const int rounds = min(args_.rounds, place_.mine - first);
      const int64_t step = place_.slices * args_.class_stride;
      const T* from = logits_ + image_ * args_.outer_stride + at_ + first * step;
      unsigned char* to = own_ + next_ * stage_bytes_;
      DenseVector<T, Whole>::copy(place_, to, from, step, rounds, count_);
      if (++chunk_ == args_.chunks) {
        chunk_ = 0;
        if (++pass_ == passes_) {
          pass_ = 0;
          tiles_.next(args_);
        }
      }
    }
    next_ ^= 1;
    commit_copies();
  }

  const DenseArgs& args_;
  const DensePlace& place_;
  unsigned char *own_, *current_ = nullptr;
  const T* logits_;  // of this thread's first class
  int stage_bytes_, passes_;
  int image_ = 0, count_ = 0;
  int64_t at_ = 0;
  int next_ = 0, chunk_ = 0, pass_ = 0;  // of the stage that is asked for next
  DenseTiles tiles_;
};

}  // namespace disalign::cuda
