// The CPU as ops/loss_op.h wants a device: what kernels of a GPU find out themselves (targets that
// are no class, sums of weights, the denominator) is done here, then threads run the kernels.
#pragma once

#include <algorithm>
#include <string>

#include "common/mean.h"
#include "cpu/ops/capability.h"
#include "cpu/ops/huge_pages.h"
#include "cpu/ops/partition.h"
#include "ops/loss_op.h"

namespace disalign {

class Cpu {
 public:
  static constexpr bool kWritesStatistics = false;  // unless wanted

  explicit Cpu(const Tensor& logits) : dtype_(accumulate_dtype(logits.scalar_type())) {}

  template <class Operator, class Args>
  void forward(const Tensor& logits, Args& args) {
    prepare(logits, args);
    const double denominator = args.reduction == kReduceMean ? denominator_of(args) : 1.0;
    divide_by(denominator, args);
    if (args.denominator) *args.denominator = denominator;
    const Partition partition = Operator::run_forward(logits, args);
    reduce_classes(partition, args);
    if (args.reduced_loss == nullptr) return;
    const double sum = partition.loss_sum();
    write(args.reduced_loss, args.reduction == kReduceMean
                                 ? mean_of(sum, denominator, args.normalizer == kByWeights)
                                 : sum);
  }

  template <class Operator, class Args>
  void backward(const Tensor& logits, Args& args) {
    if (args.gradient_made && read(args.upstream, 0) == 1) args.grad_logits = nullptr;
    prepare(logits, args);
    if (args.denominator) divide_by(*args.denominator, args);
    reduce_classes(Operator::run_backward(logits, args), args);
  }

  template <class Operator>
  void predict(const Tensor& logits, typename Operator::Args& args) {
    Operator::run_predict(logits, args);
  }

  // Forward where args has an output, else backward.
  template <class Operator>
  void calibrate(const Tensor& logits, typename Operator::Args& args) {
    void* written = args.output ? args.output : args.grad_logits;
    advise(written, logits, args);
    const auto& kernels = kernels_for(Operator::table(), logits.scalar_type());
    Partition partition(Operator::units(args), logits.numel(), args.classes, Operator::kScratch,
                        args.class_gradients);
    const auto kernel = args.output ? kernels.forward : kernels.backward;
    partition.run([&](Chunk& chunk) { kernel(args, chunk); });
    reduce_classes(partition, args);
  }

 private:
  // written: what lies as the gradient of the logits does, or null.
  template <class Args>
  static void advise(void* written, const Tensor& logits, const Args& args) {
    if (written)
      advise_huge_pages(written, args.outer * args.grad_outer_stride * logits.element_size());
  }

  template <class Args>
  void reduce_classes(const Partition& partition, const Args& args) const {
    if (args.grad_scale) partition.reduce_classes(&Chunk::grad_scale, args.grad_scale, dtype_);
    if (args.grad_bias) partition.reduce_classes(&Chunk::grad_bias, args.grad_bias, dtype_);
  }

  double read(const void* p, int64_t i) const {
    return dtype_ == ScalarType::Double ? static_cast<const double*>(p)[i]
                                        : static_cast<const float*>(p)[i];
  }

  void write(void* p, double value) const {
    if (dtype_ == ScalarType::Double)
      *static_cast<double*>(p) = value;
    else
      *static_cast<float*>(p) = static_cast<float>(value);
  }

  void prepare(const Tensor& logits, LossArgs& args) {
    if (args.grad_logits != args.logits) advise(args.grad_logits, logits, args);
    args.weight_sum = static_cast<double>(args.classes);
    if (args.probabilities) return;
    if (args.label_smoothing > 0) {
      if (args.weight == nullptr) {
        args.weight = new_ones(args.classes);
      } else {
        args.weight_sum = 0;
        for (int64_t j = 0; j < args.classes; ++j) args.weight_sum += read(args.weight, j);
      }
    }
    check_target(args);
  }

  // They stand in for absent weights where smoothing sums over them.
  const void* new_ones(int64_t count) {
    ones_ = new_tensor({count}, dtype_);
    void* data = ones_->mutable_data_ptr();
    if (dtype_ == ScalarType::Double)
      std::fill_n(static_cast<double*>(data), count, 1.0);
    else
      std::fill_n(static_cast<float*>(data), count, 1.0f);
    return data;
  }

  static void check_target(const LossArgs& args) {
    const int64_t lowest = args.shard_sums || args.shard_factors ? kElsewhere : 0;
    for (int64_t i = 0; i < args.positions(); ++i) {
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index || (t >= lowest && t < args.classes)) continue;
      // _ops/autograd.py turns this prefix into Python's IndexError, which the stable ABI cannot
      // throw, and the position into indices.
      throw std::runtime_error("IndexError: Target " + std::to_string(t) +
                               " is out of bounds: target[" + std::to_string(i) +
                               "], the logits have " + std::to_string(args.classes) +
                               " classes and ignore_index is " + std::to_string(args.ignore_index));
    }
  }

  double denominator_of(const LossArgs& args) const {
    if (args.normalizer == kByGiven) return *args.given_denominator;
    const bool every = args.probabilities && (args.normalizer == kByValid || !args.sample_weight);
    if (args.normalizer == kByCount || every) return static_cast<double>(args.positions());
    double sum = 0;
    for (int64_t i = 0; i < args.positions(); ++i) {
      if (args.probabilities) {  // they have no weight of their own
        sum += read(args.sample_weight, i);
        continue;
      }
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index) continue;
      if (args.normalizer == kByValid) {
        sum += 1;
        continue;
      }
      const double w = args.weight ? read(args.weight, t) : 1.0;
      sum += args.sample_weight ? w * read(args.sample_weight, i) : w;
    }
    return sum;
  }

  static void divide_by(double denominator, LossArgs& args) {
    args.inverse_denominator = denominator == 0 ? 0.0 : 1.0 / denominator;
  }

  ScalarType dtype_;
  OptionalTensor ones_;
};

// Rows and class planes on the CPU; Kernels says what units of work there are, how much scratch
// each thread has, and which table has the kernels.
template <class OfLayout, class Kernels>
struct CpuOperator {
  using Layout = OfLayout;
  using Args = LossArgs;
  using Device = Cpu;
  static constexpr int64_t kWantedOfForward = kWantLogits | kWantScale | kWantBias |
                                              kWantConfidence | kWantDetails | kWantPrediction |
                                              kWantEntropy;
  static constexpr int64_t kWantedOfShard = kWantPrediction | kWantEntropy;

  static Partition run_forward(const Tensor& logits, const LossArgs& args) {
    return run(logits, args, &LossKernels::forward);
  }

  static Partition run_backward(const Tensor& logits, const LossArgs& args) {
    return run(logits, args, &LossKernels::backward);
  }

 private:
  using Kernel = void (*LossKernels::*)(const LossArgs&, Chunk&);

  static Partition run(const Tensor& logits, const LossArgs& args, Kernel kernel) {
    const int64_t size = size_of(accumulate_dtype(logits.scalar_type()));
    Partition partition(Kernels::units(args, size), logits.numel(), args.classes,
                        Kernels::scratch_bytes(args, size), args.class_gradients);
    const LossKernels& kernels = kernels_for(Kernels::table(), logits.scalar_type());
    partition.run([&](Chunk& chunk) { (kernels.*kernel)(args, chunk); });
    return partition;
  }
};

}  // namespace disalign
