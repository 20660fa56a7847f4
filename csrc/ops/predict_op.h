// The operator that predicts: the most probable class of upsampled logits, for every device.
#pragma once

#include <string>

#include "ops/inputs.h"
#include "ops/layouts.h"

namespace disalign {

// (N, height, width) of logits (N, C, h, w). Operator: as for LossOperator, with a Device that has
// `predict`.
template <class Operator>
Tensor predict(const Tensor& logits, const OptionalTensor& scale, const OptionalTensor& bias,
               const OptionalTensor& confidence, const OptionalTensor& prior, int64_t height,
               int64_t width, bool align_corners) {
  using Layout = typename Operator::Layout;
  typename Operator::Args args;
  Layout::set_size(logits, height, width, args, align_corners);
  require_calibration(scale, bias, confidence);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
  args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
  args.prior = vector_data(prior, "prior", args.classes, dtype, logits);
  args.confidence = vector_data(confidence, "confidence", Layout::confidences(args), dtype, logits);
  typename Operator::Device device(logits);
  const int64_t size[3] = {args.outer, height, width};
  const Tensor prediction = new_tensor(size, 3, aoti_torch_dtype_int64(), place_of(logits));
  args.prediction = static_cast<int64_t*>(prediction.mutable_data_ptr());
  device.template predict<Operator>(logits, args);
  return prediction;
}

template <class Operator>
void register_predict(torch::stable::detail::StableLibrary& library, const std::string& layout) {
  library.impl((layout + "_predict").c_str(), TORCH_BOX(&predict<Operator>));
}

}  // namespace disalign
