// The row kernels of float32 and bfloat16, for the compiler's report: support/launch_plans.py.
#include "cuda/launch/row_launch.h"

#include "report_launcher.h"

using namespace disalign::cuda;

namespace {

template <class T, bool Calibrated>
void row_kernels(Dtype dtype, RowArgs& args) {
  Launcher launcher;
  launch_row_forward<T, Calibrated>(launcher, args, dtype);
  launch_row_backward<T, Calibrated>(launcher, args, dtype);
}

}  // namespace

void float_and_bfloat16(RowArgs& args) {
  row_kernels<float, false>(Dtype::kFloat32, args);
  row_kernels<float, true>(Dtype::kFloat32, args);
  row_kernels<__nv_bfloat16, false>(Dtype::kBFloat16, args);
  row_kernels<__nv_bfloat16, true>(Dtype::kBFloat16, args);
}
