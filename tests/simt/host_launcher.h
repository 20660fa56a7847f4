// The launcher of csrc/cuda/launch/launcher.h over the host's execution model. No torch: memory comes
// from who derives.
#pragma once

#include <algorithm>

namespace disalign::cuda {

class Launcher {
 public:
  // A small device: its few blocks go round their loops several times.
  explicit Launcher(Limits limits = {2, 99 << 10, true}) : limits_(limits) {}

  virtual void* allocate(size_t bytes) = 0;

  Limits limits() const { return limits_; }

  template <class Args>
  int blocks_per_multiprocessor(void (*)(Args), int, size_t) const {
    return 2;
  }

  template <class Args>
  int clusters(void (*)(Args), const Shape& shape) const {
    const int all = 2 * limits_.multiprocessors / static_cast<int>(shape.grid_y);
    return limits_.has_clusters ? std::max(2, all) : 0;
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) {
    require_grid(shape);
    require_launch(shape.shared_bytes <= limits_.shared_bytes, "more shared memory than there is");
    ::simt::launch(
        dim3(shape.grid_x, shape.grid_y), dim3(shape.threads), shape.shared_bytes,
        [&] { kernel(args); }, dim3(1, shape.clustered ? shape.grid_y : 1));
  }

 protected:
  ~Launcher() = default;

 private:
  Limits limits_;
};

}  // namespace disalign::cuda
