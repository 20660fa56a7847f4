// What launchers and kernels of every native backend share: plain pointers, no torch.
//
// A is the arithmetic: double for float64 logits, float for all others. Class vectors have C
// entries of A; position vectors have one entry a position.
#pragma once

#include <cstdint>

#include "common/codes.h"
#include "common/loss_math.h"

namespace disalign {

enum class IndexType : int { kUInt8, kInt16, kInt32, kInt64 };

struct LossArgs {
  // Logits (outer, classes, inner): images with planes of `inner` neighbouring positions a class, or
  // rows, of one position each, their classes next to each other (class_stride 1). Strides in
  // elements; outer_stride is 0 for an expanded row.
  const void* logits = nullptr;
  int64_t outer = 0;
  int64_t classes = 0;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t class_stride = 1;
  DISALIGN_METHOD int64_t positions() const { return outer * inner; }

  // Class indices, one a position; null where there are class probabilities.
  const void* target = nullptr;
  IndexType target_type = IndexType::kInt64;
  int64_t ignore_index = -100;
  // Class probabilities y (outer, classes, inner), of A or of the logits' dtype, with their own
  // strides. A position's loss is sum_j b_j (lse - u_j), b_j = w_j (keep y_j + share).
  const void* probabilities = nullptr;
  bool probabilities_of_a = true;
  int64_t probability_outer_stride = 0;
  int64_t probability_class_stride = 1;

  // Class vectors of A; null where not given. scale is a of the formulas, bias is b.
  const void* weight = nullptr;
  const void* scale = nullptr;
  const void* bias = nullptr;
  const void* prior = nullptr;
  const void* margin = nullptr;
  // Position vectors of A. confidence (before the sigmoid) is given exactly when scale and bias
  // are.
  const void* confidence = nullptr;
  const void* sample_weight = nullptr;

  double label_smoothing = 0;
  double keep = 1;   // 1 - label_smoothing
  double share = 0;  // label_smoothing / classes, those of all shards
  double focal_gamma = 0;
  int64_t reduction = kReduceNone;
  int64_t normalizer = kByWeights;

  // What the summed loss is divided by, in the memory of the logits' device: forward writes it,
  // from the caller's number where the normalizer says so, and backward reads it.
  const double* given_denominator = nullptr;
  double* denominator = nullptr;
  // What of this the host knows, on the CPU alone: kernels of a GPU read and sum it themselves.
  double weight_sum = 0;           // sum_j w_j; C without weights
  double inverse_denominator = 1;  // what the summed loss is multiplied by

  // Statistics of A a position: the maximum of the calibrated logits, or what a backend takes off
  // them in its place, and sum_j exp(u_j - row_shift). Written by forward, read by backward; null
  // where a forward on the CPU is not to write them.
  void* row_shift = nullptr;
  void* row_sum = nullptr;
  void* row_total = nullptr;  // sum_j b_j; with class probabilities alone
  void* loss = nullptr;       // forward: the position's loss times its sample weight, of A; or null
  void* reduced_loss = nullptr;  // forward: their sum or mean, one A; or null
  // forward, or null: a position's most probable class, and the entropy of its softmax, of A; both
  // without the margin.
  int64_t* prediction = nullptr;
  void* entropy = nullptr;

  // backward: dL/dloss of A, one a position (stride 1) or one for all (stride 0). null: 1.
  const void* upstream = nullptr;
  int64_t upstream_stride = 0;
  // backward: grad_logits holds the gradient for an upstream gradient of 1.
  bool gradient_made = false;

  // Gradients wanted; null where not. grad_logits is contiguous, or is the logits.
  void* grad_logits = nullptr;
  int64_t grad_outer_stride = 0;
  int64_t grad_class_stride = 1;
  void* grad_scale = nullptr;       // of A
  void* grad_bias = nullptr;        // of A
  void* grad_confidence = nullptr;  // of A
  bool class_gradients = false;     // of scale or bias: the kernels sum both

  // Of a shard, whose logits are some of the rows' classes: forward writes its sums, backward reads
  // factors made of all shards' sums. Both [kShardValues][positions] of A; null where the logits
  // are all classes. row_shift is the factors' first.
  void* shard_sums = nullptr;
  const void* shard_factors = nullptr;
};

// A shard's targets besides its own classes.
constexpr int64_t kElsewhere = -1;  // a class of another shard
constexpr int64_t kIgnored = -2;    // the position is ignored

// In this order: sums are the maximum of u, sum_j exp(u_j - maximum) without the target, u_t and
// d_t (0 where the target is elsewhere), sum_j w_j (u_j - maximum). With class probabilities:
// the maximum, sum_j exp(u_j - maximum), sum_j b_j, 0, sum_j b_j (u_j - maximum). Factors: the maximum over all
// shards, those of q_j = softmax exp(u_j - maximum) - smooth w_j - target [j = t], everything
// included, and d_t.
enum ShardFactor { kFactorMaximum, kFactorSoftmax, kFactorSmooth, kFactorTarget, kFactorSlope };
constexpr int kShardValues = 5;

DISALIGN_HD int64_t read_index(const void* p, IndexType type, int64_t i) {
  switch (type) {
    case IndexType::kUInt8:
      return static_cast<const uint8_t*>(p)[i];
    case IndexType::kInt16:
      return static_cast<const int16_t*>(p)[i];
    case IndexType::kInt32:
      return static_cast<const int32_t*>(p)[i];
    default:
      return static_cast<const int64_t*>(p)[i];
  }
}

}  // namespace disalign
