// The row operators on CUDA, and those of a shard: rows of which the logits are some of the
// classes.
#include "cuda/launch/launches.h"
#include "cuda/ops/device.h"

namespace disalign::cuda {
namespace {

struct Row {
  using Layout = RowLayout;
  using Args = RowArgs;
  using Device = Cuda;
  static constexpr int64_t kWantedOfForward = kWantLogits | kWantScale | kWantBias |
                                              kWantConfidence | kWantDetails | kWantPrediction |
                                              kWantEntropy;
  static constexpr int64_t kWantedOfShard = kWantPrediction | kWantEntropy;

  static void forward(TorchLauncher& launcher, Dtype dtype, const RowArgs& args) {
    if (args.denominator == nullptr && args.outer == 0) return;  // a shard's sums of no rows
    if (args.probabilities) return launch_soft_row_forward(launcher, dtype, args);
    launch_row_forward(launcher, dtype, args);
  }
  static void backward(TorchLauncher& launcher, Dtype dtype, const RowArgs& args) {
    if (args.probabilities) return launch_soft_row_backward(launcher, dtype, args);
    launch_row_backward(launcher, dtype, args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  register_loss<Row>(m, "row");
  register_made<Row>(m, "row");
  register_shard<Row>(m, "row");
}

}  // namespace disalign::cuda
