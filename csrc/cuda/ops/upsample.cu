// The upsampling operators on CUDA: logits (N, C, h, w) of any strides, target (N, H, W). Schemas:
// _ops/schemas.py.
#include "cuda/launch/launches.h"

#include <algorithm>
#include <utility>

#include "cuda/ops/loss_op.h"

namespace disalign::cuda {
namespace {

void set_geometry(const Tensor& logits, int64_t height, int64_t width, bool align_corners,
                  UpsampleArgs& args) {
  require(logits.dim() == 4, "logits have ", logits.dim(),
          " dimensions, 4 (images, classes, height, width) are needed");
  require(is_logits_dtype(logits.scalar_type()),
          "logits are not float64, float32, bfloat16 or float16");
  require_classes(logits);
  const int64_t most = std::max({height, width, logits.size(2), logits.size(3)});
  require(height >= 0 && width >= 0 && most < int64_t{1} << 31, "a size that is no image's");
  args.logits = logits.const_data_ptr();
  args.images = logits.size(0);
  args.classes = logits.size(1);
  args.inner = height * width;
  args.y.in = static_cast<int32_t>(logits.size(2));
  args.x.in = static_cast<int32_t>(logits.size(3));
  args.y.out = static_cast<int32_t>(height);
  args.x.out = static_cast<int32_t>(width);
  require((args.y.in > 0 && args.x.in > 0) || height * width == 0 || logits.size(0) == 0,
          "logits have no positions to interpolate between");
  args.image_stride = logits.stride(0);
  args.class_stride = logits.stride(1);
  args.y_stride = logits.stride(2);
  args.x_stride = logits.stride(3);
  args.align_corners = align_corners;
}

UpsampleArgs checked(const Inputs& in, bool align_corners) {
  require(in.target.dim() == 3 && in.target.size(0) == in.logits.size(0),
          "target is not (images, height, width)");
  UpsampleArgs args;
  set_geometry(in.logits, in.target.size(1), in.target.size(2), align_corners, args);
  set_inputs(in, in.target.numel(), args.low_positions(), args);
  return args;
}

using UpsampleResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor>;

UpsampleResult upsample_forward(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& confidence,
    const OptionalTensor& prior, const OptionalTensor& margin, const OptionalTensor& sample_weight,
    const OptionalTensor& denominator, int64_t ignore_index, double label_smoothing,
    double focal_gamma, bool align_corners, bool want_details, int64_t reduction,
    int64_t normalizer, bool want_logits, bool want_scale, bool want_bias, bool want_confidence) {
  UpsampleArgs args = checked({logits, target, weight, scale, bias, confidence, prior, margin,
                               sample_weight, ignore_index, label_smoothing, focal_gamma},
                              align_corners);
  require(!want_logits && !want_scale && !want_bias && !want_confidence,
          "gradients are backward's on this device");
  const bool each = reduction == kReduceNone;
  TorchLauncher launcher(logits);
  const Place place = place_of(logits);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  const int64_t positions = target.numel(), details = want_details ? positions : 0;
  const Tensor row_max = new_tensor({positions}, dtype, place);
  const Tensor row_sum = new_tensor({positions}, dtype, place);
  const Tensor loss = each ? new_tensor({positions}, dtype, place) : new_tensor({}, dtype, place);
  const Tensor divisor = new_tensor({}, ScalarType::Double, place);
  const Tensor position_loss = new_tensor({each ? 0 : details}, dtype, place);
  const Tensor probability = new_tensor({details}, dtype, place);
  const Tensor prediction = new_tensor(&details, 1, aoti_torch_dtype_int64(), place);
  const Gradients none(logits, 0, {false, false, false, false}, false);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
  args.reduction = reduction;
  args.normalizer = normalizer;
  args.given_denominator = given_denominator(denominator, normalizer, logits);
  args.denominator = static_cast<double*>(divisor.mutable_data_ptr());
  if (each || want_details) args.loss = (each ? loss : position_loss).mutable_data_ptr();
  if (!each) args.reduced_loss = loss.mutable_data_ptr();
  if (want_details) {
    args.probability = probability.mutable_data_ptr();
    args.prediction = static_cast<int64_t*>(prediction.mutable_data_ptr());
  }
  launch_upsample_forward(launcher, dtype_of(logits), args);
  return {loss,      row_max,         row_sum,       divisor,     none.logits, none.scale,
          none.bias, none.confidence, position_loss, probability, prediction};
}

template <bool InPlace>
BackwardResult upsample_backward(const Tensor& grad_loss, const Tensor& logits,
                                 const Tensor& target, const OptionalTensor& weight,
                                 const OptionalTensor& scale, const OptionalTensor& bias,
                                 const OptionalTensor& confidence, const OptionalTensor& prior,
                                 const OptionalTensor& margin, const OptionalTensor& sample_weight,
                                 const Tensor& row_max, const Tensor& row_sum,
                                 const Tensor& denominator, int64_t ignore_index,
                                 double label_smoothing, double focal_gamma, bool align_corners,
                                 bool, bool want_logits, bool want_scale, bool want_bias,
                                 bool want_confidence) {
  UpsampleArgs args = checked({logits, target, weight, scale, bias, confidence, prior, margin,
                               sample_weight, ignore_index, label_smoothing, focal_gamma},
                              align_corners);
  set_backward(grad_loss, row_max, row_sum, target.numel(), logits, args);
  vector_data(denominator, "denominator", 1, ScalarType::Double, logits);
  args.denominator = static_cast<double*>(denominator.mutable_data_ptr());
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(args, wanted);
  TorchLauncher launcher(logits);
  const Gradients gradients(logits, args.low_positions(), wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  if (InPlace && wanted.logits) {
    require(!overlaps(logits),
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
  }
  launch_upsample_backward(launcher, dtype_of(logits), args);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

// The most probable class at every position of (height, width).
Tensor upsample_predict(const Tensor& logits, const OptionalTensor& scale,
                        const OptionalTensor& bias, const OptionalTensor& confidence,
                        const OptionalTensor& prior, int64_t height, int64_t width,
                        bool align_corners) {
  UpsampleArgs args;
  set_geometry(logits, height, width, align_corners, args);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  require(scale.has_value() == confidence.has_value() && bias.has_value() == confidence.has_value(),
          "scale, bias and confidence are given together or not at all");
  args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
  args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
  args.prior = vector_data(prior, "prior", args.classes, dtype, logits);
  args.confidence = vector_data(confidence, "confidence", args.low_positions(), dtype, logits);
  const int64_t size[3] = {args.images, height, width};
  const Tensor prediction = new_tensor(size, 3, aoti_torch_dtype_int64(), place_of(logits));
  args.prediction = static_cast<int64_t*>(prediction.mutable_data_ptr());
  TorchLauncher launcher(logits);
  launch_upsample_forward(launcher, dtype_of(logits), args);
  return prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  m.impl("upsample_forward", TORCH_BOX(&upsample_forward));
  m.impl("upsample_backward", TORCH_BOX(&upsample_backward<false>));
  m.impl("upsample_backward_", TORCH_BOX(&upsample_backward<true>));
  m.impl("upsample_predict", TORCH_BOX(&upsample_predict));
}

}  // namespace disalign::cuda
