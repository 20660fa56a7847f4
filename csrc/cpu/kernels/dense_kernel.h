// The dense kernels: the positions of a class plane lie next to each other, as in contiguous
// (N, C, H, W). A unit of work is a tile: some neighbouring positions of an image, all classes.
#pragma once

#include "cpu/kernels/chunk.h"

namespace disalign {

// Scratch of a tile that stays in the second-level cache beside what streams through it.
constexpr int64_t kDenseTileBytes = 256 << 10;
constexpr int64_t kDenseTilePositions = 1024;  // more gain nothing: runs of whole pages

static constexpr int64_t dense_planes(const LossArgs& args) {
  // u or e; the logits, for the gradients of the calibration; what class probabilities weigh.
  return 1 + (args.confidence != nullptr) + (args.probabilities != nullptr);
}

// Positions of a tile, a multiple of 16, for an arithmetic type of `size` bytes.
static constexpr int64_t dense_tile(const LossArgs& args, int64_t size) {
  const int64_t fitting = kDenseTileBytes / (args.classes * dense_planes(args) * size) / 16 * 16;
  const int64_t most = fitting < 16                    ? 16
                       : fitting > kDenseTilePositions ? kDenseTilePositions
                                                       : fitting;
  const int64_t tiles = (args.inner + most - 1) / most;
  return tiles == 0 ? 16 : padded((args.inner + tiles - 1) / tiles);  // tiles of about one size
}

static constexpr int64_t dense_tiles(const LossArgs& args, int64_t size) {
  const int64_t tile = dense_tile(args, size);
  return (args.inner + tile - 1) / tile;  // of an image
}

// Bytes of a position's entries in all vectors of Tile, at most.
constexpr int64_t kDensePositionBytes = 192;

static constexpr int64_t dense_scratch_bytes(const LossArgs& args, int64_t size) {
  return dense_tile(args, size) * (args.classes * dense_planes(args) * size + kDensePositionBytes);
}

namespace baseline {
const LossKernelTable& dense_kernels();
}
namespace avx2 {
const LossKernelTable& dense_kernels();
}
namespace avx512 {
const LossKernelTable& dense_kernels();
}

}  // namespace disalign
