// What is known when all blocks of a loss kernel are done: the reduced loss, its denominator, and
// the sums over blocks and tiles of the gradients of scale, bias and confidence.
//
// - Maps: a block adds kFinishClasses neighbouring classes, kFinishSlices threads to a class, each
//   a part of the blocks, added up in their order, every other block for scale and for bias;
//   further blocks go over the positions.
// - The same blocks give the same bits.
#pragma once

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/block_sums.cuh"
#include "cuda/kernels/device.cuh"

namespace disalign::cuda {

constexpr int kFinishClasses = 32;
constexpr int kFinishSlices = 8;
constexpr int kFinishThreads = kFinishClasses * kFinishSlices;

template <class A>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const FinishArgs args) {
  DISALIGN_SHARED_MEMORY(memory);
  double* scratch = reinterpret_cast<double*>(memory);
  double inverse = 1;
  if (args.forward) {
    double denominator = 1;
    if (args.reduction == kReduceMean) {
      if (args.normalizer == kByGiven)
        denominator = *args.given_denominator;
      else if (args.normalizer == kByCount)
        denominator = static_cast<double>(args.positions());
      else
        denominator = args.divisors ? total_of_divisors(args.divisors, args.divisor_blocks)
                                    : total_of(args.block_sums, args.blocks, 1, scratch);
    }
    inverse = denominator == 0 ? 0.0 : 1.0 / denominator;
    if (blockIdx.x == 0)
      write_reduced_loss<A>(args, args.block_sums, args.blocks, denominator, scratch);
  }
  const auto scaled = [&](double v) { return static_cast<A>(inverse == 0 ? 0.0 : v * inverse); };

  if (static_cast<int64_t>(blockIdx.x) < args.class_grid) {
    const int column = threadIdx.x % kFinishClasses, slice = threadIdx.x / kFinishClasses;
    const int which = blockIdx.x % 2;
    const int64_t j = int64_t{blockIdx.x / 2} * kFinishClasses + column;
    const int64_t begin = args.class_blocks * slice / kFinishSlices;
    const int64_t end = args.class_blocks * (slice + 1) / kFinishSlices;
    void* out = which == 0 ? args.grad_scale : args.grad_bias;
    if (!out) return;
    double sum = 0;
    if (j < args.classes) {
      const A* from = static_cast<const A*>(args.class_sums) + which * args.classes + j;
#pragma unroll 4
      for (int64_t block = begin; block < end; ++block)
        sum += static_cast<double>(from[2 * block * args.classes]);
    }
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (slice > 0 || j >= args.classes) return;
    sum = 0;
    for (int other = 0; other < kFinishSlices; ++other)
      sum += scratch[other * kFinishClasses + column];
    static_cast<A*>(out)[j] = scaled(sum);
    return;
  }
  if (!args.grad_confidence) return;
  A* out = static_cast<A*>(args.grad_confidence);
  const int64_t step = (int64_t{gridDim.x} - args.class_grid) * blockDim.x;
  for (int64_t i = (blockIdx.x - args.class_grid) * blockDim.x + threadIdx.x; i < args.confidences;
       i += step) {
    if (!args.confidence_sums) {
      out[i] = scaled(static_cast<double>(out[i]));
      continue;
    }
    double sum = 0;
    for (int64_t tile = 0; tile < args.tiles; ++tile)
      sum += static_cast<double>(
          static_cast<const A*>(args.confidence_sums)[tile * args.confidences + i]);
    out[i] = scaled(sum);
  }
}

}  // namespace disalign::cuda
