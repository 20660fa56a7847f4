#include "cuda/launch/soft_row_launch.h"

#include "cuda/launch/launches.h"

namespace disalign::cuda {

void launch_soft_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  launch_soft_row_forward<Launcher>(launcher, dtype, args);
}

void launch_soft_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  launch_soft_row_backward<Launcher>(launcher, dtype, args);
}

}  // namespace disalign::cuda
