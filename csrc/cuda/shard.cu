// The row operators of a shard on CUDA: logits (N, C) of some of the classes, whose sums are
// combined with those of the other shards before the gradients are made. Schemas: _ops.py.
#include "row_launch.h"

#include "loss_op.h"

namespace disalign::cuda {
namespace {

RowArgs shard_args(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& scale, const OptionalTensor& bias,
                   const OptionalTensor& confidence, const OptionalTensor& prior,
                   const OptionalTensor& margin, bool smoothing) {
  check_rows(logits, "logits");
  require_classes(logits);
  const OptionalTensor none;
  const int64_t rows = logits.size(0);
  RowArgs args;
  set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, none, kIgnored,
              smoothing ? 1.0 : 0.0, 0.0},
             rows, rows, args);
  args.image_stride = logits.stride(0);
  args.grad_image_stride = args.classes;
  return args;
}

Tensor shard_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                     const OptionalTensor& scale, const OptionalTensor& bias,
                     const OptionalTensor& confidence, const OptionalTensor& prior,
                     const OptionalTensor& margin, bool smoothing) {
  RowArgs args =
      shard_args(logits, target, weight, scale, bias, confidence, prior, margin, smoothing);
  TorchLauncher launcher(logits);
  const Tensor sums = new_tensor({kShardValues, args.images},
                                 accumulate_dtype(logits.scalar_type()), place_of(logits));
  args.shard_sums = sums.mutable_data_ptr();
  if (args.images > 0) launch_row_forward(launcher, dtype_of(logits), args);
  return sums;
}

template <bool InPlace>
BackwardResult shard_backward(const Tensor& factors, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& scale,
                              const OptionalTensor& bias, const OptionalTensor& confidence,
                              const OptionalTensor& prior, const OptionalTensor& margin,
                              bool smoothing, bool want_logits, bool want_scale, bool want_bias,
                              bool want_confidence) {
  RowArgs args =
      shard_args(logits, target, weight, scale, bias, confidence, prior, margin, smoothing);
  args.shard_factors = vector_data(factors, "factors", kShardValues * args.images,
                                   accumulate_dtype(logits.scalar_type()), logits);
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(args, wanted);
  TorchLauncher launcher(logits);
  const Gradients gradients(logits, args.images, wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  if (InPlace && wanted.logits) {
    require(args.images <= 1 || args.image_stride >= args.classes,
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
  }
  launch_row_backward(launcher, dtype_of(logits), args);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  m.impl("row_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("row_shard_backward", TORCH_BOX(&shard_backward<false>));
  m.impl("row_shard_backward_", TORCH_BOX(&shard_backward<true>));
}

}  // namespace disalign::cuda
