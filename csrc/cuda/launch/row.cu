// The row kernels of one dtype, DISALIGN_DTYPE, or of all. They are most of the library's code, so
// that CMakeLists.txt divides them.
#include "cuda/launch/launches.h"
#include "cuda/launch/row_launch.h"

namespace disalign::cuda {

template <Dtype dtype>
void launch_row_forward(Launcher& launcher, const RowArgs& args) {
  for_bool(args.scale != nullptr, [&](auto calibrated) {
    launch_row_forward<typename StorageOf<dtype>::type, decltype(calibrated)::value>(launcher, args,
                                                                                     dtype);
  });
}

template <Dtype dtype>
void launch_row_backward(Launcher& launcher, const RowArgs& args) {
  for_bool(args.scale != nullptr, [&](auto calibrated) {
    launch_row_backward<typename StorageOf<dtype>::type, decltype(calibrated)::value>(launcher,
                                                                                      args, dtype);
  });
}

#define DISALIGN_ROWS(dtype)                                                 \
  template void launch_row_forward<Dtype::dtype>(Launcher&, const RowArgs&); \
  template void launch_row_backward<Dtype::dtype>(Launcher&, const RowArgs&)

#if defined(DISALIGN_DTYPE)
DISALIGN_ROWS(DISALIGN_DTYPE);
#else
DISALIGN_ROWS(kFloat64);
DISALIGN_ROWS(kFloat32);
DISALIGN_ROWS(kBFloat16);
DISALIGN_ROWS(kFloat16);
#endif

}  // namespace disalign::cuda
