// The row kernels of float32 and bfloat16, for the compiler's report: support/registers.py.
#include "cuda/launch/row_launch.h"

using namespace disalign::cuda;

namespace {

struct Launcher {
  Limits limits() const { return {}; }
  template <class Args>
  int blocks_per_multiprocessor(void (*)(Args), int, size_t) const {
    return 1;
  }
  template <class Args>
  int clusters(void (*)(Args), const Shape&) const {
    return 1;
  }
  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) const {
    void* arguments[] = {const_cast<Args*>(&args)};
    cudaLaunchKernel(kernel, dim3(), dim3(), arguments, shape.shared_bytes, nullptr);
  }
  void* allocate(size_t) const { return nullptr; }
};

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
