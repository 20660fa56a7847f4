#include "cuda/launch/row_launch.h"
#include "cuda/launch/soft_row_launch.h"
#include "report_launcher.h"
using namespace disalign::cuda;
void every(const RowArgs& args) {
  Launcher launcher;
  launch_soft_row_forward<float, true>(launcher, args, Dtype::kFloat32);
  launch_soft_row_backward<float, true>(launcher, args, Dtype::kFloat32);
  launch_soft_row_forward<__nv_bfloat16, true>(launcher, args, Dtype::kBFloat16);
  launch_soft_row_backward<__nv_bfloat16, true>(launcher, args, Dtype::kBFloat16);
#ifdef PLAIN
  launch_soft_row_forward<float, false>(launcher, args, Dtype::kFloat32);
  launch_soft_row_backward<float, false>(launcher, args, Dtype::kFloat32);
  launch_soft_row_forward<__nv_bfloat16, false>(launcher, args, Dtype::kBFloat16);
  launch_soft_row_backward<__nv_bfloat16, false>(launcher, args, Dtype::kBFloat16);
#endif
}
