#include "cuda/launch/soft_dense_launch.h"

#include "cuda/launch/launches.h"

namespace disalign::cuda {

void launch_soft_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  launch_soft_dense_forward<Launcher>(launcher, dtype, args);
}

void launch_soft_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  launch_soft_dense_backward<Launcher>(launcher, dtype, args);
}

}  // namespace disalign::cuda
