// Small kernels, each right, and with a fault planted where kFault is set. A line that a sanitizer
// must name carries a comment `fault: <kernel>` (two lines: either may be named).
//
// All have one signature, so that one table runs them (planted.cpp): in[n], out[n] or fewer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#ifdef DISALIGN_SIMT
#define NOTE_LOAD(pointer, bytes) simt::note_load(pointer, bytes)
#define NOTE_STORE(pointer, bytes) simt::note_store(pointer, bytes)
#define SHARED_FLOATS reinterpret_cast<float*>(simt::dynamic_shared())
#define COPY_ASYNC(to, from, bytes) simt::copy_async(to, from, bytes)
#define COMMIT_COPIES() simt::commit_copies()
#define WAIT_FOR_COPIES(pending) simt::wait_for_copies(pending)
#else
#include <cuda_pipeline.h>

#define NOTE_LOAD(pointer, bytes)
#define NOTE_STORE(pointer, bytes)
extern __shared__ float dynamic_shared_memory[];
#define SHARED_FLOATS dynamic_shared_memory
#define COPY_ASYNC(to, from, bytes) __pipeline_memcpy_async(to, from, bytes)
#define COMMIT_COPIES() __pipeline_commit()
#define WAIT_FOR_COPIES(pending) __pipeline_wait_prior(pending)
#endif

constexpr unsigned kFullMask = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T load(const T* pointer) {
  NOTE_LOAD(pointer, sizeof(T));
  return *pointer;
}

template <typename T>
__device__ __forceinline__ void store(T* pointer, T value) {
  NOTE_STORE(pointer, sizeof(T));
  *pointer = value;
}

__device__ __forceinline__ unsigned global_thread() {
  return blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullMask, value, step);
  return value;
}

// out[block] = sum of in[], with 16-byte loads. The fault: warps' sums are read with no barrier.
template <bool kFault>
__global__ void block_sum(const float* in, float* out, int n) {
  float* warp_sums = SHARED_FLOATS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
    const float4 v = load(reinterpret_cast<const float4*>(in) + i);
    sum += v.x + v.y + v.z + v.w;
  }
  for (int i = n / 4 * 4 + threadIdx.x; i < n; i += blockDim.x) sum += load(in + i);
  sum = warp_sum(sum);
  if (lane == 0) warp_sums[warp] = sum;  // fault: block_sum
  if (!kFault) __syncthreads();
  if (warp == 0) {
    const int warps = blockDim.x / 32;
    sum = warp_sum(lane < warps ? warp_sums[lane] : 0.0f);  // fault: block_sum
    if (lane == 0) store(out + blockIdx.x, sum);
  }
}

// out[i] = in of the thread before. The fault: no barrier. Right in the order of the threads, which
// a shuffled order is not.
template <bool kFault>
__global__ void shift(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  const int t = threadIdx.x;
  values[t] = in[global_thread()];  // fault: shift
  if (!kFault) __syncthreads();
  out[global_thread()] = t ? values[t - 1] : 0.0f;  // fault: shift
}

// out[i] = sum of the first in[] of the block. The fault: no barrier before the table is loaded
// anew. As it is the same table, the result is right in any order.
template <bool kFault>
__global__ void same_table(const float* in, float* out, int) {
  float* table = SHARED_FLOATS;
  float sum = 0.0f;
  for (int round = 0; round < 4; round++) {
    table[threadIdx.x] = in[threadIdx.x];  // fault: same_table
    __syncthreads();
    sum += table[round];  // fault: same_table
    if (!kFault) __syncthreads();
  }
  out[global_thread()] = sum;
}

// out[i] = in of the neighbouring lane. The fault: no __syncwarp.
template <bool kFault>
__global__ void swap_lanes(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  values[threadIdx.x] = in[global_thread()];  // fault: swap_lanes
  if (!kFault) __syncwarp();
  out[global_thread()] = values[threadIdx.x ^ 1];  // fault: swap_lanes
}

// out[i] = in[] of the first lane. The fault: a shuffle instead of __syncwarp. It makes lanes meet,
// but does not order memory, and the result is right.
template <bool kFault>
__global__ void meet_by_shuffle(const float* in, float* out, int) {
  float* slots = SHARED_FLOATS;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) slots[warp] = in[global_thread()];  // fault: meet_by_shuffle
  if (kFault) {
    __shfl_sync(kFullMask, 0, 0);
  } else {
    __syncwarp();
  }
  out[global_thread()] = slots[warp];  // fault: meet_by_shuffle
}

