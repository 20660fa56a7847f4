// The calibrated logits on CUDA.
#include "cuda/launch/launches.h"
#include "cuda/ops/device.h"
#include "ops/calibrate_op.h"

namespace disalign::cuda {
namespace {

template <class OfLayout, class OfArgs>
struct Calibrate {
  using Layout = OfLayout;
  using Args = OfArgs;
  using Device = Cuda;

  static void forward(TorchLauncher& launcher, Dtype dtype, const Args& args) {
    launch_calibrate_forward(launcher, dtype, args);
  }
  static void backward(TorchLauncher& launcher, Dtype dtype, const Args& args) {
    launch_calibrate_backward(launcher, dtype, args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DISALIGN_CUDA_LIBRARY, DISALIGN_CUDA_KEY, m) {
  register_calibrate<Calibrate<RowLayout, RowArgs>>(m, "row");
  register_calibrate<Calibrate<DenseLayout, DenseArgs>>(m, "dense");
}

}  // namespace disalign::cuda
