// The arguments that the forward and backward of every loss operator share, checked, and how the
// summed loss is reduced.
#pragma once

#include <algorithm>
#include <string>

#include "../common/arguments.h"
#include "loss_args.h"

namespace disalign {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum Normalizer : int64_t { kWeights = 0, kValid = 1, kCount = 2, kGiven = 3 };

inline double read(const void* p, ScalarType dtype, int64_t i) {
  return dtype == ScalarType::Double ? static_cast<const double*>(p)[i]
                                     : static_cast<const float*>(p)[i];
}

inline void write(const Tensor& out, double value) {
  if (out.scalar_type() == ScalarType::Double)
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
}

inline void fill_ones(const Tensor& out, int64_t count) {
  if (out.scalar_type() == ScalarType::Double)
    std::fill_n(static_cast<double*>(out.mutable_data_ptr()), count, 1.0);
  else
    std::fill_n(static_cast<float*>(out.mutable_data_ptr()), count, 1.0f);
}

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

// The operators' tensors and options, as _ops.py hands them over.
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

// `ones` stands in for absent weights where smoothing sums over them, and must outlive the kernels.
struct Call {
  LossArgs args;
  ScalarType dtype;
  int64_t positions;    // of the loss: entries of target, sample_weight, the statistics
  int64_t confidences;  // entries of the confidence
  Tensor ones;

  // What of args describes the layout of the logits is the caller's to fill in.
  Call(const Inputs& in, int64_t positions, int64_t confidences)
      : dtype(accumulate_dtype(in.logits.scalar_type())),
        positions(positions),
        confidences(confidences),
        ones(in.logits) {
    const Tensor& logits = in.logits;
    const int64_t classes = logits.size(1);
    require(in.target.numel() == positions && in.target.is_contiguous() && in.target.is_cpu(),
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
    args.weight_sum = static_cast<double>(classes);
    if (in.label_smoothing > 0) {
      if (args.weight == nullptr) {
        ones = new_tensor({classes}, dtype);
        fill_ones(ones, classes);
        args.weight = ones.const_data_ptr();
      } else {
        args.weight_sum = 0;
        for (int64_t j = 0; j < classes; ++j) args.weight_sum += read(args.weight, dtype, j);
      }
    }
    check_target();
  }

  void check_target() const {
    for (int64_t i = 0; i < positions; ++i) {
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index || (t >= 0 && t < args.classes)) continue;
      // _ops.py turns this prefix into Python's IndexError, which the stable ABI cannot throw, and
      // the position into indices.
      throw std::runtime_error("IndexError: Target " + std::to_string(t) +
                               " is out of bounds: target[" + std::to_string(i) +
                               "], the logits have " + std::to_string(args.classes) +
                               " classes and ignore_index is " + std::to_string(args.ignore_index));
    }
  }

  double denominator(int64_t normalizer, const OptionalTensor& given) const {
    if (normalizer == kGiven) {
      require(given.has_value() && given->numel() == 1 && given->is_cpu() &&
                  given->scalar_type() == ScalarType::Double,
              "denominator is not one float64 on the CPU");
      return *static_cast<const double*>(given->const_data_ptr());
    }
    if (normalizer == kCount) return static_cast<double>(positions);
    double sum = 0;
    for (int64_t i = 0; i < positions; ++i) {
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index) continue;
      if (normalizer == kValid) {
        sum += 1;
        continue;
      }
      const double w = args.weight ? read(args.weight, dtype, t) : 1.0;
      sum += args.sample_weight ? w * read(args.sample_weight, dtype, i) : w;
    }
    return sum;
  }

  void divide_by(double denominator) {
    args.inverse_denominator = denominator == 0 ? 0.0 : 1.0 / denominator;
  }

  void require_calibration(Wanted wanted) const {
    require(args.scale != nullptr || !(wanted.classes() || wanted.confidence),
            "gradients are wanted of a calibration that is not given");
  }

  // What backward gets from forward and from the loss's consumer.
  void take_backward(const Tensor& grad_loss, const Tensor& row_max, const Tensor& row_sum,
                     const Tensor& denominator, const Tensor& logits) {
    const bool one_upstream = grad_loss.dim() == 0;
    args.upstream =
        vector_data(grad_loss, "grad_loss", one_upstream ? 1 : positions, dtype, logits);
    args.upstream_stride = one_upstream ? 0 : 1;
    vector_data(row_max, "row_max", positions, dtype, logits);
    vector_data(row_sum, "row_sum", positions, dtype, logits);
    args.row_max = row_max.mutable_data_ptr();
    args.row_sum = row_sum.mutable_data_ptr();
    divide_by(*static_cast<const double*>(
        vector_data(denominator, "denominator", 1, ScalarType::Double, logits)));
  }
};

// Nothing left to divide by: 'weights' is 0 / 0 = NaN as in PyTorch, a count is 0.
inline double reduce_loss(double sum, int64_t reduction, int64_t normalizer, double denominator) {
  if (reduction == kSum) return sum;
  if (denominator == 0 && normalizer != kWeights) return 0;
  return sum / denominator;
}

}  // namespace disalign