// out[i] = in of lane 0, or of lane 20, which is not in the mask.
template <bool kFault>
__global__ void shuffle_from(const float* in, float* out, int) {
  const float value = in[global_thread()];
  if (threadIdx.x % 32 < 16) {
    out[global_thread()] = __shfl_sync(0x0000ffffu, value, kFault ? 20 : 0);
  } else {
    out[global_thread()] = value;
  }
}

template <bool kFault>
__global__ void outside_own_mask(const float* in, float* out, int) {
  const float value = in[global_thread()];
  out[global_thread()] = __shfl_xor_sync(kFault ? 0x0000ffffu : kFullMask, value, 0);
}

// The fault: lanes return before a collective that names them.
template <bool kFault>
__global__ void early_return(const float* in, float* out, int) {
  out[global_thread()] = in[global_thread()];
  if (kFault && threadIdx.x % 32 >= 16) return;
  __syncwarp();
}

// The fault: a mask for each lane, 32 in a warp.
template <bool kFault>
__global__ void many_masks(const float* in, float* out, int) {
  const unsigned mask = kFault ? 1u << threadIdx.x % 32 : kFullMask;
  out[global_thread()] = __shfl_xor_sync(mask, in[global_thread()], 0);
}

template <bool kFault>
__global__ void divergent_barrier(const float* in, float* out, int) {
  const bool first_half = threadIdx.x < blockDim.x / 2;
  if (kFault && first_half) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[global_thread()] = in[global_thread()];
}

// The fault: half of the threads wait in a barrier, the other half in a warp collective.
template <bool kFault>
__global__ void deadlock(const float* in, float* out, int) {
  if (kFault && threadIdx.x % 32 < 16) __syncthreads();
  __syncwarp();
  out[global_thread()] = in[global_thread()];
  if (kFault && threadIdx.x % 32 >= 16) __syncthreads();
}

// The fault: loads in[n].
template <bool kFault>
__global__ void load_outside(const float* in, float* out, int n) {
  const int i = global_thread();
  store(out + i, load(in + (kFault && i == n - 1 ? n : i)));
}
template <bool kFault>
__global__ void plain_load_outside(const float* in, float* out, int n) {
  const int i = global_thread();
  out[i] = in[kFault && i == n - 1 ? n : i];  // fault: plain_load_outside
}

// The fault: stores into its input.
template <bool kFault>
__global__ void store_into_input(const float* in, float* out, int) {
  const int i = global_thread();
  store(kFault ? const_cast<float*>(in) + i : out + i, load(in + i));
}

// out[i] = sum of 4 in[] from i / 4 * 4 on. The fault: from i / 4 * 4 + 1 on, as one vector.
template <bool kFault>
__global__ void load_misaligned(const float* in, float* out, int n) {
  const int i = global_thread();
  const int first = i / 4 * 4 + (kFault && i < n - 4 ? 1 : 0);
  const float4 v = load(reinterpret_cast<const float4*>(in + first));
  store(out + i, v.x + v.y + v.z + v.w);
}
template <bool kFault>
__global__ void plain_load_misaligned(const float* in, float* out, int n) {
  const int i = global_thread();
  const int first = i / 4 * 4 + (kFault && i < n - 4 ? 1 : 0);
  const float4 v = *reinterpret_cast<const float4*>(in + first);  // fault: plain_load_misaligned
  out[i] = v.x + v.y + v.z + v.w;
}

// The fault: the last slot of shared memory is read but was never written.
template <bool kFault>
__global__ void shared_unwritten(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  const unsigned t = threadIdx.x;
  if (!kFault || t != blockDim.x - 1) values[t] = in[global_thread()];
  __syncthreads();
  out[global_thread()] = values[blockDim.x - 1 - t];
}

// The fault: writes one float behind shared memory.
template <bool kFault>
__global__ void shared_overflow(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  const float value = in[global_thread()];
  values[threadIdx.x + (kFault ? 1 : 0)] = value;  // fault: shared_overflow
  __syncthreads();
  out[global_thread()] = value;
}

// The fault: every block writes out[0], with the same value.
template <bool kFault>
__global__ void blocks_write(const float* in, float* out, int) {
  if (threadIdx.x == 0) out[kFault ? 0 : blockIdx.x] = in[0];  // fault: blocks_write
}

