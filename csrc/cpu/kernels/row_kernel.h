// The row kernels: every position has its C logits next to each other.
#pragma once

#include "cpu/kernels/chunk.h"

namespace disalign {

constexpr int kRowBlock = 4;  // rows worked on together: they share each load of a class vector

// Bytes of Chunk::scratch for an arithmetic type of `size` bytes.
static constexpr int64_t row_scratch_bytes(int64_t classes, int64_t size) {
  return kRowBlock * padded_classes(classes) * size;
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
