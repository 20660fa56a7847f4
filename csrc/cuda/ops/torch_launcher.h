// The launcher of the operators over torch: kernels on the current stream of the logits' device,
// workspace from torch's allocator.
#pragma once

#include <vector>

#include "cuda/launch/launcher.h"
#include "ops/arguments.h"

#if !defined(DISALIGN_SIMT)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace disalign::cuda {

inline Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

// The current stream of a device; in tests/simt there are none.
#if defined(DISALIGN_SIMT)

class TorchStream : public Launcher {
 protected:
  explicit TorchStream(Place) {}
};

#else

// Of torch's CUDA builds alone. The library is loaded everywhere, so it does not link to
// libtorch_cuda.so; and since Python loads both with RTLD_LOCAL, a weak symbol would not find it.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
inline CurrentStream current_stream() {
  static const CurrentStream found = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, name);
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

class TorchStream : public Launcher {
 protected:
  explicit TorchStream(Place place)
      : Launcher(place.index, stream_of(place.index)), guard_(place.index) {}

 private:
  static void* stream_of(int device) {
    require(current_stream() != nullptr, "this build of torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(device, &stream));
    return stream;
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// Workspace is given back to torch's allocator at the end of the call: it hands the memory out
// again in the order of the stream only.
class TorchLauncher final : public TorchStream {
 public:
  explicit TorchLauncher(const Tensor& logits)
      : TorchStream(place_of(logits)), place_(place_of(logits)) {}

  void* allocate(size_t bytes) override {
    const int64_t size = static_cast<int64_t>(bytes / sizeof(double) + 1);
    tensors_.push_back(new_tensor({size}, ScalarType::Double, place_));
    return tensors_.back().mutable_data_ptr();
  }

 private:
  Place place_;
  std::vector<Tensor> tensors_;
};

}  // namespace disalign::cuda
