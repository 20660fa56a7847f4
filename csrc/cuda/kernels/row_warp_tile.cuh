// What row_warp_kernel.cuh and soft_row_warp_kernel.cuh are made of: how warps walk over rows and classes, what is of a row alone,
// class vectors at the rows' edges, class sums.
//
// - A row is its whole 16-byte vectors, the k-th of a lane 32 k after its first, and at its edges fewer
//   elements than two vectors have, at most one a lane. So every vector is whole, and rows of any
//   length and alignment take the same path. Rows aligned alike: row_tile.cuh.
// - Wide: the row is that of several warps, of a block or of a cluster's blocks. Each has 32 K
//   neighbouring vectors, the first one the edges, too.
#pragma once

#include "cuda/kernels/position.cuh"
#include "cuda/kernels/row_tile.cuh"

namespace disalign::cuda {

// Who keeps a row.
enum Keeper { kByWarp, kByBlock, kByCluster };

// Threads of a block, at most: of 255 registers with class sums, and of several warps a row; of a
// plain row of floats 128 are enough.
template <class T, bool Calibrated, bool Sums, int By>
constexpr int kWarpThreads = By == kByWarp && !Sums                           ? 128
                             : By != kByWarp && !Calibrated && sizeof(T) == 4 ? 512
                                                                              : 256;
constexpr int kWarpVectors = 10;  // of a lane: with class sums about all that registers hold
// Vectors in shared memory, of a lane: a row's and the next one's; of short rows, the next three's.
constexpr int kWarpStaged = 2 * kWarpVectors;
template <int K>
constexpr int kWarpStages = kWarpStaged / K;
constexpr int kWarpSumsBytes = BlockSums::entries(32) * static_cast<int>(sizeof(double));
template <class A, int By, int kMostWarps = 16>
using WarpGroup = std::conditional_t<By == kByCluster, ClusterGroup<A, kMostWarps>,
                                     Group<A, By != kByWarp, kMostWarps>>;
// Of the sums of slopes of a cluster's blocks, for a turn; two turns'.
template <int By>
constexpr int kClusterSlopes = By == kByCluster ? 2 * kClusterBlocks * 32 : 0;
template <class A, int By>
constexpr int kWarpScratchBytes = kWarpSumsBytes + (WarpGroup<A, By>::kScratchEntries +
                                                    kClusterSlopes<By>)*static_cast<int>(sizeof(A));

// Blocks of a cluster that add up their class sums, a power of two; each has rows of its own.
template <bool Sums, int By>
struct Team {
  static constexpr bool kExists = Cluster::kExists && Sums && By != kByCluster;
  static __device__ __forceinline__ int size() { return kExists ? gridDim.y : 1; }
  static __device__ __forceinline__ int member() { return kExists ? blockIdx.y : 0; }
};

// A vector of V elements.
template <class T>
__device__ __forceinline__ Raw packed(const Accumulate<T>* values) {
  Raw raw = {};
#pragma unroll
  for (int part = 0; part < kPartsOfVector<T>; ++part) pack<T>(values + part * kPart<T>, part, raw);
  return raw;
}

template <class T, int K, int By>
struct WarpTile : GroupRows {
  static constexpr bool Wide = By != kByWarp;
  static constexpr int V = kVector<T>;

  int warp, lane;    // warp: of the block
  int block_of_row;  // of the cluster, or of the blocks with a tile each
  int first_class;   // of the row's first whole vector
  int vectors;       // whole ones of the row
  int base_class;    // of this warp's first
  int left;          // from this lane's first on, other warps' included
  int edge;          // this lane's class at the row's edges, or -1
  int classes;

