// A block's share of the reduced loss, handed to finish_kernel.cuh.
#pragma once

#include "common/mean.h"
#include "cuda/kernels/arguments.h"
#include "cuda/kernels/group.cuh"
#include "cuda/kernels/launch.h"

namespace disalign::cuda {

// The share of the denominator, for what finish_kernel divides by.
template <class A>
__device__ __forceinline__ double divisor_share(const LossArgs& args, A target_weight,
                                                A sample_weight) {
  return args.normalizer == kByWeights ? static_cast<double>(target_weight * sample_weight) : 1.0;
}

constexpr int kDivisorThreads = 256;
constexpr int64_t kDivisorBlocks = 512;  // at most

// The sum of what divisor_kernel has written; every thread of every kernel gets the same bits.
__device__ __forceinline__ double total_of_divisors(const double* divisors, int blocks) {
  double sum = 0;
  for (int block = threadIdx.x % 32; block < blocks; block += 32) sum += divisors[block];
  return warp_sum(sum);
}

// Of forward, what the summed loss is divided by, before args.denominator is written.
__device__ __forceinline__ double forward_denominator(const DivisorArgs& args) {
  if (args.reduction != kReduceMean) return 1;
  if (args.normalizer == kByGiven) return *args.given_denominator;
  if (args.normalizer == kByCount) return static_cast<double>(args.positions());
  return total_of_divisors(args.divisors, args.divisor_blocks);
}

// `what` (0: loss, 1: denominator) of all blocks; every thread gets it. `scratch` has an entry a warp.
__device__ __forceinline__ double total_of(const double* block_sums, int64_t blocks, int what,
                                           double* scratch) {
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x)
    sum += block_sums[2 * block + what];
  sum = block_sum(sum, scratch);
  __syncthreads();
  return sum;
}

// By one block, of the sums of all.
template <class A>
__device__ __forceinline__ void write_reduced_loss(const LossArgs& args, const double* block_sums,
                                                   int64_t blocks, double denominator,
                                                   double* scratch) {
  if (threadIdx.x == 0) *args.denominator = denominator;
  if (!args.reduced_loss) return;
  const double loss = total_of(block_sums, blocks, 0, scratch);
  if (threadIdx.x == 0)
    *static_cast<A*>(args.reduced_loss) =
        static_cast<A>(mean_of(loss, denominator, args.normalizer == kByWeights));
}

// The last block to come here, if there is a ticket, makes the loss of what all have written, in their
// order. By the whole block; scratch has an entry a warp.
template <class A>
__device__ __forceinline__ void finish_if_last(const DivisorArgs& args, const double* block_sums,
                                               double* scratch) {
  if (!args.ticket || !is_last_block(args.ticket, gridDim.x, reinterpret_cast<int*>(scratch)))
    return;
  write_reduced_loss<A>(args, block_sums, gridDim.x, forward_denominator(args), scratch);
}

// A block's share of the loss and the denominator, of which every thread has a part. By the whole
// block; scratch has an entry a warp.
template <class A>
__device__ __forceinline__ void write_block_share(const DenseArgs& args, double loss,
                                                  double divisor, double* scratch) {
  loss = block_sum(loss, scratch);
  __syncthreads();
  divisor = block_sum(divisor, scratch);
  if (threadIdx.x == 0) {
    args.block_sums[2 * blockIdx.x] = loss;
    args.block_sums[2 * blockIdx.x + 1] = divisor;
  }
  finish_if_last<A>(args, args.block_sums, scratch);
}

// The sums of a block's groups, in shared memory: registers are for the logits.
class BlockSums {
 public:
  static __host__ __device__ constexpr int entries(int groups) { return 2 * groups; }

  __device__ __forceinline__ BlockSums(double* memory, int groups)
      : memory_(memory), groups_(groups) {
    for (int i = threadIdx.x; i < entries(groups); i += blockDim.x) memory_[i] = 0;
    __syncthreads();
  }
  // By one thread of the group.
  __device__ __forceinline__ void add(int group, double loss, double divisor) {
    memory_[2 * group] += loss;
    memory_[2 * group + 1] += divisor;
  }
  // The block's, in the order of the groups; as those of block `at`.
  __device__ __forceinline__ void write(double* block_sums, int64_t at = blockIdx.x) const {
    __syncthreads();
    if (threadIdx.x >= 2) return;
    double sum = 0;
    for (int group = 0; group < groups_; ++group) sum += memory_[2 * group + threadIdx.x];
    block_sums[2 * at + threadIdx.x] = sum;
  }
  template <class A>
  __device__ __forceinline__ void write_and_finish(const RowArgs& args,
                                                   int64_t at = blockIdx.x) const {
    write(args.block_sums, at);
    finish_if_last<A>(args, args.block_sums, memory_);
  }

 private:
  double* memory_;
  int groups_;
};

}  // namespace disalign::cuda
