#include "cuda/launch/launches.h"

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

}  // namespace disalign::cuda
