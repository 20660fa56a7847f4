// What the loss operators are given, as _ops/schemas.py hands it over, checked and put where the
// kernels look for it.
#pragma once

#include <vector>

#include "common/loss_args.h"
#include "ops/arguments.h"

namespace disalign {

// An operator's results: those that are wanted, in the order of the schema.
using Results = std::vector<Tensor>;

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

// The tensors and options of every loss.
struct Inputs {
  const Tensor& logits;
  const Tensor& target;
  const OptionalTensor &weight, &scale, &bias, &confidence, &prior, &margin, &sample_weight;
  int64_t ignore_index;
  double label_smoothing, focal_gamma;
};

inline void require_calibration(const OptionalTensor& scale, const OptionalTensor& bias,
                                const OptionalTensor& confidence) {
  require(scale.has_value() == confidence.has_value() && bias.has_value() == confidence.has_value(),
          "scale, bias and confidence are given together or not at all");
}

// Fills in all of args but the layout of the logits, which is there. confidences: entries of the
// confidence; of sample_weight there are args.positions().
inline void set_inputs(const Inputs& in, int64_t confidences, LossArgs& args) {
  const Tensor& logits = in.logits;
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const int64_t classes = args.classes, positions = args.positions();
  require(in.target.numel() == positions && in.target.is_contiguous() &&
              in.target.device() == logits.device(),
          "target is not contiguous with an entry a position");
  require_calibration(in.scale, in.bias, in.confidence);
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

// Gradients, and details, that are wanted: the bits of a WantedCode.
struct Wanted {
  bool logits, scale, bias, confidence, details;

  explicit Wanted(int64_t bits)
      : logits(bits & kWantLogits),
        scale(bits & kWantScale),
        bias(bits & kWantBias),
        confidence(bits & kWantConfidence),
        details(bits & kWantDetails) {}

  bool classes() const { return scale || bias; }
  bool calibration() const { return classes() || confidence; }
  bool any() const { return logits || calibration(); }
};

inline Tensor new_vector(const Tensor& logits, int64_t entries) {
  return new_tensor({entries}, accumulate_dtype(logits.scalar_type()), place_of(logits));
}

// Adds the gradients that are wanted to the results and tells args where to write them. grad_logits:
// the memory for that of the logits, which is then no result.
template <class Args>
void add_gradients(const Tensor& logits, int64_t confidences, Wanted wanted,
                   const Tensor* grad_logits, Args& args, Results& results) {
  require(args.scale != nullptr || !wanted.calibration(),
          "gradients are wanted of a calibration that is not given");
  const auto add = [&](Tensor tensor) {
    results.push_back(tensor);
    return tensor.mutable_data_ptr();
  };
  if (wanted.logits)
    args.grad_logits = grad_logits ? grad_logits->mutable_data_ptr() : add(new_like(logits));
  if (wanted.scale) args.grad_scale = add(new_vector(logits, args.classes));
  if (wanted.bias) args.grad_bias = add(new_vector(logits, args.classes));
  if (wanted.confidence) args.grad_confidence = add(new_vector(logits, confidences));
  args.class_gradients = wanted.classes();
}

}  // namespace disalign