  template <class Team>
  __device__ __forceinline__ WarpTile(const RowArgs& args, Team team)
      : WarpTile(args, team, By == kByCluster ? blockIdx.y : 0) {}
  // block: its part of a row.
  template <class Team>
  __device__ __forceinline__ WarpTile(const RowArgs& args, Team team, int block)
      // Neighbouring rows are those of different blocks: no block has a round more than another.
      : GroupRows(args, static_cast<const T*>(args.logits), group(args, team),
                  blocks(args) * team.size() * (Wide ? 1 : blockDim.x / 32), group(args, team)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        block_of_row(block),
        first_class((V - phase) % V),
        vectors((static_cast<int>(args.classes) - first_class) / V),
        classes(static_cast<int>(args.classes)) {
    // Of numbers whose upper bits it knows the compiler makes `lane | 32 k` and the like, in a
    // register for each k and not in an address's offset.
    asm("" : "+r"(first_class));
    asm("" : "+r"(lane));
    asm("" : "+r"(warp));  // and these it would make anew wherever they are used
    asm("" : "+l"(row));
    const int before =
        Wide ? (block_of_row * static_cast<int>(blockDim.x / 32) + warp) * 32 * K : 0;
    base_class = first_class + before * V;
    left = vectors - before - lane;
    const int after = classes - first_class - vectors * V;
    edge = !is_first()          ? -1
           : lane < first_class ? lane
           : lane >= 32 - after ? classes - 32 + lane
                                : -1;
  }

  // The same, of which the compiler knows nothing: it keeps no predicates of it.
  __device__ __forceinline__ WarpTile made_anew() const {
    WarpTile tile = *this;
    asm volatile("" : "+r"(tile.left));
    return tile;
  }

  // Whether this warp writes what is of a whole row.
  __device__ __forceinline__ bool is_first() const {
    return !Wide || (warp == 0 && block_of_row == 0);
  }
  __device__ __forceinline__ bool has(int k) const { return left > 32 * k; }
  // Of this lane's first vector, from the row's first element.
  __device__ __forceinline__ int first() const { return base_class + lane * V; }
  // Of element p of this lane, the last of which is the edge's.
  __device__ __forceinline__ int class_of(int p) const {
    return p < K * V ? first() + p / V * 32 * V + p % V : edge;
  }

  // This lane's elements of a row of the gradient, the last of which is the edge's. Aligned: its vectors
  // lie like the logits'.
  template <bool Aligned = false>
  __device__ __forceinline__ void store(T* row, const Accumulate<T> (&g)[K * V + 1]) const {
    T* to = row + first();
    if (Aligned || reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (has(k)) store_vector(to + 32 * k * V, packed<T>(&g[k * V]));
    } else {
#pragma unroll
      for (int p = 0; p < K * V; ++p)
        if (has(p / V)) store_one(to + p / V * 32 * V + p % V, from_accumulate<T>(g[p]));
    }
    if (edge >= 0) store_one(row + edge, from_accumulate<T>(g[K * V]));
  }

  // Writes -inf, for good, to what is no vector of all stages, of which this lane has every 32nd from
  // `own` on.
  __device__ __forceinline__ void write_missing(unsigned char* own) const {
    if (has(K - 1)) return;
    Raw nothing;
#pragma unroll
    for (int v = 0; v < V; ++v)
      set_element(nothing, v, from_accumulate<T>(negative_infinity<Accumulate<T>>()));
    for (int k = max(left + 31, 0) / 32; k < K; ++k) {
#pragma unroll
      for (int stage = 0; stage < kWarpStages<K>; ++stage)
        write_shared(own + (stage * K + k) * 32 * kVectorBytes, nothing);
    }
  }

  // Of the class vectors in shared memory, of which each warp of a wide row has its own.
  static __device__ __forceinline__ int capacity() { return 32 * K; }
  static __device__ __forceinline__ bool own(int) { return true; }
  __device__ __forceinline__ int staged_class() const { return base_class; }
  __device__ __forceinline__ int staged_vectors() const { return left + lane; }
  __device__ __forceinline__ int stager() const { return Wide ? lane : threadIdx.x; }
  static __device__ __forceinline__ int stagers() { return Wide ? 32 : blockDim.x; }

 private:
  template <class Team>
  static __device__ __forceinline__ int64_t group(const RowArgs& args, Team team) {
    return block(args) * team.size() + team.member() +
           (Wide ? 0 : blocks(args) * team.size() * (threadIdx.x / 32));
  }
};

// What is of a row alone, for the rows of a turn, in shared memory: a row is one lane's, which reads
// and finishes it; all lanes read what it has read.
template <class A, bool Calibrated>
class Turn {
 public:
  enum Value {
    kC,        // confidence after the sigmoid
    kWeight,   // of the target's class
    kFactor,   // sample weight; backward: times the upstream gradient over the denominator
    kTargetZ,  // z_t, 0 where that is -inf
    kTargetLogit,
    kNoSlope,  // what d_t has not of a z_t + b: 0, or -b of a masked target
    kMaximum,  // the following are PositionSums
    kRest,
    kSmooth,
    kValues
  };
  // A row's gradient of the confidence is of as many shares; the pitch is odd for the banks.
  static constexpr int kShares = 4, kSharePitch = kShares + 1;
  static constexpr int kBytesBeforeShares = kValues * 32 * static_cast<int>(sizeof(A));
  static constexpr int kBytes =
      kBytesBeforeShares + (Calibrated ? kSharePitch * 32 * static_cast<int>(sizeof(A)) : 0);

