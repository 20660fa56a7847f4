// The operators of the calibrated logits, for every device.
#pragma once

#include <string>

#include "ops/inputs.h"
#include "ops/layouts.h"

namespace disalign {

// Operator: a Layout, the kernels' Args, and a Device whose `calibrate` runs the kernels, forward
// where args has an output.
template <class Operator>
struct CalibrateOperator {
  using Layout = typename Operator::Layout;
  using Args = typename Operator::Args;
  using Device = typename Operator::Device;

  static Tensor forward(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                        const Tensor& confidence) {
    Args args = args_of(logits, scale, bias, confidence);
    Device device(logits);
    const Tensor out = new_like(logits);
    args.output = out.mutable_data_ptr();
    device.template calibrate<Operator>(logits, args);
    return out;
  }

  static Results backward(const Tensor& grad_output, const Tensor& logits, const Tensor& scale,
                          const Tensor& bias, const Tensor& confidence, int64_t wanted_bits) {
    Args args = args_of(logits, scale, bias, confidence);
    Args like;
    Layout::set(grad_output, like);
    require(like.outer == args.outer && like.classes == args.classes && like.inner == args.inner &&
                grad_output.is_contiguous() && grad_output.scalar_type() == logits.scalar_type() &&
                grad_output.device() == logits.device(),
            "grad_output is not contiguous or not of the logits' shape, dtype and device");
    args.grad_output = grad_output.const_data_ptr();
    Device device(logits);
    Results results;
    results.reserve(4);
    add_gradients<Layout>(logits, Layout::confidences(args), Wanted(wanted_bits), nullptr, args,
                          results);
    device.template calibrate<Operator>(logits, args);
    return results;
  }

 private:
  static Args args_of(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                      const Tensor& confidence) {
    const ScalarType dtype = accumulate_dtype(logits.scalar_type());
    Args args;
    Layout::set(logits, args);
    args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
    args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
    args.confidence =
        vector_data(confidence, "confidence", Layout::confidences(args), dtype, logits);
    return args;
  }
};

template <class Operator>
void register_calibrate(torch::stable::detail::StableLibrary& library, const std::string& layout) {
  using Calibrate = CalibrateOperator<Operator>;
  library.impl((layout + "_calibrate").c_str(), TORCH_BOX(&Calibrate::forward));
  library.impl((layout + "_calibrate_backward").c_str(), TORCH_BOX(&Calibrate::backward));
}

}  // namespace disalign
