// The upsampling operators on the CPU: logits (N, C, h, w) of any strides, target (N, H, W).
// Schemas: _ops/schemas.py.
#include "cpu/kernels/upsample_kernel.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/ops/call.h"
#include "cpu/ops/capability.h"
#include "cpu/ops/gradients.h"
#include "cpu/ops/partition.h"

namespace disalign {
namespace {

// The positions of F.interpolate(mode="bilinear") along an axis, in double.
void fill_axis(Axis& axis, bool align_corners, int64_t* source, double* weight) {
  const double scale = align_corners ? (axis.out > 1 ? (axis.in - 1.0) / (axis.out - 1.0) : 0.0)
                                     : static_cast<double>(axis.in) / axis.out;
  for (int64_t i = 0; i < axis.out; ++i) {
    const double at = align_corners ? scale * i : std::max(0.0, (i + 0.5) * scale - 0.5);
    source[i] = std::min(static_cast<int64_t>(at), axis.in - 1);
    weight[i] = source[i] < axis.in - 1 ? std::min(at - source[i], 1.0) : 0.0;
  }
  axis.source = source;
  axis.weight = weight;
}

int64_t* as_indices(double* memory) { return reinterpret_cast<int64_t*>(memory); }

// Fills in the geometry of args. Returns the tensor that holds the axes, which must outlive args.
Tensor set_geometry(const Tensor& logits, int64_t height, int64_t width, bool align_corners,
                    UpsampleArgs& args) {
  require(logits.dim() == 4, "logits are not (images, classes, height, width)");
  require(is_logits_dtype(logits.scalar_type()),
          "logits are not float64, float32, bfloat16 or float16");
  args.y.in = logits.size(2), args.x.in = logits.size(3);
  args.y.out = height, args.x.out = width;
  require((args.y.in > 0 && args.x.in > 0) || height * width == 0 || logits.size(0) == 0,
          "logits have no positions to interpolate between");
  args.image_stride = logits.stride(0);
  args.class_stride = logits.stride(1);
  args.y_stride = logits.stride(2);
  args.x_stride = logits.stride(3);
  const Tensor axes = new_tensor({2 * (height + width) + args.y.in + 1}, ScalarType::Double);
  auto* memory = static_cast<double*>(axes.mutable_data_ptr());
  fill_axis(args.y, align_corners, as_indices(memory), memory + height);
  memory += 2 * height;
  fill_axis(args.x, align_corners, as_indices(memory), memory + width);
  int64_t* first_row = as_indices(memory + 2 * width);
  int64_t y = 0;
  for (int64_t row = 0; row <= args.y.in; ++row) {
    while (y < height && args.y.source[y] < row) ++y;
    first_row[row] = y;
  }
  args.first_row = first_row;
  return axes;
}

void contiguous_gradient(UpsampleArgs& args) {
  args.grad_x_stride = 1;
  args.grad_y_stride = args.x.in;
  args.grad_class_stride = args.y.in * args.x.in;
  args.grad_image_stride = args.classes * args.grad_class_stride;
}

// The rows that chunks share, and the chunks' sums.
void finish(const UpsampleArgs& args, Partition& partition, const UpsampleKernels& kernels,
            const Gradients& gradients) {
  if (!args.gradients) return;
  partition.for_neighbours(
      [&](const Chunk& before, Chunk& after) { kernels.join(args, before, after); });
  gradients.reduce_classes(partition);
}

void check_sizes(const Tensor& logits, const Tensor& target) {
  require(logits.dim() == 4, "logits have ", logits.dim(),
          " dimensions, 4 (images, classes, height, width) are needed");
  require(target.dim() == 3 && target.size(0) == logits.size(0),
          "target is not (images, height, width)");
}

int64_t columns_of(const Tensor& logits) {
  return logits.size(0) * logits.size(2) * logits.size(3);
}

Partition partition_of(const UpsampleArgs& args, ScalarType dtype) {
  return Partition(args.images * args.y.in, args.images * args.y.out * args.x.out * args.classes,
                   args.classes, upsample_scratch_bytes(args, size_of(dtype)),
                   args.class_gradients);
}

const UpsampleKernels& kernels_of(const Tensor& logits) {
  return kernels_for(DISALIGN_CHOOSE(upsample_kernels), logits.scalar_type());
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ForwardResult upsample_forward(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& confidence,
    const OptionalTensor& prior, const OptionalTensor& margin, const OptionalTensor& sample_weight,
    const OptionalTensor& given_denominator, int64_t ignore_index, double label_smoothing,
    double focal_gamma, bool align_corners, bool want_details, int64_t reduction,
    int64_t normalizer, bool want_logits, bool want_scale, bool want_bias, bool want_confidence) {
  check_sizes(logits, target);
  Call call({logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
             ignore_index, label_smoothing, focal_gamma},
            target.numel(), columns_of(logits));
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  const bool each = reduction == kNone;
  require(!each || !wanted.any(),
          "reduction 'none' has no gradients before its upstream gradient is known");
  require_calibration(call.args, wanted);
  const double denominator =
      reduction == kMean ? call.denominator(normalizer, given_denominator) : 1.0;
  call.divide_by(denominator);
  UpsampleArgs args;
  static_cast<LossArgs&>(args) = call.args;
  const Tensor axes = set_geometry(logits, target.size(1), target.size(2), align_corners, args);

  const Gradients gradients(logits, call.confidences, wanted, wanted.logits);
  gradients.attach(wanted, args);
  args.gradients = wanted.any();
  contiguous_gradient(args);
  const Tensor row_max = new_tensor({call.positions}, call.dtype);
  const Tensor row_sum = new_tensor({call.positions}, call.dtype);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
  const Tensor loss = each ? new_tensor({call.positions}, call.dtype) : new_tensor({}, call.dtype);
  const Tensor divisor = new_tensor({}, ScalarType::Double);
  write(divisor, denominator);
  const int64_t details = want_details ? call.positions : 0;
  const Tensor position_loss = new_tensor({each ? 0 : details}, call.dtype);
  const Tensor probability = new_tensor({details}, call.dtype);
  const Tensor prediction = new_tensor(&details, 1, aoti_torch_dtype_int64());
  if (each || want_details) args.loss = (each ? loss : position_loss).mutable_data_ptr();
  if (want_details) {
    args.probability = probability.mutable_data_ptr();
    args.prediction = static_cast<int64_t*>(prediction.mutable_data_ptr());
  }
  Partition partition = partition_of(args, call.dtype);
  const UpsampleKernels& kernels = kernels_of(logits);
  partition.run([&](Chunk& chunk) { kernels.forward(args, chunk); });
  finish(args, partition, kernels, gradients);
  if (!each) write(loss, reduce_loss(partition.loss_sum(), reduction, normalizer, denominator));
  return {loss,
          row_max,
          row_sum,
          divisor,
          gradients.logits,
          gradients.scale,
          gradients.bias,
          gradients.confidence,
          position_loss,
          probability,
          prediction};
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
  check_sizes(logits, target);
  Call call({logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
             ignore_index, label_smoothing, focal_gamma},
            target.numel(), columns_of(logits));
  call.take_backward(grad_loss, row_max, row_sum, denominator, logits);
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(call.args, wanted);
  UpsampleArgs args;
  static_cast<LossArgs&>(args) = call.args;
  const Tensor axes = set_geometry(logits, target.size(1), target.size(2), align_corners, args);
  const Gradients gradients(logits, call.confidences, wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  args.gradients = wanted.any();
  contiguous_gradient(args);
  if (InPlace && wanted.logits) {
    require(!overlaps(logits),
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
    args.grad_class_stride = args.class_stride;
    args.grad_y_stride = args.y_stride;
    args.grad_x_stride = args.x_stride;
  }
  Partition partition = partition_of(args, call.dtype);
  const UpsampleKernels& kernels = kernels_of(logits);
  partition.run([&](Chunk& chunk) { kernels.backward(args, chunk); });
  finish(args, partition, kernels, gradients);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

// The most probable class at every position of (height, width).
Tensor upsample_predict(const Tensor& logits, const OptionalTensor& scale,
                        const OptionalTensor& bias, const OptionalTensor& confidence,
                        const OptionalTensor& prior, int64_t height, int64_t width,
                        bool align_corners) {
  UpsampleArgs args;
  require(height >= 0 && width >= 0, "a size below 0");
  args.images = logits.size(0);
  args.classes = logits.size(1);
  args.logits = logits.const_data_ptr();
  const Tensor axes = set_geometry(logits, height, width, align_corners, args);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  require(scale.has_value() == confidence.has_value() && bias.has_value() == confidence.has_value(),
          "scale, bias and confidence are given together or not at all");
  args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
  args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
  args.prior = vector_data(prior, "prior", args.classes, dtype, logits);
  args.confidence = vector_data(confidence, "confidence", columns_of(logits), dtype, logits);
  const int64_t size[3] = {args.images, height, width};
  const Tensor prediction = new_tensor(size, 3, aoti_torch_dtype_int64());
  args.prediction = static_cast<int64_t*>(prediction.mutable_data_ptr());
  Partition partition = partition_of(args, dtype);
  const UpsampleKernels& kernels = kernels_of(logits);
  partition.run([&](Chunk& chunk) { kernels.predict(args, chunk); });
  return prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("upsample_forward", TORCH_BOX(&upsample_forward));
  m.impl("upsample_backward", TORCH_BOX(&upsample_backward<false>));
  m.impl("upsample_backward_", TORCH_BOX(&upsample_backward<true>));
  m.impl("upsample_predict", TORCH_BOX(&upsample_predict));
}

}  // namespace disalign
