// A launcher that names the kernels, so that nvcc compiles them and reports on them. Nothing runs.
#pragma once

#include "cuda/kernels/launch.h"

namespace {

struct Launcher {
  disalign::cuda::Limits limits() const { return {}; }
  template <class Args>
  int blocks_per_multiprocessor(void (*)(Args), int, size_t) const {
    return 1;
  }
  template <class Args>
  int clusters(void (*)(Args), const disalign::cuda::Shape&) const {
    return 1;
  }
  template <class Args>
  void launch(void (*kernel)(Args), const disalign::cuda::Shape& shape, const Args& args) const {
    void* arguments[] = {const_cast<Args*>(&args)};
    cudaLaunchKernel(kernel, dim3(), dim3(), arguments, shape.shared_bytes, nullptr);
  }
  void* allocate(size_t) const { return nullptr; }
};

}  // namespace
