// Forward and backward of a loss operator on CUDA, over logits that are read where they lie. A
// Layout says how: its check of the logits, its strides, what it launches (row.cu, dense.cu).
#pragma once

#include <optional>
#include <tuple>

#include "cuda/ops/torch_launcher.h"
#include "ops/loss_inputs.h"

// The key and the library that operators are registered for; tests/simt registers the same
// functions for the CPU, under another name.
#if !defined(DISALIGN_CUDA_KEY)
#define DISALIGN_CUDA_LIBRARY disalign_ops
#define DISALIGN_CUDA_KEY CUDA
#endif

namespace disalign::cuda {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The gradients that are wanted; those that are not stay empty.
struct Gradients {
  Tensor logits, scale, bias, confidence;

  Gradients(const Tensor& z, int64_t confidences, Wanted wanted, bool new_logits)
      : logits(new_logits ? new_like(z) : new_tensor({0}, z.scalar_type(), place_of(z))),
        scale(vector(z, wanted.scale ? z.size(1) : 0)),
        bias(vector(z, wanted.bias ? z.size(1) : 0)),
        confidence(vector(z, wanted.confidence ? confidences : 0)) {}

  void attach(Wanted wanted, DeviceLoss& args) const {
    args.class_gradients = wanted.classes();
    args.grad_logits = logits.numel() > 0 ? logits.mutable_data_ptr() : nullptr;
    args.grad_scale = wanted.scale ? scale.mutable_data_ptr() : nullptr;
    args.grad_bias = wanted.bias ? bias.mutable_data_ptr() : nullptr;
    args.grad_confidence = wanted.confidence ? confidence.mutable_data_ptr() : nullptr;
  }

 private:
  static Tensor vector(const Tensor& z, int64_t entries) {
    return new_tensor({entries}, accumulate_dtype(z.scalar_type()), place_of(z));
  }
};

inline const double* given_denominator(const OptionalTensor& given, int64_t normalizer,
                                       const Tensor& logits) {
  require(normalizer != kByGiven || given.has_value(), "denominator is not given");
  return static_cast<const double*>(
      vector_data(given, "denominator", 1, ScalarType::Double, logits));
}

inline void require_classes(const Tensor& logits) {
  require(logits.size(1) <= int64_t{1} << 27, "more than 2^27 classes");  // of tiles in a grid
}

template <class Layout>
ForwardResult loss_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                           const OptionalTensor& scale, const OptionalTensor& bias,
                           const OptionalTensor& confidence, const OptionalTensor& prior,
                           const OptionalTensor& margin, const OptionalTensor& sample_weight,
                           const OptionalTensor& denominator, int64_t ignore_index,
                           double label_smoothing, double focal_gamma, int64_t reduction,
                           int64_t normalizer, bool want_logits, bool want_scale, bool want_bias,
                           bool want_confidence) {
  Layout::check(logits);
  require_classes(logits);
  const int64_t positions = Layout::positions(logits);
  typename Layout::Args args;
  set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
              ignore_index, label_smoothing, focal_gamma},
             positions, positions, args);
  Layout::strides(logits, args);
  const Wanted wanted{false, want_scale, want_bias, want_confidence};
  const bool each = reduction == kReduceNone;
  require(!want_logits, "the gradient of the logits is backward's on this device");
  require(!each || !wanted.any(),
          "reduction 'none' has no gradients before its upstream gradient is known");
  require_calibration(args, wanted);

  TorchLauncher launcher(logits);
  const Place place = place_of(logits);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const Gradients gradients(logits, positions, wanted, false);
  gradients.attach(wanted, args);
  const Tensor row_max = new_tensor({positions}, dtype, place);
  const Tensor row_sum = new_tensor({positions}, dtype, place);
  const Tensor loss = each ? new_tensor({positions}, dtype, place) : new_tensor({}, dtype, place);
  const Tensor divisor = new_tensor({}, ScalarType::Double, place);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
  args.reduction = reduction;
  args.normalizer = normalizer;
  args.given_denominator = given_denominator(denominator, normalizer, logits);
  args.denominator = static_cast<double*>(divisor.mutable_data_ptr());
  (each ? args.loss : args.reduced_loss) = loss.mutable_data_ptr();
  Layout::forward(launcher, dtype_of(logits), args);
  return {loss,
          row_max,
          row_sum,
          divisor,
          gradients.logits,
          gradients.scale,
          gradients.bias,
          gradients.confidence};
}

template <class Layout, bool InPlace>
BackwardResult loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, const OptionalTensor& scale,
                             const OptionalTensor& bias, const OptionalTensor& confidence,
                             const OptionalTensor& prior, const OptionalTensor& margin,
                             const OptionalTensor& sample_weight, const Tensor& row_max,
                             const Tensor& row_sum, const Tensor& denominator, int64_t ignore_index,
                             double label_smoothing, double focal_gamma, bool want_logits,
                             bool want_scale, bool want_bias, bool want_confidence) {
  Layout::check(logits);
  require_classes(logits);
  const int64_t positions = Layout::positions(logits);
  typename Layout::Args args;
  set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
              ignore_index, label_smoothing, focal_gamma},
             positions, positions, args);
  Layout::strides(logits, args);
  set_backward(grad_loss, row_max, row_sum, positions, logits, args);
  vector_data(denominator, "denominator", 1, ScalarType::Double, logits);
  args.denominator = static_cast<double*>(denominator.mutable_data_ptr());
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(args, wanted);

  TorchLauncher launcher(logits);
  const Gradients gradients(logits, positions, wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  if (InPlace && wanted.logits) {
    require(!Layout::overlaps(args),
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
    args.grad_class_stride = args.class_stride;
  }
  Layout::backward(launcher, dtype_of(logits), args);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace disalign::cuda
