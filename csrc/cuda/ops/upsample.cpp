// The upsampling operators on CUDA.
#include "cuda/launch/launches.h"
#include "cuda/ops/device.h"
#include "ops/predict_op.h"

namespace disalign::cuda {
namespace {

struct Upsample {
  using Layout = UpsampleLayout;
  using Args = UpsampleArgs;
  using Device = Cuda;
  static constexpr int64_t kWantedOfForward = kWantDetails;

  static void forward(TorchLauncher& launcher, Dtype dtype, const UpsampleArgs& args) {
    if (args.probabilities) return launch_soft_upsample_forward(launcher, dtype, args);
    launch_upsample_forward(launcher, dtype, args);
  }
  static void backward(TorchLauncher& launcher, Dtype dtype, const UpsampleArgs& args) {
    if (args.probabilities) return launch_soft_upsample_backward(launcher, dtype, args);
    launch_upsample_backward(launcher, dtype, args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  register_loss<Upsample, bool>(m, "upsample");
  register_predict<Upsample>(m, "upsample");
}

}  // namespace disalign::cuda
