// The kernels' arguments: those of the operators, the division of the work, the workspace. Plain
// C++, so that what fills them in needs no CUDA compiler.
#pragma once

#include "cuda/kernels/launch.h"

namespace disalign::cuda {

// Shares of the denominator, where forward needs it before the loss: block_sums.cuh.
struct DivisorArgs : LossArgs {
  double* divisors = nullptr;  // [divisor_blocks]
  int32_t divisor_blocks = 0;
  unsigned* ticket = nullptr;  // blocks that are done, where the last one makes the loss
  // Whether prediction or entropy is wanted, of forward. A bool would be widened at each comparison.
  int32_t details = 0;
};

// row_tile.cuh
struct RowArgs : DivisorArgs {
  int32_t lanes = 0;         // threads of a group
  int32_t period = 1;        // rows this far apart are aligned alike: a power of two,
  int32_t period_bits = 0;   // of this exponent
  int32_t tiles = 1;         // of a row
  int32_t tile_vectors = 0;  // of a tile
  bool backward = false;     // row_warp_kernel.cuh: its gradients alone, for the upstream gradient
  // Workspace; blocks are those along grid_x.
  void* class_sums = nullptr;    // of A: [blocks][2: scale, bias][classes]
  double* block_sums = nullptr;  // [blocks][2: loss, denominator]
  void* tile_sums = nullptr;  // of A: [PositionSums::kValues][tiles][rows]; forward of many tiles
  void* tile_details = nullptr;  // of A: [RowDetails::kValues][tiles][rows]; the same, with details
  void* confidence_sums = nullptr;    // of A: [tiles][rows]; backward
  void* output = nullptr;             // calibrate, forward; contiguous
  const void* grad_output = nullptr;  // calibrate, backward: of the calibrated logits, contiguous
  void* target_logits = nullptr;      // of A: [rows]; backward that overwrites the logits
};

// dense_tile.cuh
struct DenseArgs : DivisorArgs {
  int32_t lanes = 1, slices = 1;  // powers of two; the first's exponent is:
  int32_t lane_bits = 0;  // of the threads that have neighbouring positions of a class, as exponent
  int32_t rounds = 1;     // classes of a thread that a stage has
  int32_t chunks = 1;     // stages of a tile
  int32_t last_positions = 0;    // of an image's last tile
  int32_t image_tiles = 0;       // tiles of an image
  bool backward = false;         // the gradients alone, for the upstream gradient
  bool table = false;            // whether the class vectors lie in shared memory,
  bool shared_sums = false;      // and the class sums
  int32_t probabilities_at = 0;  // SoftDenseMemory, with the following
  int32_t scratch_at = 0, table_at = 0, exchange_at = 0, positions_at = 0, class_sums_at = 0,
          target_z_at = 0, targets_at = 0;  // DenseMemory
  void* output = nullptr;                   // calibrate, forward; contiguous
  const void* grad_output = nullptr;  // calibrate, backward: of the calibrated logits, contiguous
  // Workspace.
  void* class_sums = nullptr;    // of A: [blocks][2: scale, bias][classes]
  void* thread_sums = nullptr;   // of ClassSum: [blocks][classes of a thread][threads]
  double* block_sums = nullptr;  // [blocks][2: loss, denominator]
};

// upsample_grid.cuh has the meaning of these.
struct Axis {
  int32_t in = 0, out = 0;
  int32_t* source = nullptr;  // [out]
  void* weight = nullptr;     // of A: [out]
  int32_t* first = nullptr;   // [in + 1]
};

struct UpsampleArgs : LossArgs {
  Axis y, x;
  bool align_corners = false;
  int64_t y_stride = 0, x_stride = 0;  // of the logits
  int64_t grad_y_stride = 0, grad_x_stride = 0;
  void* probability = nullptr;  // of A, one an output position: softmax of the target; or null
  // Tiles, see upsample_tile.cuh.
  int32_t bands = 1, warps_of_band = 1;
  int32_t tile_width = 0;                    // output columns
  int32_t tile_nodes = 0;                    // low-resolution columns around them, at most
  int32_t staged_vectors = 0;                // of classes, in shared memory at a time
  int64_t tiles_down = 0, tiles_across = 0;  // of an image
  double* block_sums = nullptr;              // [blocks][2: loss, denominator]
  // Backward.
  void* node_sums = nullptr;        // of A: [tiles][class vectors][bands + 1][tile_nodes][kVector]
  void* class_sums = nullptr;       // of A: [blocks][2: scale, bias][classes]
  void* confidence_sums = nullptr;  // of A: [chunks of classes][low-resolution positions]

  DISALIGN_METHOD int64_t tiles() const { return outer * tiles_down * tiles_across; }
  DISALIGN_METHOD int64_t low_positions() const { return outer * y.in * x.in; }
};

// finish_kernel.cuh
struct FinishArgs : DivisorArgs {
  bool forward = false;  // loss and denominator are wanted
  // [blocks][2: loss, denominator]; null for 'none'. The denominator is theirs without divisors.
  const double* block_sums = nullptr;
  int64_t blocks = 0;
  const void* class_sums = nullptr;  // of A: [class_blocks][2: scale, bias][classes]
  int64_t class_blocks = 0;
  int64_t class_grid = 0;                 // blocks of this launch that go over classes
  const void* confidence_sums = nullptr;  // of A: [tiles][confidences]; null: grad_confidence holds
                                          // the one tile, to be divided
  int64_t tiles = 0;
  int64_t confidences = 0;
};

}  // namespace disalign::cuda
