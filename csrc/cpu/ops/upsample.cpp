// The upsampling operators on the CPU.
#include "cpu/kernels/upsample_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/ops/device.h"
#include "ops/predict_op.h"

namespace disalign {
namespace {

// The positions of F.interpolate(mode="bilinear") along an axis, in double.
void fill_axis(Axis& axis, bool align_corners, int64_t* source, double* weight) {
  const double scale = align_corners ? (axis.out > 1 ? (axis.in - 1.0) / (axis.out - 1.0) : 0.0)
                                     : static_cast<double>(axis.in) / axis.out;
  for (int64_t i = 0; i < axis.out; ++i) {
    const double at = align_corners ? scale * i : std::max(0.0, (i + 0.5) * scale - 0.5);
    source[i] = std::min(static_cast<int64_t>(at), axis.in - 1);
    weight[i] = source[i] < axis.in - 1 ? std::min(at - source[i], 1.0) : 0.0;
  }
  axis.source = source;
  axis.weight = weight;
}

int64_t* as_indices(double* memory) { return reinterpret_cast<int64_t*>(memory); }

// Fills in the axes of args, whose sizes are there. Returns their memory, which must outlive args.
Tensor set_axes(UpsampleArgs& args) {
  const int64_t height = args.y.out, width = args.x.out;
  const Tensor axes = new_tensor({2 * (height + width) + args.y.in + 1}, ScalarType::Double);
  auto* memory = static_cast<double*>(axes.mutable_data_ptr());
  fill_axis(args.y, args.align_corners, as_indices(memory), memory + height);
  memory += 2 * height;
  fill_axis(args.x, args.align_corners, as_indices(memory), memory + width);
  int64_t* first_row = as_indices(memory + 2 * width);
  int64_t y = 0;
  for (int64_t row = 0; row <= args.y.in; ++row) {
    while (y < height && args.y.source[y] < row) ++y;
    first_row[row] = y;
  }
  args.first_row = first_row;
  return axes;
}

struct Upsample {
  using Layout = UpsampleLayout;
  using Args = UpsampleArgs;
  using Device = Cpu;
  static constexpr int64_t kWantedOfForward =
      kWantLogits | kWantScale | kWantBias | kWantConfidence | kWantDetails;

  static Partition run_forward(const Tensor& logits, UpsampleArgs& args) {
    return run(logits, args, &UpsampleKernels::forward);
  }
  static Partition run_backward(const Tensor& logits, UpsampleArgs& args) {
    return run(logits, args, &UpsampleKernels::backward);
  }
  static Partition run_predict(const Tensor& logits, UpsampleArgs& args) {
    return run(logits, args, &UpsampleKernels::predict);
  }

 private:
  using Kernel = void (*UpsampleKernels::*)(const UpsampleArgs&, Chunk&);

  static Partition run(const Tensor& logits, UpsampleArgs& args, Kernel kernel) {
    args.gradients = args.grad_logits || args.grad_confidence || args.class_gradients;
    const Tensor axes = set_axes(args);
    const int64_t size = size_of(accumulate_dtype(logits.scalar_type()));
    Partition partition(args.outer * args.y.in, args.positions() * args.classes, args.classes,
                        upsample_scratch_bytes(args, size), args.class_gradients);
    const UpsampleKernels& kernels =
        kernels_for(DISALIGN_CHOOSE(upsample_kernels), logits.scalar_type());
    partition.run([&](Chunk& chunk) { (kernels.*kernel)(args, chunk); });
    if (args.gradients) {
      partition.for_neighbours(
          [&](const Chunk& before, Chunk& after) { kernels.join(args, before, after); });
    }
    return partition;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  register_loss<Upsample, bool>(m, "upsample");
  register_predict<Upsample>(m, "upsample");
}

}  // namespace disalign
