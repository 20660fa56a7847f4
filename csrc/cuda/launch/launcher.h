// The launcher of the operators (launch.h has the interface): kernels on a stream of a device, by
// CUDA's runtime alone. In tests/simt, the same over the host's execution model. No torch: memory
// comes from who derives.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/kernels/arguments.h"

namespace disalign::cuda {

inline void require_launch(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("disalign_ops: ") + message);
}

inline void require_grid(const Shape& shape) {
  require_launch(shape.grid_x < int64_t{1} << 31 && shape.grid_y < 65536,
                 "more blocks than CUDA has");
}

#if defined(DISALIGN_SIMT)

}  // namespace disalign::cuda

#include "host_launcher.h"

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
  if (status != cudaSuccess)
    require_launch(false, (std::string(what) + ": " + cudaGetErrorString(status)).c_str());
}

class Launcher {
 public:
  virtual void* allocate(size_t bytes) = 0;

  Limits limits() const { return limits_; }

  template <class Args>
  int blocks_per_multiprocessor(void (*kernel)(Args), int threads, size_t shared_bytes) {
    const void* function = reinterpret_cast<const void*>(kernel);
    return answer_of({function, device_, threads, shared_bytes}, [&] {
      allow_shared(function, shared_bytes);
      int blocks = 0;
      require_cuda(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes),
          "occupancy");
      return blocks;
    });
  }

  template <class Args>
  int clusters(void (*kernel)(Args), const Shape& shape) {
    return clusters(reinterpret_cast<const void*>(kernel), shape);
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) {
    void* arguments[] = {const_cast<Args*>(&args)};
    launch(reinterpret_cast<const void*>(kernel), shape, arguments);
  }

 protected:
  // On the device that is current as long as this launcher is used.
  Launcher(int device, void* stream)
      : device_(device), stream_(static_cast<cudaStream_t>(stream)), limits_(limits_of(device)) {}
  ~Launcher() = default;

 private:
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

  int clusters(const void* function, const Shape& shape) {
    const Question question{function, device_, shape.threads, shape.shared_bytes, shape.grid_y};
    return answer_of(question, [&] {
      // Code for an older architecture, compiled anew for this device, has no clusters either.
      cudaFuncAttributes attributes;
      require_cuda(cudaFuncGetAttributes(&attributes, function), "function attributes");
      if (!limits_.has_clusters || attributes.ptxVersion < 90) return 0;
      Configuration configuration(shape, stream_);
      allow_shared(function, shape.shared_bytes);
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

  void launch(const void* function, const Shape& shape, void** arguments) {
    require_grid(shape);
    allow_shared(function, shape.shared_bytes);
    Configuration configuration(shape, stream_);
    require_cuda(cudaLaunchKernelExC(&configuration.launch, function, arguments), "launch");
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
  void allow_shared(const void* function, size_t bytes) const {
    if (bytes <= 48 << 10) return;
    answer_of({function, device_}, [&] {
      require_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(limits_.shared_bytes)),
                   "shared memory");
      return 0;
    });
  }

  int device_;
  cudaStream_t stream_;
  Limits limits_;
};

}  // namespace disalign::cuda

#endif
