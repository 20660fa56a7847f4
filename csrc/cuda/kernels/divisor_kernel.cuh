// The shares of the denominator of 'mean', of forward where the gradient needs it:
// `forward_denominator` adds them up. One pass over targets and weights.
#pragma once

#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/position.cuh"

namespace disalign::cuda {

template <class A>
__global__ void __launch_bounds__(kDivisorThreads, 1) divisor_kernel(const DivisorArgs args) {
  DISALIGN_SHARED_MEMORY(memory);
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.positions();
       i += int64_t{gridDim.x} * blockDim.x) {
    // With class probabilities every position is valid, and has no class of its own.
    const int t = args.probabilities ? kElsewhere : target_of(args, i);
    if (is_valid(t))
      sum += divisor_share(args, t < 0 ? A(1) : vector_entry<A>(args.weight, t, A(1)),
                           vector_entry<A>(args.sample_weight, i, A(1)));
  }
  sum = block_sum(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) args.divisors[blockIdx.x] = sum;
  if (args.ticket && blockIdx.x == 0 && threadIdx.x == 0) *args.ticket = 0;
}

}  // namespace disalign::cuda
