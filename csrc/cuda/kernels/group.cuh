// What threads do together: reductions over a warp, a group and a block, the blocks of a cluster, the
// last block of a launch.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/launch.h"

namespace disalign::cuda {

// The blocks of a cluster (sm_90 and newer): they run together, and write each other's shared
// memory.
struct Cluster {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kExists = true;
#else
  static constexpr bool kExists = false;
#endif
  // What threads of all blocks wrote before is seen after it by all of them.
  static __device__ __forceinline__ void barrier() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
#else
    __trap();  // not launched: TorchLauncher::clusters
#endif
  }
  // The same place in the shared memory of block `rank`.
  template <class V>
  static __device__ __forceinline__ V* of_block(V* shared, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    return static_cast<V*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
#else
    return shared;
#endif
  }
};

// Over so many neighbouring lanes, a power of two, by each of a warp; in a fixed order.
template <class A>
__device__ __forceinline__ A warp_max(A v, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    v = larger(v, __shfl_xor_sync(kFullWarp, v, distance));
  return v;
}
template <class A>
__device__ __forceinline__ A warp_sum(A v, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
}

// The threads that work on one row together: a power of two within a warp, or, Wide, the block, which
// has at most so many warps.
template <class A, bool Wide, int kMostWarps = 16>
class Group {
 public:
  static constexpr int kWarps = 32;  // entries of a value in the scratch
  static constexpr int kValues = 8;  // that one reduction sums, at most
  // Two areas in turn: a reduction's readers are done before the one after the next begins.
  static constexpr int kScratchEntries = Wide ? 2 * kValues * kWarps : 0;

  __device__ __forceinline__ Group(int lanes, A* scratch) : lanes_(lanes), scratch_(scratch) {}

