// The launcher of the operators: kernels on the current stream of the logits' device, workspace
// from torch's allocator. In tests/simt, the same over the host's execution model.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/kernels/launch.h"
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

inline void require_grid(const Shape& shape) {
  require(shape.grid_x < int64_t{1} << 31 && shape.grid_y < 65536, "more blocks than CUDA has");
}

// Workspace is given back to torch's allocator at the end of the call: it hands the memory out
// again in the order of the stream only.
class Workspace {
 public:
  explicit Workspace(Place place) : place_(place) {}

  void* allocate(size_t bytes) {
    const int64_t size = static_cast<int64_t>(bytes / sizeof(double) + 1);
    tensors_.push_back(new_tensor({size}, ScalarType::Double, place_));
    return tensors_.back().mutable_data_ptr();
  }

 private:
  Place place_;
  std::vector<Tensor> tensors_;
};

#if defined(DISALIGN_SIMT)

class TorchLauncher : public Workspace {
 public:
  explicit TorchLauncher(const Tensor& logits) : Workspace(place_of(logits)) {}

  // A small device: its few blocks go round their loops several times.
  Limits limits() const { return {2, 99 << 10, true}; }

  template <class Args>
  int blocks_per_multiprocessor(void (*)(Args), int, size_t) const {
    return 2;
  }

  template <class Args>
  int clusters(void (*)(Args), const Shape&) const {
    return 2;
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) {
    require_grid(shape);
    require(shape.shared_bytes <= limits().shared_bytes, "more shared memory than there is");
    ::simt::launch(
        dim3(shape.grid_x, shape.grid_y), dim3(shape.threads), shape.shared_bytes,
        [&] { kernel(args); }, dim3(1, shape.clustered ? shape.grid_y : 1));
  }
};

#else

// Kernels' attributes and occupancy do not change, and the runtime's answers cost as much as a
// launch: each question is asked once. Ask: a type of its own for every kind of question.
struct Question {
  const void* kernel;
  int device;
  int threads = 0;
  size_t shared_bytes = 0;
  int64_t grid_y = 1;

  bool operator<(const Question& other) const {
    return std::tie(kernel, device, threads, shared_bytes, grid_y) <
           std::tie(other.kernel, other.device, other.threads, other.shared_bytes, other.grid_y);
  }
};

template <class Ask>
int answer_of(const Question& question, Ask ask) {
  static std::mutex mutex;
  static std::map<Question, int> known;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(question);
    if (found != known.end()) return found->second;
  }
  const int answer = ask();  // two threads may ask at once, and get the same
  const std::lock_guard<std::mutex> lock(mutex);
  return known[question] = answer;
}

inline void require_cuda(cudaError_t status, const char* what) {
  require(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

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

class TorchLauncher : public Workspace {
 public:
  explicit TorchLauncher(const Tensor& logits) : TorchLauncher(place_of(logits)) {}

  Limits limits() const { return limits_; }

  template <class Args>
  int blocks_per_multiprocessor(void (*kernel)(Args), int threads, size_t shared_bytes) {
    return answer_of({address_of(kernel), device_, threads, shared_bytes}, [&] {
      allow_shared(kernel, shared_bytes);
      int blocks = 0;
      require_cuda(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
          "occupancy");
      return blocks;
    });
  }

  template <class Args>
  int clusters(void (*kernel)(Args), const Shape& shape) {
    const void* function = address_of(kernel);
    const Question question{function, device_, shape.threads, shape.shared_bytes, shape.grid_y};
    return answer_of(question, [&] {
      // Code for an older architecture, compiled anew for this device, has no clusters either.
      cudaFuncAttributes attributes;
      require_cuda(cudaFuncGetAttributes(&attributes, kernel), "function attributes");
      if (!limits_.has_clusters || attributes.ptxVersion < 90) return 0;
      Configuration configuration(shape, stream_);
      allow_shared(kernel, shape.shared_bytes);
      int clusters = 0;
      // An error: a cluster of this size does not fit.
      if (cudaOccupancyMaxActiveClusters(&clusters, function, &configuration.launch) !=
          cudaSuccess) {
        cudaGetLastError();
        return 0;
      }
      return clusters;
    });
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) {
    require_grid(shape);
    allow_shared(kernel, shape.shared_bytes);
    Configuration configuration(shape, stream_);
    void* arguments[] = {const_cast<Args*>(&args)};
    require_cuda(cudaLaunchKernelExC(&configuration.launch, address_of(kernel), arguments),
                 "launch");
  }

 private:
  template <class Args>
  static const void* address_of(void (*kernel)(Args)) {
    return reinterpret_cast<const void*>(kernel);
  }

  struct Configuration {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t launch = {};

    Configuration(const Shape& shape, cudaStream_t stream) {
      launch.gridDim =
          dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y));
      launch.blockDim = dim3(static_cast<unsigned>(shape.threads));
      launch.dynamicSmemBytes = shape.shared_bytes;
      launch.stream = stream;
      launch.attrs = &attribute;
      launch.numAttrs = shape.clustered ? 1 : 0;
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {1, static_cast<unsigned>(shape.grid_y), 1};
    }
    Configuration(const Configuration&) = delete;
  };

  explicit TorchLauncher(Place place)
      : Workspace(place), guard_(place.index), device_(place.index) {
    require(current_stream() != nullptr, "this build of torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(place.index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    limits_ = limits_of(place.index);
  }

  static Limits limits_of(int device) {
    static std::mutex mutex;
    static std::map<int, Limits> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    int multiprocessors = 0, shared = 0;
    require_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                 "device attribute");
    require_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                 "device attribute");
    int clusters = 0;
    require_cuda(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device),
                 "device attribute");
    return known[device] = {multiprocessors, static_cast<size_t>(shared), clusters != 0};
  }

  // More than 48 KiB must be asked for. All that there is, always: a thread that asked for less
  // would take it from another's launch.
  template <class Args>
  void allow_shared(void (*kernel)(Args), size_t bytes) const {
    if (bytes <= 48 << 10) return;
    answer_of({address_of(kernel), device_}, [&] {
      require_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(limits_.shared_bytes)),
                   "shared memory");
      return 0;
    });
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_ = nullptr;
  Limits limits_;
};

#endif

}  // namespace disalign::cuda
