// The row operators on the CPU: logits (N, C), classes next to each other; and those of a shard,
// whose logits are some of the classes and whose sums are combined with those of the other shards
// before the gradients are made. Schemas: _ops/schemas.py.
#include "cpu/kernels/row_kernel.h"

#include "cpu/ops/loss_op.h"

namespace disalign {
namespace {

struct RowLayout {
  static void check(const Tensor& logits) { check_rows(logits, "logits"); }
  static int64_t positions(const Tensor& logits) { return logits.size(0); }
  static void strides(const Tensor& logits, LossArgs& args) {
    args.image_stride = logits.stride(0);
    args.grad_image_stride = args.classes;
  }
  static int64_t units(const LossArgs& args, ScalarType) { return args.images; }
  static int64_t scratch_bytes(const LossArgs& args, ScalarType dtype) {
    return row_scratch_bytes(args.classes, size_of(dtype));
  }
  static bool overlaps(const LossArgs& args) {
    return args.images > 1 && args.image_stride < args.classes;
  }
  static const LossKernelTable& kernels() { return DISALIGN_CHOOSE(row_kernels); }
};

Call shard_call(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& scale, const OptionalTensor& bias,
                const OptionalTensor& confidence, const OptionalTensor& prior,
                const OptionalTensor& margin, bool smoothing) {
  RowLayout::check(logits);
  const OptionalTensor none;
  const int64_t rows = RowLayout::positions(logits);
  Call call({logits, target, weight, scale, bias, confidence, prior, margin, none, kIgnored,
             smoothing ? 1.0 : 0.0, 0.0},
            rows, rows, kElsewhere);
  RowLayout::strides(logits, call.args);
  return call;
}

using Kernel = void (*LossKernels::*)(const LossArgs&, Chunk&);

// Runs a kernel over the rows; the class sums go to gradients.
void run(const Call& call, const Tensor& logits, Kernel kernel, const Gradients& gradients) {
  const LossArgs& args = call.args;
  Partition partition(RowLayout::units(args, call.dtype), logits.numel(), args.classes,
                      RowLayout::scratch_bytes(args, call.dtype), args.class_gradients);
  const LossKernels& kernels = kernels_for(RowLayout::kernels(), logits.scalar_type());
  partition.run([&](Chunk& chunk) { (kernels.*kernel)(args, chunk); });
  gradients.reduce_classes(partition);
}

Tensor shard_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                     const OptionalTensor& scale, const OptionalTensor& bias,
                     const OptionalTensor& confidence, const OptionalTensor& prior,
                     const OptionalTensor& margin, bool smoothing) {
  Call call = shard_call(logits, target, weight, scale, bias, confidence, prior, margin, smoothing);
  const Tensor sums = new_tensor({kShardValues, call.positions}, call.dtype);
  call.args.shard_sums = sums.mutable_data_ptr();
  run(call, logits, &LossKernels::forward, Gradients(logits, 0, {}, false));
  return sums;
}

template <bool InPlace>
BackwardResult shard_backward(const Tensor& factors, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& scale,
                              const OptionalTensor& bias, const OptionalTensor& confidence,
                              const OptionalTensor& prior, const OptionalTensor& margin,
                              bool smoothing, bool want_logits, bool want_scale, bool want_bias,
                              bool want_confidence) {
  Call call = shard_call(logits, target, weight, scale, bias, confidence, prior, margin, smoothing);
  LossArgs& args = call.args;
  args.shard_factors =
      vector_data(factors, "factors", kShardValues * call.positions, call.dtype, logits);
  args.row_max = factors.mutable_data_ptr();
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(args, wanted);
  const Gradients gradients(logits, call.confidences, wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  if (InPlace && wanted.logits) {
    require(!RowLayout::overlaps(args),
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
  }
  run(call, logits, &LossKernels::backward, gradients);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("row_forward", TORCH_BOX(&loss_forward<RowLayout>));
  m.impl("row_backward", TORCH_BOX((&loss_backward<RowLayout, false>)));
  m.impl("row_backward_", TORCH_BOX((&loss_backward<RowLayout, true>)));
  m.impl("row_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("row_shard_backward", TORCH_BOX(&shard_backward<false>));
  m.impl("row_shard_backward_", TORCH_BOX(&shard_backward<true>));
}

}  // namespace disalign
