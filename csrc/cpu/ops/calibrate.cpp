// Launcher of the calibrated logits on the CPU: rows (N, C) and class planes (N, C, S). Schemas:
// disalign_ops/_ops.py.
#include <tuple>

#include "cpu/kernels/calibrate_kernel.h"
#include "cpu/ops/capability.h"
#include "cpu/ops/gradients.h"
#include "cpu/ops/partition.h"
#include "ops/arguments.h"

namespace disalign {
namespace {

struct Rows {
  static constexpr int64_t kScratch = 0;
  static void check(const Tensor& logits, const char* name) { check_rows(logits, name); }
  static int64_t inner(const Tensor&) { return 1; }
  static int64_t units(const CalibrateArgs& args) { return args.images; }
  static const CalibrateKernelTable& kernels() { return DISALIGN_CHOOSE(row_calibrate_kernels); }
};

struct Planes {
  static constexpr int64_t kScratch = kCalibrateScratch;
  static void check(const Tensor& logits, const char* name) { check_dense(logits, name); }
  static int64_t inner(const Tensor& logits) { return logits.size(2); }
  static int64_t units(const CalibrateArgs& args) { return args.images * calibrate_tiles(args); }
  static const CalibrateKernelTable& kernels() { return DISALIGN_CHOOSE(dense_calibrate_kernels); }
};

template <class Layout>
CalibrateArgs checked(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                      const Tensor& confidence) {
  Layout::check(logits, "logits");
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  CalibrateArgs args;
  args.logits = logits.const_data_ptr();
  args.images = logits.size(0);
  args.classes = logits.size(1);
  args.inner = Layout::inner(logits);
  args.image_stride = logits.stride(0);
  args.class_stride = logits.stride(1);
  args.scale = vector_data(scale, "scale", args.classes, dtype, logits);
  args.bias = vector_data(bias, "bias", args.classes, dtype, logits);
  args.confidence = vector_data(confidence, "confidence", args.images * args.inner, dtype, logits);
  return args;
}

template <class Layout>
Partition partition_of(const Tensor& logits, const CalibrateArgs& args) {
  return Partition(Layout::units(args), logits.numel(), args.classes, Layout::kScratch,
                   args.class_gradients);
}

template <class Layout>
Tensor calibrate(const Tensor& logits, const Tensor& scale, const Tensor& bias,
                 const Tensor& confidence) {
  CalibrateArgs args = checked<Layout>(logits, scale, bias, confidence);
  const Tensor out = new_like(logits);
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  args.output = out.mutable_data_ptr();
  const auto& kernel = kernels_for(Layout::kernels(), logits.scalar_type());
  Partition partition = partition_of<Layout>(logits, args);
  partition.run([&](Chunk& chunk) { kernel.forward(args, chunk); });
  return out;
}

template <class Layout>
std::tuple<Tensor, Tensor, Tensor, Tensor> calibrate_backward(
    const Tensor& grad_output, const Tensor& logits, const Tensor& scale, const Tensor& bias,
    const Tensor& confidence, bool want_logits, bool want_scale, bool want_bias,
    bool want_confidence) {
  CalibrateArgs args = checked<Layout>(logits, scale, bias, confidence);
  Layout::check(grad_output, "grad_output");
  require(grad_output.size(0) == args.images && grad_output.size(1) == args.classes &&
              Layout::inner(grad_output) == args.inner && grad_output.is_contiguous() &&
              grad_output.scalar_type() == logits.scalar_type(),
          "grad_output is not contiguous or not of the logits' shape and dtype");
  args.grad_output = grad_output.const_data_ptr();
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  const Gradients gradients(logits, args.images * args.inner, wanted, wanted.logits);
  gradients.attach(wanted, args);
  const auto& kernel = kernels_for(Layout::kernels(), logits.scalar_type());
  Partition partition = partition_of<Layout>(logits, args);
  partition.run([&](Chunk& chunk) { kernel.backward(args, chunk); });
  gradients.reduce_classes(partition);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("row_calibrate", TORCH_BOX(&calibrate<Rows>));
  m.impl("row_calibrate_backward", TORCH_BOX(&calibrate_backward<Rows>));
  m.impl("dense_calibrate", TORCH_BOX(&calibrate<Planes>));
  m.impl("dense_calibrate_backward", TORCH_BOX(&calibrate_backward<Planes>));
}

}  // namespace disalign
