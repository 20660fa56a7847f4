// The row operators of a shard on the CPU: logits (N, C) of some of the classes, whose sums are
// combined with those of the other shards before the gradients are made. Schemas: _ops.py.
#include "call.h"
#include "capability.h"
#include "gradients.h"
#include "partition.h"
#include "row_kernel.h"

namespace disalign {
namespace {

Call shard_call(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& scale, const OptionalTensor& bias,
                const OptionalTensor& confidence, const OptionalTensor& prior,
                const OptionalTensor& margin, bool smoothing) {
  check_rows(logits, "logits");
  const OptionalTensor none;
  const int64_t rows = logits.size(0);
  Call call({logits, target, weight, scale, bias, confidence, prior, margin, none, kIgnored,
             smoothing ? 1.0 : 0.0, 0.0},
            rows, rows, kElsewhere);
  call.args.image_stride = logits.stride(0);
  call.args.grad_image_stride = call.args.classes;
  return call;
}

using Kernel = void (*LossKernels::*)(const LossArgs&, Chunk&);

// Runs a kernel over the rows; the class sums go to gradients.
void run(const Call& call, const Tensor& logits, Kernel kernel, const Gradients& gradients) {
  const LossArgs& args = call.args;
  Partition partition(args.images, logits.numel(), args.classes,
                      row_scratch_bytes(args.classes, size_of(call.dtype)), args.class_gradients);
  const LossKernels& kernels = kernels_for(DISALIGN_CHOOSE(row_kernels), logits.scalar_type());
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
std::tuple<Tensor, Tensor, Tensor, Tensor> shard_backward(
    const Tensor& factors, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& confidence,
    const OptionalTensor& prior, const OptionalTensor& margin, bool smoothing, bool want_logits,
    bool want_scale, bool want_bias, bool want_confidence) {
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
    require(args.images <= 1 || args.image_stride >= args.classes,
            "the logits overlap in memory: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_image_stride = args.image_stride;
  }
  run(call, logits, &LossKernels::backward, gradients);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("row_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("row_shard_backward", TORCH_BOX(&shard_backward<false>));
  m.impl("row_shard_backward_", TORCH_BOX(&shard_backward<true>));
}

}  // namespace disalign
