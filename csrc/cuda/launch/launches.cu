// What compiles quickly, in one translation unit: each costs nvcc two seconds before its first kernel.
#include "cuda/launch/launches.h"

#include "cuda/launch/calibrate_launch.h"
#include "cuda/launch/finish_launch.h"
#include "cuda/launch/soft_dense_launch.h"
#include "cuda/launch/soft_upsample_launch.h"

namespace disalign::cuda {

void launch_row_forward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  switch (dtype) {
    case Dtype::kFloat64:
      return launch_row_forward<Dtype::kFloat64>(launcher, args);
    case Dtype::kFloat32:
      return launch_row_forward<Dtype::kFloat32>(launcher, args);
    case Dtype::kBFloat16:
      return launch_row_forward<Dtype::kBFloat16>(launcher, args);
    case Dtype::kFloat16:
      return launch_row_forward<Dtype::kFloat16>(launcher, args);
  }
}

void launch_row_backward(Launcher& launcher, Dtype dtype, const RowArgs& args) {
  switch (dtype) {
    case Dtype::kFloat64:
      return launch_row_backward<Dtype::kFloat64>(launcher, args);
    case Dtype::kFloat32:
      return launch_row_backward<Dtype::kFloat32>(launcher, args);
    case Dtype::kBFloat16:
      return launch_row_backward<Dtype::kBFloat16>(launcher, args);
    case Dtype::kFloat16:
      return launch_row_backward<Dtype::kFloat16>(launcher, args);
  }
}

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

void finish(Launcher& launcher, Dtype dtype, FinishArgs args) {
  finish<Launcher>(launcher, dtype, args);
}

void launch_soft_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  launch_soft_dense_forward<Launcher>(launcher, dtype, args);
}

void launch_soft_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  launch_soft_dense_backward<Launcher>(launcher, dtype, args);
}

void launch_soft_upsample_forward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  launch_soft_upsample_forward<Launcher>(launcher, dtype, args);
}

void launch_soft_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  launch_soft_upsample_backward<Launcher>(launcher, dtype, args);
}

}  // namespace disalign::cuda
