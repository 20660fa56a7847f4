// Dense kernels: calibrated softmax cross-entropy over class planes, forward and backward.
//
// - Maps: a tile of positions at a time, class by class, positions in registers; what belongs to a
//   class is one number, what belongs to a position a vector in the first-level cache. The tile's
//   planes stay in the second-level cache. They are scratch of its own: planes of (N, C, H, W) lie
//   a power of two apart, so that a tile read twice from there would evict itself.
// - forward: load (u to scratch, its maximum), exponentiate, then the scalars of each position, and
//   emit makes whatever gradients are wanted. Memory: the logits are read once, grad_logits written
//   once.
// - backward: the same with the maximum and the sum that forward found; grad_logits may be the
//   logits, which only load reads.
// - The target's entry is patched in scratch between exponentiate and emit, as in row_kernel.cpp.
#include "dense_kernel.h"

#include "../common/loss_math.h"
#include "dense_passes.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

// What is known of the positions before their logits are read. False: all of them are ignored.
template <class T>
bool prepare(const LossArgs& args, Tile<T>& tile) {
  using A = Accumulate<T>;
  int64_t valid = 0;
  for (int64_t p = 0; p < tile.size; ++p) {
    const bool counts = p < tile.count && read_index(args.target, args.target_type,
                                                     tile.first + p) != args.ignore_index;
    tile.valid[p] = counts ? A(1) : A(0);
    tile.c[p] = counts && args.confidence
                    ? static_cast<A>(sigmoid(read_or<A>(args.confidence, tile.first + p, 0)))
                    : A(0);
    valid += counts;
  }
  tile.all_valid = valid == tile.size;
  return valid > 0;
}

// The ignored positions' results: 0, without looking at their logits.
template <class T>
void skip(const LossArgs& args, bool backward, const Tile<T>& tile, int64_t p) {
  using A = Accumulate<T>;
  const int64_t i = tile.first + p;
  if (!backward) {
    if (args.loss) static_cast<A*>(args.loss)[i] = A(0);
    static_cast<A*>(args.row_max)[i] = A(0);
    static_cast<A*>(args.row_sum)[i] = A(1);
  }
  if (args.grad_confidence) static_cast<A*>(args.grad_confidence)[i] = A(0);
}

// Takes the target's margin off u_t, where the maximum may change with it.
template <class T>
void apply_margin(const LossArgs& args, const Tile<T>& tile, int64_t p, int64_t t) {
  using A = Accumulate<T>;
  A& u = tile.e[t * tile.size + p];
  const A before = u;
  u -= static_cast<const A*>(args.margin)[t];
  A& maximum = tile.maximum[p];
  if (u > maximum) {
    maximum = u;
  } else if (before == maximum) {
    maximum = -std::numeric_limits<A>::max();
    for (int64_t j = 0; j < tile.classes; ++j) {
      const A other = tile.e[j * tile.size + p];
      maximum = other > maximum ? other : maximum;
    }
  }
}

// The target's logit and slope, before exponentiate overwrites u.
template <class T>
void read_targets(const LossArgs& args, bool backward, const Tile<T>& tile) {
  using A = Accumulate<T>;
  for (int64_t p = 0; p < tile.size; ++p) {
    tile.target_logit[p] = tile.target_slope[p] = A(0);
    if (tile.valid[p] == A(0)) {
      tile.maximum[p] = A(0);
      continue;
    }
    const int64_t t = read_index(args.target, args.target_type, tile.first + p);
    if (args.margin) apply_margin(args, tile, p, t);
    if (backward) tile.maximum[p] = static_cast<const A*>(args.row_max)[tile.first + p];
    tile.target_logit[p] = tile.e[t * tile.size + p];
    if (tile.logits) {
      const ClassEntry<A> entry(args, t);
      const A d = tile.logits[t * tile.size + p] * entry.a + entry.b;
      tile.target_slope[p] = d * A(0) == A(0) ? d : A(0);
    }
  }
}

// Sums over all classes, a segment at a time.
template <class T, bool Slope, bool Smooth>
void exponentiate_all(const LossArgs& args, const Tile<T>& tile) {
  using A = Accumulate<T>;
  for (double* total : tile.total) std::memset(total, 0, tile.size * sizeof(double));
  for_segments(tile.classes, [&](int64_t begin, int64_t end) {
    for (A* sum : tile.sum) std::memset(sum, 0, tile.size * sizeof(A));
    exponentiate<T, Slope, Smooth>(args, tile, begin, end);
    for (int k = 0; k < kSums; ++k)
      for (int64_t p = 0; p < tile.size; ++p)
        tile.total[k][p] += static_cast<double>(tile.sum[k][p]);
  });
}

