// The calibrated logits on the CPU.
#include "cpu/kernels/calibrate_kernel.h"

#include "cpu/ops/device.h"
#include "ops/calibrate_op.h"

namespace disalign {
namespace {

struct Row {
  using Layout = RowLayout;
  using Args = CalibrateArgs;
  using Device = Cpu;
  static constexpr int64_t kScratch = 0;
  static int64_t units(const CalibrateArgs& args) { return args.outer; }
  static const CalibrateKernelTable& table() { return DISALIGN_CHOOSE(row_calibrate_kernels); }
};

struct Dense {
  using Layout = DenseLayout;
  using Args = CalibrateArgs;
  using Device = Cpu;
  static constexpr int64_t kScratch = kCalibrateScratch;
  static int64_t units(const CalibrateArgs& args) { return args.outer * calibrate_tiles(args); }
  static const CalibrateKernelTable& table() { return DISALIGN_CHOOSE(dense_calibrate_kernels); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  register_calibrate<Row>(m, "row");
  register_calibrate<Dense>(m, "dense");
}

}  // namespace disalign