  __device__ __forceinline__ explicit Turn(unsigned char* memory)
      : memory_(reinterpret_cast<A*>(memory)) {}

  __device__ __forceinline__ A& at(Value value, int row) const { return memory_[value * 32 + row]; }
  // Row i of the logits and its target, as row `row` of the turn. Other lanes see it after a
  // __syncwarp.
  template <class T>
  __device__ __forceinline__ void read(const RowArgs& args, const T* logits, int64_t i, int t,
                                       int row, A inverse) const {
    if (!is_valid(t)) return;
    const A c = confidence_of<A>(args, i);
    A factor = vector_entry<A>(args.sample_weight, i, A(1));
    if (args.backward)
      factor = inverse == A(0) ? A(0)
                               : vector_entry<A>(args.upstream, i * args.upstream_stride, A(1)) *
                                     factor * inverse;
    const A z = to_accumulate(load_one(logits + i * args.outer_stride + t));
    const bool masked = z == negative_infinity<A>();
    at(kC, row) = c;
    at(kWeight, row) = vector_entry<A>(args.weight, t, A(1));
    at(kFactor, row) = factor;
    at(kTargetZ, row) = masked ? A(0) : z;
    at(kTargetLogit, row) = target_logit_of(args, t, z, c);
    if constexpr (Calibrated) {
      const A b = static_cast<const A*>(args.bias)[t];
      at(kNoSlope, row) = masked ? -b : A(0);
    }
  }

  // By the row's lane.
  __device__ __forceinline__ void keep(int row, const PositionSums<A>& sums) const {
    at(kMaximum, row) = sums.maximum, at(kRest, row) = sums.rest, at(kSmooth, row) = sums.smooth;
  }
  __device__ __forceinline__ PositionSums<A> kept(int row, A weights) const {
    PositionSums<A> sums;
    sums.maximum = at(kMaximum, row), sums.rest = at(kRest, row), sums.smooth = at(kSmooth, row);
    sums.target_logit = at(kTargetLogit, row);
    sums.weight = weights;
    return sums;
  }

  // sum_j q_j d_j of a row, of which each lane has some classes; of the block, `warps` of turns
  // `warp_bytes` apart have the others. Added up by the row's lane, later: nothing waits for it.
  __device__ __forceinline__ void keep_slope(int row, A sum, int lane) const {
#pragma unroll
    for (int distance = 16; distance >= kShares; distance /= 2)
      sum += __shfl_xor_sync(kFullWarp, sum, distance);
    if (lane < kShares) shares()[row * kSharePitch + lane] = sum;
  }
  __device__ __forceinline__ A slope(int row, int warps, int warp_bytes) const {
    A sum = 0;
    const auto* of_warp = reinterpret_cast<const unsigned char*>(shares() + row * kSharePitch);
    for (int warp = 0; warp < warps; ++warp, of_warp += warp_bytes) {
#pragma unroll
      for (int i = 0; i < kShares; ++i) sum += reinterpret_cast<const A*>(of_warp)[i];
    }
    return sum;
  }

 private:
  __device__ __forceinline__ A* shares() const { return memory_ + kValues * 32; }

  A* memory_;
};

// Class vectors of a lane's class at the rows' edges, in shared memory: it is the same in all rows.
template <class A>
class EdgeVectors {
 public:
  static constexpr int kBytes = 4 * 32 * static_cast<int>(sizeof(A));