  // The largest v of the group. What one of its threads, which `holds`, has in `held`, every thread
  // gets; 0 where there is none, as all of them know.
  template <int Count>
  __device__ __forceinline__ A max(A v, bool holds, bool someone_holds, A (&held)[Count]) {
    static_assert(Count < kValues, "scratch is too small");
    v = warp_max(v, Wide ? 32 : lanes_);
    if constexpr (Wide) {
      A* area = next_area();
      if (lane() == 0) area[warp()] = v;
      if (holds) {
#pragma unroll
        for (int i = 0; i < Count; ++i) area[(i + 1) * kWarps] = held[i];
      }
      __syncthreads();
      v = max_of_warps(area);
#pragma unroll
      for (int i = 0; i < Count; ++i) held[i] = someone_holds ? area[(i + 1) * kWarps] : A(0);
    } else {
      const unsigned holders = __ballot_sync(kFullWarp, holds) >> (lane() & -lanes_);
      const int holder = __ffs(static_cast<int>(holders)) - 1;
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const A from = __shfl_sync(kFullWarp, held[i], someone_holds ? holder : 0, lanes_);
        held[i] = someone_holds ? from : A(0);
      }
    }
    return v;
  }

  __device__ __forceinline__ A max(A v) {
    v = warp_max(v, Wide ? 32 : lanes_);
    if constexpr (Wide) {
      A* area = next_area();
      if (lane() == 0) area[warp()] = v;
      __syncthreads();
      v = max_of_warps(area);
    }
    return v;
  }

  // Sums each of `count` values over the group; every thread gets them.
  template <int Count>
  __device__ __forceinline__ void sum(A (&values)[Count]) {
    static_assert(Count <= kValues, "scratch is too small");
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = warp_sum(values[i], Wide ? 32 : lanes_);
    if constexpr (Wide) {
      A* area = next_area();
      if (lane() == 0) {
#pragma unroll
        for (int i = 0; i < Count; ++i) area[i * kWarps + warp()] = values[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Count; ++i)
        values[i] =
            warp_sum(lane() % kMostWarps < warps() ? area[i * kWarps + lane() % kMostWarps] : A(0),
                     kMostWarps);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int warps() { return blockDim.x / 32; }

  // Of what each warp's lane 0 has put into an area.
  static __device__ __forceinline__ A max_of_warps(const A* area) {
    return warp_max(lane() % kMostWarps < warps() ? area[lane() % kMostWarps] : kLowest<A>,
                    kMostWarps);
  }

  __device__ __forceinline__ A* next_area() {
    A* area = scratch_ + turn_ * kValues * kWarps;
    turn_ ^= 1;
    return area;
  }

  int lanes_;
  A* scratch_;
  int turn_ = 0;
};

// The same of the blocks of a cluster, each of at most so many warps: one barrier a reduction, of the
// cluster.
template <class A, int kMostWarps, int kMostValues = 2>
class ClusterGroup {
 public:
  static constexpr int kValues = kMostValues;                   // that one reduction sums, at most
  static constexpr int kEntries = kClusterBlocks * kMostWarps;  // of a value
  // Two areas in turn: who writes one again has met all others since they read it.
  static constexpr int kScratchEntries = 2 * kValues * kEntries;

  // Ends with a barrier: until then blocks may not have started, and have no memory to write to.
  __device__ __forceinline__ ClusterGroup(int blocks, A* scratch)
      : blocks_(blocks), scratch_(scratch) {
    Cluster::barrier();
  }

  __device__ __forceinline__ A max(A v) {
    A values[1] = {warp_max(v)};
    const A* area = exchange(values);
    v = kLowest<A>;
    over_entries([&](int i) { v = larger(v, area[i]); });
    return warp_max(v);
  }

  template <int Count>
  __device__ __forceinline__ void sum(A (&values)[Count]) {
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] = warp_sum(values[k]);
    const A* area = exchange(values);
    // Every warp of every block by the same additions: the same bits.
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      values[k] = 0;
      over_entries([&](int i) { values[k] += area[k * kEntries + i]; });
      values[k] = warp_sum(values[k]);
    }
  }

 private:
  __device__ __forceinline__ int warps() const { return blockDim.x / 32; }
  __device__ __forceinline__ int entries() const { return blocks_ * warps(); }

  // A lane's entries. Without a loop of each lane's own, as most clusters have no more than 32.
  template <class Body>
  __device__ __forceinline__ void over_entries(const Body& body) const {
    const int lane = threadIdx.x % 32;
    if (lane < entries()) body(lane);
#pragma unroll 1
    for (int first = 32; first < entries(); first += 32)
      if (first + lane < entries()) body(first + lane);
  }

  // A warp's values to all blocks, a lane a block. Returns where those of all warps are.
  template <int Count>
  __device__ __forceinline__ const A* exchange(const A (&values)[Count]) {
    static_assert(Count <= kValues, "scratch is too small");
    const int at = turn_ * kValues * kEntries, block = threadIdx.x % 32;
    turn_ ^= 1;
    if (block < blocks_) {
      // One addition of 64 bits.
      const int own =
          at + static_cast<int>(blockIdx.y) * warps() + static_cast<int>(threadIdx.x / 32);
      A* to = Cluster::of_block(scratch_ + own, block);
#pragma unroll
      for (int k = 0; k < Count; ++k) to[k * kEntries] = values[k];
    }
    Cluster::barrier();
    return scratch_ + at;
  }

  int blocks_;
  A* scratch_;
  int turn_ = 0;
};

// The sums over a group of the first Count values.
template <int Count, class G, class A, int All>
__device__ __forceinline__ void sum_first(G& group, A (&values)[All]) {
  A first[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) first[k] = values[k];
  group.sum(first);
#pragma unroll
  for (int k = 0; k < Count; ++k) values[k] = first[k];
}

// The sum of one value a thread over the block, in a fixed order; every thread gets it. `scratch`
// has an entry a warp, and is free again after the block's next barrier.
template <class A>
__device__ __forceinline__ A block_sum(A v, A* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) v += scratch[warp];
  return v;
}

// Whether this block is the last of so many to come here: it sees what all of them have written
// before. Integers are counted, so that nothing depends on the order. `scratch` has an entry.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks, int* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *scratch = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  const int last = *scratch;
  __syncthreads();
  __threadfence();
  return last != 0;
}

}  // namespace disalign::cuda
