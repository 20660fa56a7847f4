// What the operators call: launches over the launcher of launcher.h, compiled without torch and each
// in a translation unit of its own.
#pragma once

#include "cuda/launch/launcher.h"

namespace disalign::cuda {

void launch_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args);
void launch_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args);
// With class probabilities.
void launch_soft_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args);
void launch_soft_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args);
void launch_soft_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args);
void launch_soft_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args);
void launch_soft_upsample_forward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args);
void launch_soft_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args);
void launch_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args);
void launch_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args);
void launch_upsample_forward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args);
void launch_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args);
void launch_calibrate_forward(Launcher& launcher, Dtype dtype, const RowArgs& args);
void launch_calibrate_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args);
void launch_calibrate_backward(Launcher& launcher, Dtype dtype, const RowArgs& args);
void launch_calibrate_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args);

// The end of these: finish_launch.h, whose kernels then are compiled once.
void finish(Launcher& launcher, Dtype dtype, FinishArgs args);

// The row operators by dtype, in a translation unit for each: row.cu.
template <Dtype dtype>
void launch_row_forward(Launcher& launcher, const RowArgs& args);
template <Dtype dtype>
void launch_row_backward(Launcher& launcher, const RowArgs& args);

}  // namespace disalign::cuda