// Loss, statistics and the factors of the gradients of every position.
template <class T>
void finish_positions(const LossArgs& args, bool backward, const Tile<T>& tile, Chunk& chunk) {
  using A = Accumulate<T>;
  for (int64_t p = 0; p < tile.size; ++p) {
    tile.softmax[p] = tile.smooth[p] = A(0);
    if (tile.valid[p] == A(0)) {
      if (p < tile.count) skip(args, backward, tile, p);
      continue;
    }
    const int64_t i = tile.first + p;
    const int64_t t = read_index(args.target, args.target_type, i);
    const double sum = backward ? read_or<A>(args.row_sum, i, 0) : tile.total[kExponential][p];
    const double log_sum = std::log(sum);
    const double maximum = tile.maximum[p];
    const RowTerms terms =
        row_terms((maximum - tile.target_logit[p]) + log_sum, log_sum,
                  read_or<A>(args.weight, t, 1.0), args.label_smoothing, args.weight_sum,
                  tile.total[kSmooth][p], static_cast<double>(tile.classes), args.focal_gamma);
    const double sample_weight = read_or<A>(args.sample_weight, i, 1.0);
    if (!backward) {
      const double loss = terms.loss * sample_weight;
      chunk.loss_sum += loss;
      if (args.loss) static_cast<A*>(args.loss)[i] = static_cast<A>(loss);
      static_cast<A*>(args.row_max)[i] = tile.maximum[p];
      static_cast<A*>(args.row_sum)[i] = static_cast<A>(sum);
    }
    // A denominator of 0 means that nothing is left: every gradient is 0, whatever stands above.
    const double g = args.inverse_denominator == 0
                         ? 0.0
                         : read_or<A>(args.upstream, i * args.upstream_stride, 1.0) *
                               sample_weight * args.inverse_denominator;
    tile.softmax[p] = static_cast<A>(g * terms.softmax / sum);
    tile.smooth[p] = static_cast<A>(g * terms.smooth);
    if (args.grad_confidence) {
      const double c = tile.c[p];
      const double slope_sum = terms.softmax * tile.total[kSoftmaxSlope][p] / sum -
                               terms.smooth * tile.total[kSmoothSlope][p];
      static_cast<A*>(args.grad_confidence)[i] = static_cast<A>(g * c * (1 - c) * slope_sum);
    }
    if (terms.softmax != 0) {
      A& e = tile.e[t * tile.size + p];
      e = static_cast<A>(static_cast<double>(e) - sum * terms.target / terms.softmax);
    }
  }
}

template <class T, bool Calibrated, bool Smooth>
void run_tile(const LossArgs& args, bool backward, const Tile<T>& tile, Chunk& chunk) {
  if (tile.all_valid)
    load<T, Calibrated, true>(args, tile);
  else
    load<T, Calibrated, false>(args, tile);
  read_targets(args, backward, tile);
  if (Calibrated && args.grad_confidence)
    exponentiate_all<T, Calibrated, Smooth>(args, tile);
  else
    exponentiate_all<T, false, Smooth>(args, tile);
  finish_positions(args, backward, tile, chunk);
  if constexpr (Calibrated) {
    if (args.class_gradients && args.grad_logits)
      return emit<T, true, Smooth, true, true>(args, tile, chunk);
    if (args.class_gradients) return emit<T, true, Smooth, false, true>(args, tile, chunk);
  }
  if (args.grad_logits) emit<T, Calibrated, Smooth, true, false>(args, tile, chunk);
}

template <class T>
void ignore_tile(const LossArgs& args, bool backward, const Tile<T>& tile) {
  for (int64_t p = 0; p < tile.count; ++p) skip(args, backward, tile, p);
  if (!args.grad_logits) return;
  for (int64_t j = 0; j < tile.classes; ++j)
    std::memset(tile.grad_logits + j * args.grad_class_stride, 0, tile.count * sizeof(T));
}

template <class T>
void run_chunk(const LossArgs& args, bool backward, Chunk& chunk) {
  if (args.class_gradients) clear_class_sums(chunk, args.classes);
  chunk.loss_sum = 0;
  Tile<T> tile(args, chunk.scratch);
  const int64_t tiles = dense_tiles(args, sizeof(Accumulate<T>));
  for (int64_t unit = chunk.begin; unit < chunk.end; ++unit) {
    const int64_t image = unit / tiles, begin = unit % tiles * tile.size;
    tile.first = image * args.inner + begin;
    tile.count = args.inner - begin < tile.size ? args.inner - begin : tile.size;
    tile.z = static_cast<const T*>(args.logits) + image * args.image_stride + begin;
    tile.grad_logits = static_cast<T*>(args.grad_logits) + image * args.grad_image_stride + begin;
    const bool smooth = args.label_smoothing > 0;
    if (!prepare(args, tile))
      ignore_tile(args, backward, tile);
    else if (args.confidence && smooth)
      run_tile<T, true, true>(args, backward, tile, chunk);
    else if (args.confidence)
      run_tile<T, true, false>(args, backward, tile, chunk);
    else if (smooth)
      run_tile<T, false, true>(args, backward, tile, chunk);
    else
      run_tile<T, false, false>(args, backward, tile, chunk);
  }
}

template <class T>
void forward(const LossArgs& args, Chunk& chunk) {
  run_chunk<T>(args, false, chunk);
}

template <class T>
void backward(const LossArgs& args, Chunk& chunk) {
  run_chunk<T>(args, true, chunk);
}

template <class T>
constexpr LossKernels kernels_of() {
  return {forward<T>, backward<T>};
}

}  // namespace

const LossKernelTable& dense_kernels() {
  static const LossKernelTable table{kernels_of<double>(), kernels_of<float>(),
                                     kernels_of<BFloat16>(), kernels_of<Float16>()};
  return table;
}

}  // namespace disalign::DISALIGN_CAPABILITY
