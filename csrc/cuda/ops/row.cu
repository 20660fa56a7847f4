// The row operators on CUDA: logits (N, C), classes next to each other; and those of a shard, whose
// logits are some of the classes and whose sums are combined with those of the other shards before
// the gradients are made. Schemas: _ops/schemas.py.
#include "cuda/launch/launches.h"

#include "cuda/ops/loss_op.h"

namespace disalign::cuda {
namespace {

struct RowLayout {
  using Args = RowArgs;
  static void check(const Tensor& logits) { check_rows(logits, "logits"); }
  static int64_t positions(const Tensor& logits) { return logits.size(0); }
  static void strides(const Tensor& logits, RowArgs& args) {
    args.image_stride = logits.stride(0);
    args.grad_image_stride = args.classes;
  }
  static bool overlaps(const RowArgs& args) {
    return args.images > 1 && args.image_stride < args.classes;
  }
  static void forward(TorchLauncher& launcher, Dtype dtype, const RowArgs& args) {
    launch_row_forward(launcher, dtype, args);
  }
  static void backward(TorchLauncher& launcher, Dtype dtype, const RowArgs& args) {
    launch_row_backward(launcher, dtype, args);
  }
};

RowArgs shard_args(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& scale, const OptionalTensor& bias,
                   const OptionalTensor& confidence, const OptionalTensor& prior,
                   const OptionalTensor& margin, bool smoothing) {
  RowLayout::check(logits);
  require_classes(logits);
  const OptionalTensor none;
  const int64_t rows = RowLayout::positions(logits);
  RowArgs args;
  set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, none, kIgnored,
              smoothing ? 1.0 : 0.0, 0.0},
             rows, rows, args);
  RowLayout::strides(logits, args);
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
  if (args.images > 0) RowLayout::forward(launcher, dtype_of(logits), args);
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
    require(!RowLayout::overlaps(args),
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
  }
  RowLayout::backward(launcher, dtype_of(logits), args);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  m.impl("row_forward", TORCH_BOX(&loss_forward<RowLayout>));
  m.impl("row_backward", TORCH_BOX((&loss_backward<RowLayout, false>)));
  m.impl("row_backward_", TORCH_BOX((&loss_backward<RowLayout, true>)));
  m.impl("row_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("row_shard_backward", TORCH_BOX(&shard_backward<false>));
  m.impl("row_shard_backward_", TORCH_BOX(&shard_backward<true>));
}

}  // namespace disalign::cuda
