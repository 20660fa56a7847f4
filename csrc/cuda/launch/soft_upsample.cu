#include "cuda/launch/soft_upsample_launch.h"

#include "cuda/launch/launches.h"

namespace disalign::cuda {

void launch_soft_upsample_forward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  launch_soft_upsample_forward<Launcher>(launcher, dtype, args);
}

void launch_soft_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  launch_soft_upsample_backward<Launcher>(launcher, dtype, args);
}

}  // namespace disalign::cuda