  // j: the lane's class, or -1.
  __device__ __forceinline__ EdgeVectors(const LossArgs& args, int j, int lane,
                                         unsigned char* memory)
      : own_(reinterpret_cast<A*>(memory) + lane) {
    own_[0] = of(args.scale, j, A(0));
    own_[32] = of(args.bias, j, A(0));
    own_[64] = of(args.weight, j, A(1));
    own_[96] = of(args.prior, j, A(0));
  }
  __device__ __forceinline__ A scale() const { return own_[0]; }
  __device__ __forceinline__ A bias() const { return own_[32]; }
  __device__ __forceinline__ A weight() const { return own_[64]; }
  __device__ __forceinline__ A prior() const { return own_[96]; }

 private:
  static __device__ __forceinline__ A of(const void* vector, int j, A absent) {
    return j < 0 ? A(0) : vector_entry<A>(vector, j, absent);
  }
  A* own_;
};

// Of a warp: its vectors, then its turn and its edges. At the end its class sums, two floats an
// element.
constexpr int kWarpStagedBytes = 32 * kWarpStaged * kVectorBytes;
template <bool Calibrated>
constexpr int kWarpBytes =
    kWarpStagedBytes + Turn<float, Calibrated>::kBytes + EdgeVectors<float>::kBytes;

// body(k) with k known to the compiler, by a few branches that all lanes take alike.
template <int Begin, int End, class Body>
__device__ __forceinline__ void at_index(int k, const Body& body) {
  if constexpr (End - Begin == 1) {
    body(std::integral_constant<int, Begin>{});
  } else {
    constexpr int kMiddle = (Begin + End) / 2;
    if (k < kMiddle)
      at_index<Begin, kMiddle>(k, body);
    else
      at_index<kMiddle, End>(k, body);
  }
}

// Where a row's target is.
template <class T, int K>
struct TargetPlace {
  int k, v;      // vector of a lane, the same for all of a warp, and element of the vector; k is -1
                 // where it is not among the warp's
  bool holds;    // whether it is among this lane's vectors
  bool at_edge;  // whether it is this lane's edge

  template <int By>
  __device__ __forceinline__ TargetPlace(const WarpTile<T, K, By>& tile, int target) {
    constexpr int V = kVector<T>;
    constexpr bool Wide = By != kByWarp;
    const unsigned element = static_cast<unsigned>(target - tile.base_class);  // large below 0
    const int vectors = Wide ? min(tile.staged_vectors(), 32 * K) : tile.vectors;
    const bool inside = vectors > 0 && element < static_cast<unsigned>(vectors * V);
    k = inside ? static_cast<int>(element / V / 32) : -1;
    v = element % V;
    holds = inside && element / V % 32 == static_cast<unsigned>(tile.lane);
    at_edge = target == tile.edge;
  }
  // Whether it is element p of this lane's vectors.
  __device__ __forceinline__ bool is(int p) const {
    return holds && k == p / kVector<T> && v == p % kVector<T>;
  }
  // The same, of which the compiler knows nothing: it makes no predicates of it before a branch.
  __device__ __forceinline__ TargetPlace made_anew() const {
    TargetPlace place = *this;
    asm volatile("" : "+r"(place.k), "+r"(place.v));
    return place;
  }
  // Puts a value into the target's place, of elements in registers, the last of which is the edge's.
  template <class A>
  __device__ __forceinline__ void set(A (&elements)[K * kVector<T> + 1], A value) const {
    constexpr int P = K * kVector<T>;
    if (k >= 0)  // the same for all lanes, as is the element: a lane's own index would need memory
      at_index<0, P>(k * kVector<T> + v,
                     [&](auto p) { elements[p.value] = holds ? value : elements[p.value]; });
    elements[P] = at_edge ? value : elements[P];
  }
};

template <int Count, class A>
__device__ __forceinline__ A sum_of(const A (&values)[Count]) {
  A sum = 0;
#pragma unroll
  for (int p = 0; p < Count; p += 2) sum += p + 1 < Count ? values[p] + values[p + 1] : values[p];
  return sum;
}

}  // namespace disalign::cuda
