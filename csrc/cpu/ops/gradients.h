// The gradients that an operator was asked for: their tensors, and their way into the kernels.
#pragma once

#include "cpu/ops/call.h"
#include "cpu/ops/huge_pages.h"
#include "cpu/ops/partition.h"

namespace disalign {

// The gradients that are wanted; those that are not stay empty.
struct Gradients {
  Tensor logits, scale, bias, confidence;

  // new_logits: allocate the gradient of the logits, contiguous.
  Gradients(const Tensor& z, int64_t confidences, Wanted wanted, bool new_logits)
      : logits(new_logits ? new_like(z) : new_tensor({0}, z.scalar_type())),
        scale(vector(z, wanted.scale ? z.size(1) : 0)),
        bias(vector(z, wanted.bias ? z.size(1) : 0)),
        confidence(vector(z, wanted.confidence ? confidences : 0)) {
    if (new_logits)
      advise_huge_pages(logits.mutable_data_ptr(), logits.numel() * logits.element_size());
  }

  // Tells the kernels' arguments (LossArgs, CalibrateArgs) where to write.
  template <class Args>
  void attach(Wanted wanted, Args& args) const {
    args.class_gradients = wanted.classes();
    args.grad_logits = logits.numel() > 0 ? logits.mutable_data_ptr() : nullptr;
    args.grad_confidence = wanted.confidence ? confidence.mutable_data_ptr() : nullptr;
  }

  void reduce_classes(const Partition& partition) const {
    if (scale.numel() > 0) partition.reduce_classes(&Chunk::grad_scale, scale);
    if (bias.numel() > 0) partition.reduce_classes(&Chunk::grad_bias, bias);
  }

 private:
  static Tensor vector(const Tensor& z, int64_t entries) {
    return new_tensor({entries}, accumulate_dtype(z.scalar_type()));
  }
};

}  // namespace disalign
