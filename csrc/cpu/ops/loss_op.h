// Forward and backward of a loss operator over logits that are read where they lie. A Layout says
// how: its check of the logits, its strides, its units of work and its kernels (row.cpp,
// dense.cpp).
#pragma once

#include <tuple>

#include "cpu/ops/call.h"
#include "cpu/ops/capability.h"
#include "cpu/ops/gradients.h"
#include "cpu/ops/partition.h"

namespace disalign {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Layout>
Call checked_call(const Inputs& in) {
  Layout::check(in.logits);
  const int64_t positions = Layout::positions(in.logits);
  Call call(in, positions, positions);
  Layout::strides(in.logits, call.args);
  return call;
}

template <class Layout>
ForwardResult loss_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                           const OptionalTensor& scale, const OptionalTensor& bias,
                           const OptionalTensor& confidence, const OptionalTensor& prior,
                           const OptionalTensor& margin, const OptionalTensor& sample_weight,
                           const OptionalTensor& given_denominator, int64_t ignore_index,
                           double label_smoothing, double focal_gamma, int64_t reduction,
                           int64_t normalizer, bool want_logits, bool want_scale, bool want_bias,
                           bool want_confidence) {
  Call call = checked_call<Layout>({logits, target, weight, scale, bias, confidence, prior, margin,
                                    sample_weight, ignore_index, label_smoothing, focal_gamma});
  LossArgs& args = call.args;
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  const bool each = reduction == kNone;
  require(!each || !wanted.any(),
          "reduction 'none' has no gradients before its upstream gradient is known");
  const double denominator =
      reduction == kMean ? call.denominator(normalizer, given_denominator) : 1.0;
  call.divide_by(denominator);

  require_calibration(call.args, wanted);
  const Gradients gradients(logits, call.confidences, wanted, wanted.logits);
  gradients.attach(wanted, args);
  const Tensor row_max = new_tensor({call.positions}, call.dtype);
  const Tensor row_sum = new_tensor({call.positions}, call.dtype);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
  const Tensor loss = each ? new_tensor({call.positions}, call.dtype) : new_tensor({}, call.dtype);
  const Tensor divisor = new_tensor({}, ScalarType::Double);
  write(divisor, denominator);
  if (each) args.loss = loss.mutable_data_ptr();
  Partition partition(Layout::units(args, call.dtype), logits.numel(), args.classes,
                      Layout::scratch_bytes(args, call.dtype), args.class_gradients);
  const LossKernels& kernel = kernels_for(Layout::kernels(), logits.scalar_type());
  partition.run([&](Chunk& chunk) { kernel.forward(args, chunk); });
  gradients.reduce_classes(partition);
  if (!each) write(loss, reduce_loss(partition.loss_sum(), reduction, normalizer, denominator));
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
  Call call = checked_call<Layout>({logits, target, weight, scale, bias, confidence, prior, margin,
                                    sample_weight, ignore_index, label_smoothing, focal_gamma});
  LossArgs& args = call.args;
  call.take_backward(grad_loss, row_max, row_sum, denominator, logits);
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(call.args, wanted);
  const Gradients gradients(logits, call.confidences, wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  if (InPlace && wanted.logits) {
    require(!Layout::overlaps(args),
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
    args.grad_class_stride = args.class_stride;
  }
  Partition partition(Layout::units(args, call.dtype), logits.numel(), args.classes,
                      Layout::scratch_bytes(args, call.dtype), args.class_gradients);
  const LossKernels& kernel = kernels_for(Layout::kernels(), logits.scalar_type());
  partition.run([&](Chunk& chunk) { kernel.backward(args, chunk); });
  gradients.reduce_classes(partition);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace disalign