// The fault: a block reads what the block before wrote, which no launch order promises.
template <bool kFault>
__global__ void blocks_chain(const float* in, float* out, int) {
  const int b = blockIdx.x;
  if (threadIdx.x == 0) out[b] = in[b] + (kFault && b ? out[b - 1] : 0.0f);  // fault: blocks_chain
}

// The last block to take a ticket adds up what all have written. The fault: no fence before it.
template <bool kFault>
__global__ void blocks_ticket(const float* in, float* out, int) {
  if (threadIdx.x > 0) return;
  unsigned* ticket = reinterpret_cast<unsigned*>(out + gridDim.x + 1);  // a multiple of gridDim.x
  out[blockIdx.x] = in[blockIdx.x];                                     // fault: blocks_ticket
  if (!kFault) __threadfence();
  if ((atomicAdd(ticket, 1u) + 1) % gridDim.x != 0) return;
  __threadfence();
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) sum += out[b];  // fault: blocks_ticket
  out[gridDim.x] = sum;
}

// Static shared memory: out[i] = in, reversed in the block. The fault: no barrier.
template <bool kFault>
__global__ void static_reverse(const float* in, float* out, int) {
  __shared__ float values[1024];
  values[threadIdx.x] = in[global_thread()];  // fault: static_reverse
  if (!kFault) __syncthreads();
  out[global_thread()] = values[blockDim.x - 1 - threadIdx.x];  // fault: static_reverse
}

// out = in rounded to bfloat16 in even threads, to float16 in odd ones. The fault: an assertion.
template <bool kFault>
__global__ void round_trip(const float* in, float* out, int) {
  const float value = in[global_thread()];
  const bool even = threadIdx.x % 2 == 0;
  const float rounded =
      even ? __bfloat162float(__float2bfloat16_rn(value)) : __half2float(__float2half_rn(value));
  assert(!kFault || value == rounded);
  out[global_thread()] = rounded;
}

// out = 1 where any thread of the block sees a negative value. The fault: __trap.
template <bool kFault>
__global__ void vote(const float* in, float* out, int) {
  const bool negative = in[global_thread()] < 0.0f;
  if (kFault && negative) __trap();
  const unsigned lanes = __ballot_sync(kFullMask, negative);
  const int threads = __syncthreads_count(negative);
  const bool any = __syncthreads_or(negative), all = __syncthreads_and(negative);
  assert(__popc(lanes) <= threads && any == (threads > 0));
  assert(all == (threads == static_cast<int>(blockDim.x)));
  assert(__any_sync(kFullMask, negative) == (lanes != 0));
  assert(__all_sync(kFullMask, negative) == (lanes == kFullMask));
  out[global_thread()] = any ? 1.0f : 0.0f;
}

// ---- Asynchronous copies: a thread copies in[i] to its slot of shared memory ----

// The fault: the slot is read before the wait.
template <bool kFault>
__global__ void copy_read_early(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  const float early = *slot;
  WAIT_FOR_COPIES(0);
  out[global_thread()] = kFault ? early : *slot;
}

// The fault: the wait leaves one group under way, that of the copy.
template <bool kFault>
__global__ void copy_wait_for_few(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(kFault ? 1 : 0);
  out[global_thread()] = *slot;
  WAIT_FOR_COPIES(0);
}

// Right: a group may be empty, and counts. The fault: the copy is in the empty group's place, the
// last one, which the wait leaves under way.
template <bool kFault>
__global__ void copy_empty_group(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  if (!kFault) COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  if (kFault) COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(1);
  out[global_thread()] = *slot;
  WAIT_FOR_COPIES(0);
}

// The fault: the copy is of no group yet when all groups are waited for.
template <bool kFault>
__global__ void copy_uncommitted(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  COPY_ASYNC(slot, in + global_thread(), 4);
  if (!kFault) COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  out[global_thread()] = *slot;
  if (kFault) COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
}

// out[i] = in of the lane before. The fault: no barrier; the own wait says nothing of other lanes.
// Right in the order of the threads, which a shuffled order is not.
template <bool kFault>
__global__ void copy_of_other_lane(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  const unsigned t = threadIdx.x;
  COPY_ASYNC(values + t, in + global_thread(), 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);  // fault: copy_of_other_lane
  if (!kFault) __syncwarp();
  out[global_thread()] = t % 32 ? values[t - 1] : 0.0f;  // fault: copy_of_other_lane
}

