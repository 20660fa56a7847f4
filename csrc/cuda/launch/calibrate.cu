#include "cuda/launch/calibrate_launch.h"

#include "cuda/launch/launches.h"

namespace disalign::cuda {

void launch_calibrate_forward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  launch_calibrate<false>(launcher, dtype, args);
}

void launch_calibrate_backward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  launch_calibrate<true>(launcher, dtype, args);
}

void launch_calibrate_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  launch_calibrate<false>(launcher, dtype, args);
}

void launch_calibrate_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  launch_calibrate<true>(launcher, dtype, args);
}

}  // namespace disalign::cuda
