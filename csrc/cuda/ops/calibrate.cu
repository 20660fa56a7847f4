// The calibrated logits on CUDA: rows (N, C) and class planes (N, C, S). Schemas: _ops/schemas.py.
#include "cuda/launch/launches.h"

#include "cuda/ops/loss_op.h"

namespace disalign::cuda {
namespace {

struct Rows {
  using Args = RowArgs;
  static void check(const Tensor& logits, const char* name) { check_rows(logits, name); }
  static int64_t inner(const Tensor&) { return 1; }
};

struct Planes {
  using Args = DenseArgs;
  static void check(const Tensor& logits, const char* name) { check_dense(logits, name); }
  static int64_t inner(const Tensor& logits) { return logits.size(2); }
};

template <class Layout>
typename Layout::Args checked(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                              const Tensor& confidence) {
  Layout::check(logits, "logits");
  require_classes(logits);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  typename Layout::Args args;
  args.logits = logits.const_data_ptr();
  args.images = logits.size(0);
  args.classes = logits.size(1);
  args.inner = Layout::inner(logits);
  args.image_stride = logits.stride(0);
  args.class_stride = logits.stride(1);
  args.grad_image_stride = args.classes * args.inner;
  args.grad_class_stride = args.inner;
  args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
  args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
  args.confidence = vector_data(confidence, "confidence", args.positions(), dtype, logits);
  return args;
}

template <class Layout>
Tensor calibrate(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                 const Tensor& confidence) {
  auto args = checked<Layout>(logits, scale, bias, confidence);
  TorchLauncher launcher(logits);
  const Tensor out = new_like(logits);
  args.grad_logits = out.mutable_data_ptr();
  launch_calibrate_forward(launcher, dtype_of(logits), args);
  return out;
}

template <class Layout>
BackwardResult calibrate_backward(const Tensor& grad_output, const Tensor& logits,
                                  const Tensor& scale, const Tensor& bias, const Tensor& confidence,
                                  bool want_logits, bool want_scale, bool want_bias,
                                  bool want_confidence) {
  auto args = checked<Layout>(logits, scale, bias, confidence);
  Layout::check(grad_output, "grad_output");
  require(grad_output.size(0) == args.images && grad_output.size(1) == args.classes &&
              Layout::inner(grad_output) == args.inner && grad_output.is_contiguous() &&
              grad_output.scalar_type() == logits.scalar_type() &&
              grad_output.device() == logits.device(),
          "grad_output is not contiguous or not of the logits' shape, dtype and device");
  args.grad_output = grad_output.const_data_ptr();
  TorchLauncher launcher(logits);
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  const Gradients gradients(logits, args.positions(), wanted, wanted.logits);
  gradients.attach(wanted, args);
  launch_calibrate_backward(launcher, dtype_of(logits), args);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  m.impl("row_calibrate", TORCH_BOX(&calibrate<Rows>));
  m.impl("row_calibrate_backward", TORCH_BOX(&calibrate_backward<Rows>));
  m.impl("dense_calibrate", TORCH_BOX(&calibrate<Planes>));
  m.impl("dense_calibrate_backward", TORCH_BOX(&calibrate_backward<Planes>));
}

}  // namespace disalign::cuda
