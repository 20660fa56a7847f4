// Every kernel of csrc/cuda, for the compiler's report: test_cuda_build.py.
#include "cuda/launch/calibrate_launch.h"
#include "cuda/launch/dense_launch.h"
#include "cuda/launch/row_launch.h"
#include "cuda/launch/soft_dense_launch.h"
#include "cuda/launch/soft_row_launch.h"
#include "cuda/launch/soft_upsample_launch.h"
#include "cuda/launch/upsample_launch.h"

#include "report_launcher.h"

using namespace disalign::cuda;

void every_kernel(Dtype dtype, const RowArgs& row, const DenseArgs& dense,
                  const UpsampleArgs& upsample) {
  Launcher launcher;
  launch_row_forward(launcher, dtype, row);
  launch_row_backward(launcher, dtype, row);
  launch_dense_forward(launcher, dtype, dense);
  launch_dense_backward(launcher, dtype, dense);
  launch_upsample_forward(launcher, dtype, upsample);
  launch_upsample_backward(launcher, dtype, upsample);
  launch_soft_row_forward(launcher, dtype, row);
  launch_soft_row_backward(launcher, dtype, row);
  launch_soft_dense_forward(launcher, dtype, dense);
  launch_soft_dense_backward(launcher, dtype, dense);
  launch_soft_upsample_forward(launcher, dtype, upsample);
  launch_soft_upsample_backward(launcher, dtype, upsample);
  launch_calibrate<false>(launcher, dtype, row);
  launch_calibrate<true>(launcher, dtype, row);
  launch_calibrate<false>(launcher, dtype, dense);
  launch_calibrate<true>(launcher, dtype, dense);
}
