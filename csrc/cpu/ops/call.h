// A call of a loss operator on the CPU: its checked arguments, and how the summed loss is reduced.
#pragma once

#include <algorithm>
#include <string>

#include "common/mean.h"
#include "cpu/kernels/chunk.h"
#include "ops/loss_inputs.h"

namespace disalign {

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

// `ones` stands in for absent weights where smoothing sums over them, and must outlive the kernels.
struct Call {
  LossArgs args;
  ScalarType dtype;
  int64_t positions;    // of the loss: entries of target, sample_weight, the statistics
  int64_t confidences;  // entries of the confidence
  Tensor ones;

  // What of args describes the layout of the logits is the caller's to fill in. lowest_target: a
  // target below it is no class, and kElsewhere no error if that is it.
  Call(const Inputs& in, int64_t positions, int64_t confidences, int64_t lowest_target = 0)
      : dtype(accumulate_dtype(in.logits.scalar_type())),
        positions(positions),
        confidences(confidences),
        ones(in.logits) {
    set_inputs(in, positions, confidences, args);
    const int64_t classes = args.classes;
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
    check_target(lowest_target);
  }

  void check_target(int64_t lowest) const {
    for (int64_t i = 0; i < positions; ++i) {
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index || (t >= lowest && t < args.classes)) continue;
      // _ops/schemas.py turns this prefix into Python's IndexError, which the stable ABI cannot
      // throw, and the position into indices.
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

  void take_backward(const Tensor& grad_loss, const Tensor& row_max, const Tensor& row_sum,
                     const Tensor& denominator, const Tensor& logits) {
    set_backward(grad_loss, row_max, row_sum, positions, logits, args);
    divide_by(*static_cast<const double*>(
        vector_data(denominator, "denominator", 1, ScalarType::Double, logits)));
  }
};

inline double reduce_loss(double sum, int64_t reduction, int64_t normalizer, double denominator) {
  return reduction == kSum ? sum : mean_of(sum, denominator, normalizer == kWeights);
}

}  // namespace disalign
