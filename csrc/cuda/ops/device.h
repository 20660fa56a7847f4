// A GPU as ops/loss_op.h wants a device: it hands the arguments on to the launch functions of
// cuda/launch. tests/simt registers the same operators for the CPU, under another name.
#pragma once

#include "cuda/ops/torch_launcher.h"
#include "ops/loss_op.h"

#if !defined(DISALIGN_CUDA_KEY)
#define DISALIGN_CUDA_LIBRARY disalign_ops
#define DISALIGN_CUDA_KEY CUDA
#endif

namespace disalign::cuda {

class Cuda {
 public:
  static constexpr bool kWritesStatistics = true;  // its kernels read them

  explicit Cuda(const Tensor& logits) : launcher_(logits), dtype_(dtype_of(logits)) {}

  template <class Operator>
  void forward(const Tensor&, const typename Operator::Args& args) {
    require_classes(args);
    Operator::forward(launcher_, dtype_, args);
  }

  template <class Operator>
  void backward(const Tensor&, const typename Operator::Args& args) {
    require_classes(args);
    Operator::backward(launcher_, dtype_, args);
  }

  template <class Operator>
  void predict(const Tensor&, const typename Operator::Args& args) {
    require_classes(args);
    Operator::forward(launcher_, dtype_, args);
  }

  template <class Operator>
  void calibrate(const Tensor&, const typename Operator::Args& args) {
    require_classes(args);
    if (args.output)
      Operator::forward(launcher_, dtype_, args);
    else
      Operator::backward(launcher_, dtype_, args);
  }

 private:
  static void require_classes(const LossArgs& args) {
    require(args.classes <= int64_t{1} << 27, "more than 2^27 classes");  // of tiles in a grid
  }

  TorchLauncher launcher_;
  Dtype dtype_;
};

}  // namespace disalign::cuda
