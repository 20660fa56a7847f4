// What the row launcher (row.cpp) and the kernels (row_kernel.cpp, once per instruction set) share:
// plain pointers, no torch, so that the kernels' translation units pull in nothing that a linker
// could merge across instruction sets.
//
// A row is one position of the batch with its C logits next to each other in memory.
// A is the arithmetic: double for float64 logits, float for all others. Class vectors have C
// entries of A; row vectors have N.
#pragma once

#include <cstdint>

namespace disalign {

enum class IndexType : int { kUInt8, kInt16, kInt32, kInt64 };

struct RowArgs {
  const void* logits = nullptr;
  int64_t row_stride = 0;  // in elements; 0 for an expanded row
  int64_t rows = 0;
  int64_t classes = 0;

  const void* target = nullptr;
  IndexType target_type = IndexType::kInt64;
  int64_t ignore_index = -100;

  // Class vectors of A; null where not given. scale is a of the formulas, bias is b.
  const void* weight = nullptr;
  const void* scale = nullptr;
  const void* bias = nullptr;
  const void* prior = nullptr;
  const void* margin = nullptr;
  // Row vectors of A. confidence (before the sigmoid) is given exactly when scale and bias are.
  const void* confidence = nullptr;
  const void* sample_weight = nullptr;

  double label_smoothing = 0;
  double focal_gamma = 0;
  double weight_sum = 0;           // sum_j w_j; C without weights
  double inverse_denominator = 1;  // what reduction multiplies the summed loss by

  // Row statistics of A: the maximum of the calibrated logits and sum_j exp(u_j - max). Written by
  // forward, read by backward.
  void* row_max = nullptr;
  void* row_sum = nullptr;
  void* loss = nullptr;  // forward: the row's loss times its sample weight, of A; or null

  // backward: dL/dloss of A, one a row (stride 1) or one for all (stride 0). null: 1.
  const void* upstream = nullptr;
  int64_t upstream_stride = 0;

  // Gradients wanted; null where not. grad_logits has rows next to each other, or is the logits.
  void* grad_logits = nullptr;
  int64_t grad_row_stride = 0;
  void* grad_confidence = nullptr;  // of A
  bool class_gradients = false;     // of scale and bias, into Chunk
};

// One thread's share of the rows. scratch: scratch_bytes(); the class gradients are sums over
// the chunk's rows in double, padded_classes(C) entries each, cleared by the kernel.
struct Chunk {
  int64_t begin = 0;
  int64_t end = 0;
  void* scratch = nullptr;
  double* grad_scale = nullptr;
  double* grad_bias = nullptr;
  double loss_sum = 0;
};

// Classes rounded up so that every class buffer of ours can be read and written in full registers.
static constexpr int64_t padded_classes(int64_t classes) { return (classes + 15) / 16 * 16; }

constexpr int kRowBlock = 4;  // rows worked on together: they share each load of a class vector

// Bytes of Chunk::scratch for an arithmetic type of `size` bytes.
static constexpr int64_t scratch_bytes(int64_t classes, int64_t size) {
  return kRowBlock * padded_classes(classes) * size;
}

// Kernels of one storage dtype.
struct RowKernels {
  void (*forward)(const RowArgs&, Chunk&);
  void (*backward)(const RowArgs&, Chunk&);
};

// One Kernels a storage dtype.
template <class Kernels>
struct KernelTable {
  Kernels float64, float32, bfloat16, float16;
};
using RowKernelTable = KernelTable<RowKernels>;

namespace baseline {
const RowKernelTable& row_kernels();
}
namespace avx2 {
const RowKernelTable& row_kernels();
}
namespace avx512 {
const RowKernelTable& row_kernels();
}

static inline int64_t read_index(const void* p, IndexType type, int64_t i) {
  switch (type) {
    case IndexType::kUInt8:
      return static_cast<const uint8_t*>(p)[i];
    case IndexType::kInt16:
      return static_cast<const int16_t*>(p)[i];
    case IndexType::kInt32:
      return static_cast<const int32_t*>(p)[i];
    default:
      return static_cast<const int64_t*>(p)[i];
  }
}

}  // namespace disalign
