// What backend_info() says of this library.
#include <torch/csrc/stable/library.h>

#include <string>

namespace disalign::cuda {
namespace {

// "architectures=80-real,90;compiler=nvcc 13.0.88"
std::string cuda_build_info() {
  return "architectures=" DISALIGN_ARCHITECTURES ";compiler=" DISALIGN_COMPILER;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}

}  // namespace disalign::cuda