// The same. The fault: the barrier comes before the wait, and orders no copies.
template <bool kFault>
__global__ void copy_barrier_early(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  const unsigned t = threadIdx.x;
  COPY_ASYNC(values + t, in + global_thread(), 4);
  COMMIT_COPIES();
  if (kFault) __syncwarp();
  WAIT_FOR_COPIES(0);  // fault: copy_barrier_early
  if (!kFault) __syncwarp();
  out[global_thread()] = t % 32 ? values[t - 1] : 0.0f;  // fault: copy_barrier_early
}

// out[i] = in of the lane before. The fault: no barrier before the slots are copied to anew.
template <bool kFault>
__global__ void copy_over_other_lane(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  const unsigned t = threadIdx.x;
  float value = 0.0f;
  for (int round = 0; round < 3; round++) {
    if (!kFault) __syncwarp();
    COPY_ASYNC(values + t, in + global_thread(), 4);  // fault: copy_over_other_lane
    COMMIT_COPIES();
    WAIT_FOR_COPIES(0);
    __syncwarp();
    value = t % 32 ? values[t - 1] : 0.0f;  // fault: copy_over_other_lane
  }
  out[global_thread()] = value;
}

// out[i] = in[i] + in[i + 1], both by the same slot. The fault: the second copy is issued before the
// first one is read.
template <bool kFault>
__global__ void copy_over_unread(const float* in, float* out, int n) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  const int i = global_thread();
  COPY_ASYNC(slot, in + i, 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  float sum = *slot;
  COPY_ASYNC(slot, in + (i + 1) % n, 4);
  COMMIT_COPIES();
  if (kFault) sum = *slot;
  WAIT_FOR_COPIES(0);
  out[i] = sum + *slot;
}

// out[i] = in[i], 0 of a warp's first lane. The fault: the 0 is stored before the wait, and lost
// where the copy is late.
template <bool kFault>
__global__ void copy_over_store(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  const bool first = threadIdx.x % 32 == 0;
  COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  if (kFault && first) *slot = 0.0f;
  WAIT_FOR_COPIES(0);
  if (!kFault && first) *slot = 0.0f;
  out[global_thread()] = *slot;
}

// The fault: a second copy to where one is under way; which one comes last is not said.
template <bool kFault>
__global__ void copy_twice(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  COPY_ASYNC(slot, in, 4);
  COMMIT_COPIES();
  if (!kFault) WAIT_FOR_COPIES(0);
  COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  out[global_thread()] = *slot;
}

// out[i] = in[i], copied from out[i] before that is overwritten. The fault: it is overwritten before
// the wait.
template <bool kFault>
__global__ void copy_of_changed_source(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  float* to = out + global_thread();
  COPY_ASYNC(slot, to, 4);
  COMMIT_COPIES();
  if (kFault) *to = in[global_thread()];
  WAIT_FOR_COPIES(0);
  *to = in[global_thread()];
}

// The fault: a copy of the last thread to just behind shared memory.
template <bool kFault>
__global__ void copy_outside(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  const bool behind = kFault && threadIdx.x == blockDim.x - 1;
  COPY_ASYNC(slot + (behind ? 1 : 0), in + global_thread(), 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  out[global_thread()] = *slot;
}

// The fault: a copy from shared memory.
template <bool kFault>
__global__ void copy_from_shared(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  *slot = in[global_thread()];
  COPY_ASYNC(slot, kFault ? slot : in + global_thread(), 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  out[global_thread()] = *slot;
}

// Two floats by every second thread. The fault: from the one after them.
template <bool kFault>
__global__ void copy_misaligned(const float* in, float* out, int n) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  const int i = global_thread();
  if (i % 2 == 0) COPY_ASYNC(slot, in + i + (kFault && i + 2 < n ? 1 : 0), 8);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  __syncwarp();
  out[i] = *slot;
}

template <bool kFault>
__global__ void copy_three_bytes(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  COPY_ASYNC(slot, in + global_thread(), kFault ? 3 : 4);
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  out[global_thread()] = *slot;
}

// The fault: copies in[n].
template <bool kFault>
__global__ void copy_of_outside(const float* in, float* out, int n) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  const int i = global_thread();
  COPY_ASYNC(slot, in + (kFault && i == n - 1 ? n : i), 4);  // fault: copy_of_outside
  COMMIT_COPIES();
  WAIT_FOR_COPIES(0);
  out[i] = *slot;
}

