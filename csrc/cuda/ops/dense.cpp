// The dense operators on CUDA.
#include "cuda/launch/launches.h"
#include "cuda/ops/device.h"

namespace disalign::cuda {
namespace {

struct Dense {
  using Layout = DenseLayout;
  using Args = DenseArgs;
  using Device = Cuda;
  static constexpr int64_t kWantedOfForward = kWantLogits | kWantScale | kWantBias |
                                              kWantConfidence | kWantDetails | kWantPrediction |
                                              kWantEntropy;

  static void forward(TorchLauncher& launcher, Dtype dtype, const DenseArgs& args) {
    if (args.probabilities) return launch_soft_dense_forward(launcher, dtype, args);
    launch_dense_forward(launcher, dtype, args);
  }
  static void backward(TorchLauncher& launcher, Dtype dtype, const DenseArgs& args) {
    if (args.probabilities) return launch_soft_dense_backward(launcher, dtype, args);
    launch_dense_backward(launcher, dtype, args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  register_loss<Dense>(m, "dense");
  register_made<Dense>(m, "dense");
}

}  // namespace disalign::cuda
