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

// Class probabilities in place of class indices.
inline bool holds_probabilities(const Tensor& target) {
  return is_logits_dtype(target.scalar_type());
}

// (outer, classes, inner), as the logits' layout has it; inner: rows have none, images two.
inline void set_probabilities(const Inputs& in, LossArgs& args) {
  const Tensor& y = in.target;
  const int64_t dim = y.dim();
  const ScalarType dtype = accumulate_dtype(in.logits.scalar_type());
  args.probabilities_of_a = y.scalar_type() == dtype;
  require(args.probabilities_of_a || y.scalar_type() == in.logits.scalar_type(),
          "class probabilities have neither the logits' dtype nor the accumulation dtype");
  require(!in.margin.has_value() && in.focal_gamma == 0,
          "class probabilities have no one target for a margin or a focal exponent");
  int64_t inner = 1;
  for (int64_t d = dim - 1; d > 1; --d) {
    require(y.stride(d) == inner || y.size(d) == 1 || y.numel() == 0,
            "the class probabilities' positions are not next to each other");
    inner *= y.size(d);
  }
  require(dim >= 2 && y.size(0) == args.outer && y.size(1) == args.classes && inner == args.inner,
          "class probabilities do not have an entry a position and class");
  require(dim > 2 || y.stride(1) == 1 || y.size(1) <= 1 || y.numel() == 0,
          "the class probabilities' classes are not next to each other");
  args.probabilities = y.const_data_ptr();
  args.probability_outer_stride = y.stride(0);
  args.probability_class_stride = y.stride(1);
}

// Fills in all of args but the layout of the logits, which is there. confidences: entries of the
// confidence; of sample_weight there are args.positions().
inline void set_inputs(const Inputs& in, int64_t confidences, LossArgs& args) {
  const Tensor& logits = in.logits;
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const int64_t classes = args.classes, positions = args.positions();
  require(in.target.device() == logits.device(), "target is on another device than the logits");
  require_calibration(in.scale, in.bias, in.confidence);
  if (holds_probabilities(in.target)) {
    set_probabilities(in, args);
  } else {
    require(in.target.numel() == positions && in.target.is_contiguous(),
            "target is not contiguous with an entry a position");
    args.target = in.target.const_data_ptr();
    args.target_type = index_type(in.target);
  }
  args.ignore_index = in.ignore_index;
  args.weight = vector_data(in.weight, "weight", classes, dtype, logits);
  args.scale = vector_data(in.scale, "scale", classes, dtype, logits);
  args.bias = vector_data(in.bias, "bias", classes, dtype, logits);
  args.prior = vector_data(in.prior, "prior", classes, dtype, logits);
  args.margin = vector_data(in.margin, "margin", classes, dtype, logits);
  args.confidence = vector_data(in.confidence, "confidence", confidences, dtype, logits);
  args.sample_weight = vector_data(in.sample_weight, "sample_weight", positions, dtype, logits);
  args.label_smoothing = in.label_smoothing;
  args.keep = 1 - in.label_smoothing;
  args.share = classes == 0 ? 0 : in.label_smoothing / static_cast<double>(classes);
  args.focal_gamma = in.focal_gamma;
}

// Gradients, details and so on that are wanted: the bits of a WantedCode.
struct Wanted {
  bool logits, scale, bias, confidence, details, prediction, entropy, statistics;

  explicit Wanted(int64_t bits)
      : logits(bits & kWantLogits),
        scale(bits & kWantScale),
        bias(bits & kWantBias),
        confidence(bits & kWantConfidence),
        details(bits & kWantDetails),
        prediction(bits & kWantPrediction),
        entropy(bits & kWantEntropy),
        statistics(bits & kWantStatistics) {}

  bool classes() const { return scale || bias; }
  bool calibration() const { return classes() || confidence; }
  bool any() const { return logits || calibration(); }
};

inline Tensor new_vector(const Tensor& logits, int64_t entries) {
  return new_tensor({entries}, accumulate_dtype(logits.scalar_type()), place_of(logits));
}

// Adds the gradients that are wanted to the results and tells args where to write them. grad_logits:
// the memory for that of the logits, which is then no result.
template <class Layout, class Args>
void add_gradients(const Tensor& logits, int64_t confidences, Wanted wanted,
                   const Tensor* grad_logits, Args& args, Results& results) {
  require(args.scale != nullptr || !wanted.calibration(),
          "gradients are wanted of a calibration that is not given");
  const auto add = [&](Tensor tensor) {
    results.push_back(tensor);
    return tensor.mutable_data_ptr();
  };
  if (wanted.logits)
    args.grad_logits =
        grad_logits ? grad_logits->mutable_data_ptr() : add(Layout::new_gradient(logits, args));
  if (wanted.scale) args.grad_scale = add(new_vector(logits, args.classes));
  if (wanted.bias) args.grad_bias = add(new_vector(logits, args.classes));
  if (wanted.confidence) args.grad_confidence = add(new_vector(logits, confidences));
  args.class_gradients = wanted.classes();
}

}  // namespace disalign
