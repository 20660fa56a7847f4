// The partition of work over threads: our own, since at::parallel_for's depends on nesting, and the
// order in which partial sums are added must depend on the number of threads alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "cpu/kernels/chunk.h"
#include "ops/arguments.h"

namespace disalign {

constexpr int64_t kLogitsPerThread = 16384;  // below about this many a second thread costs more
constexpr int64_t kSmallBuffer = 512;        // doubles: a tensor would cost more than the work

// Memory of a cache line's alignment, as tensors have it.
class SmallBuffer {
 public:
  explicit SmallBuffer(int64_t doubles)
      : memory_(::operator new(doubles * sizeof(double), kAlignment)) {}
  double* data() const { return static_cast<double*>(memory_.get()); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
};

// Chunks of work with their scratch; buffers are tensors, so that torch's memory accounting
// (profiler, memory limits) sees all that we allocate but for a few KiB.
class Partition {
 public:
  // units: of work, split over threads; logits: how many there are in all of them.
  Partition(int64_t units, int64_t logits, int64_t classes, int64_t scratch_bytes_each,
            bool class_gradients)
      : classes_(classes) {
    const int64_t work = logits / kLogitsPerThread;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t count = std::max<int64_t>(1, std::min({threads, work, units}));
    const int64_t vector = padded_classes(classes_);
    const int64_t scratch_doubles = (scratch_bytes_each + 63) / 64 * 8;
    const int64_t each = scratch_doubles + (class_gradients ? 2 * vector : 0);
    if (count * each <= kSmallBuffer && !poisons())
      small_.emplace(count * each);
    else
      buffer_ = new_tensor({count * each}, ScalarType::Double);
    double* base = small_ ? small_->data() : static_cast<double*>(buffer_->mutable_data_ptr());
    chunks_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      Chunk chunk;
      chunk.begin = units * i / count;
      chunk.end = units * (i + 1) / count;
      chunk.scratch = base + i * each;
      if (class_gradients) {
        chunk.grad_scale = base + i * each + scratch_doubles;
        chunk.grad_bias = chunk.grad_scale + vector;
      }
      chunks_.push_back(chunk);
    }
  }

  template <class Work>
  void run(Work work) {
    if (chunks_.size() == 1) return work(chunks_[0]);
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks_.size()), 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) work(chunks_[i]);
                                });
  }

  // Calls body(before, after) for every two neighbouring chunks, in their order.
  template <class Body>
  void for_neighbours(Body body) {
    for (size_t i = 1; i < chunks_.size(); ++i) body(chunks_[i - 1], chunks_[i]);
  }

  double loss_sum() const {
    double sum = 0;
    for (const Chunk& chunk : chunks_) sum += chunk.loss_sum;
    return sum;
  }

  // out[j] = the chunks' sums, added in their order.
  void reduce_classes(double* Chunk::* gradient, void* out, ScalarType dtype) const {
    if (dtype == ScalarType::Double)
      reduce(gradient, static_cast<double*>(out));
    else
      reduce(gradient, static_cast<float*>(out));
  }

 private:
  template <class A>
  void reduce(double* Chunk::* gradient, A* out) const {
    for (int64_t j = 0; j < classes_; ++j) {
      double sum = 0;
      for (const Chunk& chunk : chunks_) sum += (chunk.*gradient)[j];
      out[j] = static_cast<A>(sum);
    }
  }

  int64_t classes_;
  std::optional<SmallBuffer> small_;
  OptionalTensor buffer_;
  std::vector<Chunk> chunks_;
};

}  // namespace disalign
