// The row operators on the CPU: logits (N, C), classes next to each other. Schemas: _ops.py.
#include "row_kernel.h"

#include "loss_op.h"

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("row_forward", TORCH_BOX(&loss_forward<RowLayout>));
  m.impl("row_backward", TORCH_BOX((&loss_backward<RowLayout, false>)));
  m.impl("row_backward_", TORCH_BOX((&loss_backward<RowLayout, true>)));
}

}  // namespace disalign
