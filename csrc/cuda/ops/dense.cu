// The dense operators on CUDA: logits (N, C, S), positions next to each other. Schemas:
// _ops/schemas.py.
#include "cuda/launch/launches.h"

#include "cuda/ops/loss_op.h"

namespace disalign::cuda {
namespace {

struct DenseLayout {
  using Args = DenseArgs;
  static void check(const Tensor& logits) { check_dense(logits, "logits"); }
  static int64_t positions(const Tensor& logits) { return logits.size(0) * logits.size(2); }
  static void strides(const Tensor& logits, DenseArgs& args) {
    args.inner = logits.size(2);
    args.image_stride = logits.stride(0);
    args.class_stride = logits.stride(1);
    args.grad_image_stride = args.classes * args.inner;
    args.grad_class_stride = args.inner;
  }
  static bool overlaps(const DenseArgs& args) {
    return (args.classes > 1 && args.class_stride < args.inner) ||
           (args.images > 1 &&
            args.image_stride < (args.classes - 1) * args.class_stride + args.inner);
  }
  static void forward(TorchLauncher& launcher, Dtype dtype, const DenseArgs& args) {
    launch_dense_forward(launcher, dtype, args);
  }
  static void backward(TorchLauncher& launcher, Dtype dtype, const DenseArgs& args) {
    launch_dense_backward(launcher, dtype, args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  m.impl("dense_forward", TORCH_BOX(&loss_forward<DenseLayout>));
  m.impl("dense_backward", TORCH_BOX((&loss_backward<DenseLayout, false>)));
  m.impl("dense_backward_", TORCH_BOX((&loss_backward<DenseLayout, true>)));
}

}  // namespace disalign::cuda
