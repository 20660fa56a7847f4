// The arguments that the forward and backward of every loss operator share, as _ops/schemas.py
// hands them over, checked and put where the kernels look for them. For every native backend.
#pragma once

#include <string>

#include "common/loss_args.h"
#include "ops/arguments.h"

namespace disalign {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum Normalizer : int64_t { kWeights = 0, kValid = 1, kCount = 2, kGiven = 3 };

inline IndexType index_type(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Byte:
      return IndexType::kUInt8;
    case ScalarType::Short:
      return IndexType::kInt16;
    case ScalarType::Int:
      return IndexType::kInt32;
    case ScalarType::Long:
      return IndexType::kInt64;
    default:
      throw std::runtime_error("disalign_ops: target is not uint8, int16, int32 or int64");
  }
}

// The operators' tensors and options, as _ops/schemas.py hands them over.
struct Inputs {
  const Tensor& logits;
  const Tensor& target;
  const OptionalTensor &weight, &scale, &bias, &confidence, &prior, &margin, &sample_weight;
  int64_t ignore_index;
  double label_smoothing, focal_gamma;
};

struct Wanted {
  bool logits, scale, bias, confidence;
  bool any() const { return logits || scale || bias || confidence; }
  bool classes() const { return scale || bias; }
};

// Fills in all of args but the layout of the logits. positions: of the loss, the entries of target
// and sample_weight; confidences: entries of the confidence.
inline void set_inputs(const Inputs& in, int64_t positions, int64_t confidences, LossArgs& args) {
  const Tensor& logits = in.logits;
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const int64_t classes = logits.size(1);
  require(in.target.numel() == positions && in.target.is_contiguous() &&
              in.target.device() == logits.device(),
          "target is not contiguous with an entry a position");
  require(in.scale.has_value() == in.confidence.has_value() &&
              in.bias.has_value() == in.confidence.has_value(),
          "scale, bias and confidence are given together or not at all");
  args.logits = logits.const_data_ptr();
  args.images = logits.size(0);
  args.classes = classes;
  args.target = in.target.const_data_ptr();
  args.target_type = index_type(in.target);
  args.ignore_index = in.ignore_index;
  args.weight = vector_data(in.weight, "weight", classes, dtype, logits);
  args.scale = vector_data(in.scale, "scale", classes, dtype, logits);
  args.bias = vector_data(in.bias, "bias", classes, dtype, logits);
  args.prior = vector_data(in.prior, "prior", classes, dtype, logits);
  args.margin = vector_data(in.margin, "margin", classes, dtype, logits);
  args.confidence = vector_data(in.confidence, "confidence", confidences, dtype, logits);
  args.sample_weight = vector_data(in.sample_weight, "sample_weight", positions, dtype, logits);
  args.label_smoothing = in.label_smoothing;
  args.focal_gamma = in.focal_gamma;
}

inline void require_calibration(const LossArgs& args, Wanted wanted) {
  require(args.scale != nullptr || !(wanted.classes() || wanted.confidence),
          "gradients are wanted of a calibration that is not given");
}

// What backward gets from forward and from the loss's consumer.
inline void set_backward(const Tensor& grad_loss, const Tensor& row_max, const Tensor& row_sum,
                         int64_t positions, const Tensor& logits, LossArgs& args) {
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const bool one_upstream = grad_loss.dim() == 0;
  args.upstream = vector_data(grad_loss, "grad_loss", one_upstream ? 1 : positions, dtype, logits);
  args.upstream_stride = one_upstream ? 0 : 1;
  vector_data(row_max, "row_max", positions, dtype, logits);
  vector_data(row_sum, "row_sum", positions, dtype, logits);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
}

}  // namespace disalign