// The fault: nobody waits for the copy, whose memory may be another block's when it comes.
template <bool kFault>
__global__ void copy_at_exit(const float* in, float* out, int) {
  float* slot = SHARED_FLOATS + threadIdx.x;
  COPY_ASYNC(slot, in + global_thread(), 4);
  COMMIT_COPIES();
  if (!kFault) WAIT_FOR_COPIES(0);
  out[global_thread()] = in[global_thread()];
}

// ---- Clusters of kClusterSize blocks ----

constexpr unsigned kClusterSize = 2;

__device__ inline void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
__device__ inline float* of_block(float* shared, unsigned rank) {
  return static_cast<float*>(__cluster_map_shared_rank(shared, rank));
}

// out[block] = sum of in[0], in[1] and in[2] of the cluster's blocks, each written by its block
// into the memory of all of them. The fault: no barrier between that and the sum.
template <bool kFault>
__global__ void cluster_sum(const float* in, float* out, int) {
  float* slots = SHARED_FLOATS;
  float sum = 0.0f;
  cluster_barrier();
  for (int round = 0; round < 3; round++) {
    float* area = slots + round % 2 * kClusterSize;
    if (threadIdx.x < kClusterSize) {
      float* to = of_block(area, threadIdx.x) + __clusterRelativeBlockRank();
      *to = in[blockIdx.x * blockDim.x + round];  // fault: cluster_sum
    }
    if (!kFault) cluster_barrier();
    for (unsigned rank = 0; rank < kClusterSize; rank++) {
      sum += area[rank];  // fault: cluster_sum
    }
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
  if (kFault) cluster_barrier();
}

// out[i] = in[i] of the next block of the cluster. The fault: no barrier at the end, so that a
// block may have exited when another reads its memory.
template <bool kFault>
__global__ void cluster_exit(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  values[threadIdx.x] = in[global_thread()];
  cluster_barrier();
  const unsigned next = (__clusterRelativeBlockRank() + 1) % __clusterSizeInBlocks();
  out[global_thread()] = of_block(values, next)[threadIdx.x];
  if (!kFault) cluster_barrier();
}

// The fault: half of the threads wait for the cluster, the other half for their block.
template <bool kFault>
__global__ void cluster_deadlock(const float* in, float* out, int) {
  if (!kFault || threadIdx.x % 2 == 0) cluster_barrier();
  __syncthreads();
  if (kFault && threadIdx.x % 2 == 1) cluster_barrier();
  out[global_thread()] = in[global_thread()];
}

template <bool kFault>
__global__ void cluster_arrival(const float* in, float* out, int) {
  __cluster_barrier_arrive();
  if (kFault) __cluster_barrier_arrive();
  __cluster_barrier_wait();
  out[global_thread()] = in[global_thread()];
}

template <bool kFault>
__global__ void cluster_no_arrival(const float* in, float* out, int) {
  if (!kFault) __cluster_barrier_arrive();
  __cluster_barrier_wait();
  out[global_thread()] = in[global_thread()];
}

// The fault: a thread of the second block waits for a lane that never meets it, and the first block
// for that thread.
template <bool kFault>
__global__ void cluster_blocks(const float* in, float* out, int) {
  const bool first = __clusterRelativeBlockRank() == 0;
  if (!kFault || first) cluster_barrier();
  if (kFault && !first && threadIdx.x == 0) __syncwarp(3);
  cluster_barrier();
  out[global_thread()] = in[global_thread()];
}

// Right: threads that have exited count as arrived. The fault: a pointer that is not to shared
// memory is mapped to another block.
template <bool kFault>
__global__ void cluster_pointer(const float* in, float* out, int) {
  out[global_thread()] = in[global_thread()];
  if (threadIdx.x % 2 == 0) return;
  cluster_barrier();
  if (kFault) out[0] = *of_block(out, 0);
}

// The fault: the memory of a third block of two.
template <bool kFault>
__global__ void cluster_rank(const float* in, float* out, int) {
  float* values = SHARED_FLOATS;
  cluster_barrier();
  of_block(values, kFault ? kClusterSize : __clusterRelativeBlockRank())[threadIdx.x] =
      in[global_thread()];
  out[global_thread()] = values[threadIdx.x];
  cluster_barrier();
}

// out[i] = i, from every index of the block and of the thread.
__global__ void number_threads(float* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  store(out + i, static_cast<float>(i));
}
