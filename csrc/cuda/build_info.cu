// What backend_info() says of this library, and whether it can serve a device.
#include <torch/csrc/stable/library.h>

#include <string>

#include "finish_kernel.cuh"
#include "torch_launcher.h"

namespace disalign::cuda {
namespace {

// "architectures=80-real,90;compiler=nvcc 13.0.88"
std::string cuda_build_info() {
  return "architectures=" DISALIGN_ARCHITECTURES ";compiler=" DISALIGN_COMPILER;
}

// Why kernels of this library cannot run on this device; empty if they can.
std::string cuda_why_not(int64_t device) {
  if (current_stream() == nullptr) return "this PyTorch has no CUDA streams";
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(static_cast<int>(device));
  if (status == cudaSuccess) {
    // Fails where the driver is too old, or no code for the device's architecture is here.
    status = cudaFuncGetAttributes(&attributes, finish_kernel<float>);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // the runtime's, not the caller's
  if (status == cudaSuccess) return "";
  return std::string(cudaGetErrorString(status)) +
         ": the library has code for " DISALIGN_ARCHITECTURES ", by " DISALIGN_COMPILER;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
  m.impl("cuda_why_not", TORCH_BOX(&cuda_why_not));
}

}  // namespace disalign::cuda
