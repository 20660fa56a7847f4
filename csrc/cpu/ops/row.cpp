// The row operators on the CPU, and those of a shard: rows of which the logits are some of the
// classes.
#include "cpu/kernels/row_kernel.h"

#include "cpu/ops/device.h"

namespace disalign {
namespace {

struct RowKernels {
  static int64_t units(const LossArgs& args, int64_t) { return args.outer; }
  static int64_t scratch_bytes(const LossArgs& args, int64_t size) {
    return row_scratch_bytes(args, size);
  }
  static const LossKernelTable& table() { return DISALIGN_CHOOSE(row_kernels); }
};

using Row = CpuOperator<RowLayout, RowKernels>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  register_loss<Row>(m, "row");
  register_made<Row>(m, "row");
  register_shard<Row>(m, "row");
}

}  // namespace disalign
