// The row operators on CUDA: logits (N, C), classes next to each other. Schemas: _ops.py.
#include "row_launch.h"

#include "loss_op.h"

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  m.impl("row_forward", TORCH_BOX(&loss_forward<RowLayout>));
  m.impl("row_backward", TORCH_BOX((&loss_backward<RowLayout, false>)));
  m.impl("row_backward_", TORCH_BOX((&loss_backward<RowLayout, true>)));
}

}  // namespace disalign::cuda
