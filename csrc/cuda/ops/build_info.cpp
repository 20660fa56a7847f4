// What backend_info() says of this library, and whether it can serve a device.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/launch/support.h"
#include "cuda/ops/torch_launcher.h"

namespace disalign::cuda {
namespace {

// "architectures=80-real,90;compiler=nvcc 13.0.88;sources=<SHA-256>"
std::string cuda_build_info() {
  return "architectures=" DISALIGN_ARCHITECTURES ";compiler=" DISALIGN_COMPILER
         ";sources=" DISALIGN_SOURCES;
}

// Why kernels of this library cannot run on this device; empty if they can.
std::string cuda_why_not(int64_t device) {
  if (current_stream() == nullptr) return "this PyTorch has no CUDA streams";
  const std::string reason = why_not(static_cast<int>(device), DISALIGN_ARCHITECTURES);
  if (reason.empty()) return "";
  return reason + ": the library has code for " DISALIGN_ARCHITECTURES ", by " DISALIGN_COMPILER;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
  m.impl("cuda_why_not", TORCH_BOX(&cuda_why_not));
}

}  // namespace disalign::cuda
