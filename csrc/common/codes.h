// The numbers by which operators are told what is wanted of them. disalign_ops/_ops/codes.py has
// the same; a test compares the two.
#pragma once

#include <cstdint>

namespace disalign {

// How the positions' losses become one.
enum ReductionCode : int64_t { kReduceNone = 0, kReduceMean = 1, kReduceSum = 2 };

// What 'mean' divides by.
enum NormalizerCode : int64_t { kByWeights = 0, kByValid = 1, kByCount = 2, kByGiven = 3 };

// Bits: gradients; details: the positions' losses beside a reduced one, and of an upsampled loss
// more; the most probable class, and the entropy, of the layouts that _ops/in_forward.py names; the
// statistics and the denominator, which backward reads.
enum WantedCode : int64_t {
  kWantLogits = 1,
  kWantScale = 2,
  kWantBias = 4,
  kWantConfidence = 8,
  kWantDetails = 16,
  kWantPrediction = 32,
  kWantEntropy = 64,
  kWantStatistics = 128
};

}  // namespace disalign
