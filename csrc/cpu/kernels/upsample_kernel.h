// The upsampling kernels: the loss at the target's size (N, H, W) of logits (N, C, h, w) that are
// calibrated, then interpolated bilinearly, a few positions at a time. A unit of work is a row of
// the low-resolution logits: the output rows whose upper neighbour it is.
#pragma once

#include "cpu/kernels/chunk.h"

namespace disalign {

// Bilinear interpolation along one axis: output i lies between source[i] and the one after it,
// `weight[i]` of the way. At the end of the axis the weight is 0 and there may be none after it.
struct Axis {
  int64_t in = 0, out = 0;
  const int64_t* source = nullptr;  // ascending
  const double* weight = nullptr;
};

struct UpsampleArgs : LossArgs {
  Axis y, x;
  bool align_corners = false;
  const int64_t* first_row = nullptr;  // of each low-resolution row: its outputs are
                                       // [first_row[r], first_row[r + 1])
  int64_t y_stride = 0, x_stride = 0;  // of the logits; outer_stride and class_stride as ever
  int64_t grad_y_stride = 0, grad_x_stride = 0;
  bool gradients = false;  // whether any is wanted

  void* probability = nullptr;  // of A, one a position: softmax of the target; or null

  int64_t padded() const { return padded_classes(classes); }
  int64_t row_values() const { return x.in * padded(); }  // of a low-resolution row, classes inmost
};

constexpr int kStrip = 16;        // output positions worked on together
constexpr int kUpsampleRows = 8;  // low-resolution rows in scratch, see UpsampleScratch
constexpr int kStripBytes = 192;  // of a position's entries in all vectors, at most

static inline int64_t upsample_strips(const LossArgs& args) { return args.probabilities ? 2 : 1; }

static inline int64_t upsample_scratch_bytes(const UpsampleArgs& args, int64_t size) {
  return (kUpsampleRows * args.row_values() + upsample_strips(args) * kStrip * args.padded() +
          2 * padded(args.x.in)) *
             size +
         kStrip * kStripBytes;
}

struct UpsampleKernels {
  void (*forward)(const UpsampleArgs&, Chunk&);
  void (*backward)(const UpsampleArgs&, Chunk&);
  // The row that two neighbouring chunks share, after both are done.
  void (*join)(const UpsampleArgs&, const Chunk& before, Chunk& after);
  void (*predict)(const UpsampleArgs&, Chunk&);  // prediction alone, without a target
};
using UpsampleKernelTable = KernelTable<UpsampleKernels>;

namespace baseline {
const UpsampleKernelTable& upsample_kernels();
}
namespace avx2 {
const UpsampleKernelTable& upsample_kernels();
}
namespace avx512 {
const UpsampleKernelTable& upsample_kernels();
}

}  // namespace disalign
