// The dense operators on the CPU: logits (N, C, S), positions next to each other. Schemas:
// _ops/schemas.py.
#include "cpu/kernels/dense_kernel.h"

#include "cpu/ops/loss_op.h"

namespace disalign {
namespace {

struct DenseLayout {
  static void check(const Tensor& logits) { check_dense(logits, "logits"); }
  static int64_t positions(const Tensor& logits) { return logits.size(0) * logits.size(2); }
  static void strides(const Tensor& logits, LossArgs& args) {
    args.inner = logits.size(2);
    args.image_stride = logits.stride(0);
    args.class_stride = logits.stride(1);
    args.grad_image_stride = args.classes * args.inner;
    args.grad_class_stride = args.inner;
  }
  static int64_t units(const LossArgs& args, ScalarType dtype) {
    return args.images * dense_tiles(args, size_of(dtype));
  }
  static int64_t scratch_bytes(const LossArgs& args, ScalarType dtype) {
    return dense_scratch_bytes(args, size_of(dtype));
  }
  static bool overlaps(const LossArgs& args) {
    return (args.classes > 1 && args.class_stride < args.inner) ||
           (args.images > 1 &&
            args.image_stride < (args.classes - 1) * args.class_stride + args.inner);
  }
  static const LossKernelTable& kernels() { return DISALIGN_CHOOSE(dense_kernels); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("dense_forward", TORCH_BOX(&loss_forward<DenseLayout>));
  m.impl("dense_backward", TORCH_BOX((&loss_backward<DenseLayout, false>)));
  m.impl("dense_backward_", TORCH_BOX((&loss_backward<DenseLayout, true>)));
}

}  // namespace disalign
