// The row kernels: every position has its C logits next to each other.
#pragma once

#include "cpu/kernels/chunk.h"

namespace disalign {

constexpr int kRowBlock = 4;  // rows worked on together: they share each load of a class vector

// Bytes of Chunk::scratch for an arithmetic type of `size` bytes: a row's exponentials, and what its
// class probabilities weigh.
static constexpr int64_t row_scratch_bytes(const LossArgs& args, int64_t size) {
  return (args.probabilities ? 2 : 1) * kRowBlock * padded_classes(args.classes) * size;
}

namespace baseline {
const LossKernelTable& row_kernels();
}
namespace avx2 {
const LossKernelTable& row_kernels();
}
namespace avx512 {
const LossKernelTable& row_kernels();
}

}  // namespace disalign
