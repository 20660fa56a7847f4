// The dense operators on the CPU.
#include "cpu/kernels/dense_kernel.h"

#include "cpu/ops/device.h"

namespace disalign {
namespace {

struct DenseKernels {
  static int64_t units(const LossArgs& args, int64_t size) {
    return args.outer * dense_tiles(args, size);
  }
  static int64_t scratch_bytes(const LossArgs& args, int64_t size) {
    return dense_scratch_bytes(args, size);
  }
  static const LossKernelTable& table() { return DISALIGN_CHOOSE(dense_kernels); }
};

using Dense = CpuOperator<DenseLayout, DenseKernels>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  register_loss<Dense>(m, "dense");
  register_made<Dense>(m, "dense");
}

}  // namespace disalign
