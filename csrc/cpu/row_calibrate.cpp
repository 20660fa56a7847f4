// Launcher of the calibrated logits on the CPU. Schemas: disalign_ops/_ops.py.
#include "row_calibrate_kernel.h"

#include <tuple>

#include "../common/arguments.h"
#include "capability.h"
#include "gradients.h"
#include "partition.h"

namespace disalign {
namespace {

CalibrateArgs checked(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                      const Tensor& confidence) {
  check_rows(logits, "logits");
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  CalibrateArgs args;
  args.logits = logits.const_data_ptr();
  args.row_stride = logits.stride(0);
  args.classes = logits.size(1);
  args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
  args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
  args.confidence = vector_data(confidence, "confidence", logits.size(0), dtype, logits);
  return args;
}

Tensor row_calibrate(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                     const Tensor& confidence) {
  CalibrateArgs args = checked(logits, scale, bias, confidence);
  const Tensor out = new_tensor({logits.size(0), args.classes}, logits.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  args.output = out.mutable_data_ptr();
  const auto& kernel = kernels_for(DISALIGN_CHOOSE(calibrate_kernels), logits.scalar_type());
  Partition partition(logits.size(0), logits.numel(), args.classes, 0, false);
  partition.run([&](Chunk& chunk) { kernel.forward(args, chunk); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_calibrate_backward(
    const Tensor& grad_output, const Tensor& logits, const Tensor& scale, const Tensor& bias,
    const Tensor& confidence, bool want_logits, bool want_scale, bool want_bias,
    bool want_confidence) {
  CalibrateArgs args = checked(logits, scale, bias, confidence);
  check_rows(grad_output, "grad_output");
  require(grad_output.size(0) == logits.size(0) && grad_output.size(1) == args.classes &&
              grad_output.is_contiguous() && grad_output.scalar_type() == logits.scalar_type(),
          "grad_output is not contiguous or not of the logits' shape and dtype");
  args.grad_output = grad_output.const_data_ptr();
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  const Gradients gradients(logits, logits.size(0), wanted, wanted.logits);
  gradients.attach(wanted, args);
  const auto& kernel = kernels_for(DISALIGN_CHOOSE(calibrate_kernels), logits.scalar_type());
  Partition partition(logits.size(0), logits.numel(), args.classes, 0, args.class_gradients);
  partition.run([&](Chunk& chunk) { kernel.backward(args, chunk); });
  gradients.reduce_classes(partition);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("row_calibrate", TORCH_BOX(&row_calibrate));
  m.impl("row_calibrate_backward", TORCH_BOX(&row_calibrate_backward));
}

}  // namespace disalign
