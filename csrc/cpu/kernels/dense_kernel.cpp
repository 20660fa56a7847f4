// Dense kernels: calibrated softmax cross-entropy over class planes, forward and backward.
//
// - Maps: a tile of positions at a time, class by class, positions in registers; what belongs to a
//   class is one number, what belongs to a position a vector in the first-level cache. The tile's
//   planes stay in the second-level cache. They are scratch of its own: planes of (N, C, H, W) lie
//   a power of two apart, so that a tile read twice from there would evict itself.
// - forward: load (u to scratch, its maximum), exponentiate, then the scalars of each position, and
//   emit makes whatever gradients are wanted. Memory: the logits are read once, grad_logits written
//   once.
// - backward: the same with the maximum and the sum that forward found, load and exponentiate in
// one
//   pass unless a margin or the confidence's gradient is in the way; grad_logits may be the logits,
//   which only load reads.
// - The target's entry is patched in scratch between exponentiate and emit, as in row_kernel.cpp.
#include "cpu/kernels/dense_kernel.h"

#include <utility>

#include "cpu/kernels/dense_passes.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

// What is known of the positions before their logits are read. False: all of them are ignored.
template <class T>
bool prepare(const LossArgs& args, Tile<T>& tile) {
  using A = Accumulate<T>;
  const Positions<A>& at = tile.positions;
  const int64_t valid = at.prepare(args, tile.first, tile.count);
  tile.all_valid = valid == tile.size;
  for (int64_t p = 0; p < tile.size; ++p) {
    const bool is_valid = at.target[p] >= 0;
    tile.valid[p] = is_valid ? A(1) : A(0);
    at.c[p] = (is_valid || (args.prediction && p < tile.count)) && args.confidence
                  ? static_cast<A>(sigmoid(read_or<A>(args.confidence, tile.first + p, 0)))
                  : A(0);
  }
  return valid > 0;
}

// Takes the target's margin off u_t, where the maximum may change with it.
template <class T>
void apply_margin(const LossArgs& args, const Tile<T>& tile, int64_t p, int64_t t) {
  using A = Accumulate<T>;
  A& u = tile.e[t * tile.size + p];
  const A before = u;
  u -= static_cast<const A*>(args.margin)[t];
  A& maximum = tile.positions.maximum[p];
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
  const Positions<A>& at = tile.positions;
  for (int64_t p = 0; p < tile.size; ++p) {
    const int64_t t = at.target[p];
    at.target_logit[p] = tile.target_slope[p] = A(0);
    if (t < 0) {
      at.maximum[p] = A(0);  // u is 0
      continue;
    }
    if (args.margin) apply_margin(args, tile, p, t);
    if (backward) at.maximum[p] = static_cast<const A*>(args.row_shift)[tile.first + p];
    at.target_logit[p] = tile.e[t * tile.size + p];
    if (tile.logits && args.target) {
      const ClassEntry<A> entry(args, t);
      const A d = tile.logits[t * tile.size + p] * entry.a + entry.b;
      tile.target_slope[p] = d * A(0) == A(0) ? d : A(0);
    }
  }
}

// Sums over all classes, a segment at a time.
template <class T, bool Slope, Spread S>
void exponentiate_all(const LossArgs& args, const Tile<T>& tile) {
  using A = Accumulate<T>;
  for (double* total : tile.positions.total) std::memset(total, 0, tile.size * sizeof(double));
  for_segments(tile.classes, kSumTerms, [&](int64_t begin, int64_t end) {
    for (A* sum : tile.sum) std::memset(sum, 0, tile.size * sizeof(A));
    exponentiate<T, Slope, S>(args, tile, begin, end);
    for (int k = 0; k < kSums; ++k) {
      double* total = tile.positions.total[k];
      for (int64_t p = 0; p < tile.size; ++p) total[p] += static_cast<double>(tile.sum[k][p]);
    }
  });
}

// Loss, statistics and the factors of the gradients of every position.
template <class T>
void finish(const LossArgs& args, bool backward, const Tile<T>& tile, Chunk& chunk) {
  using A = Accumulate<T>;
  const Positions<A>& at = tile.positions;
  if (backward) at.take_statistics(args, tile.first, tile.count);
  at.finish(args);
  if (!backward) chunk.loss_sum += at.write(args, tile.first, tile.count);
  if (args.grad_confidence) {
    A* to = static_cast<A*>(args.grad_confidence) + tile.first;
    for (int64_t p = 0; p < tile.count; ++p) to[p] = at.target[p] >= 0 ? at.slope[p] : A(0);
  }
  for (int64_t p = 0; p < tile.count; ++p)
    if (at.target[p] >= 0) tile.e[at.target[p] * tile.size + p] -= at.patch[p];
}

// Whether the gradient is more than the caches keep for its reader, and aligned for streaming.
template <class T>
bool streams(const LossArgs& args, const Tile<T>& tile) {
  constexpr int64_t kCached = int64_t{16} << 20;
  const auto aligned = [](int64_t address) { return address % kVectorBytes == 0; };
  return args.positions() * args.classes * static_cast<int64_t>(sizeof(T)) > kCached &&
         aligned(reinterpret_cast<int64_t>(tile.grad_logits)) &&
         aligned(args.grad_class_stride * static_cast<int64_t>(sizeof(T)));
}

template <class T, bool Calibrated, bool Known>
void load_tile(const LossArgs& args, const Tile<T>& tile) {
  if (tile.all_valid)
    load<T, Calibrated, true, Known>(args, tile);
  else
    load<T, Calibrated, false, Known>(args, tile);
}

// What read_targets does, where u is never stored: from the logits themselves.
template <class T>
void recall_targets(const LossArgs& args, const Tile<T>& tile) {
  using A = Accumulate<T>;
  const Positions<A>& at = tile.positions;
  for (int64_t p = 0; p < tile.size; ++p) {
    const int64_t t = at.target[p];
    at.target_logit[p] = at.maximum[p] = A(0);
    if (t < 0) continue;
    at.maximum[p] = static_cast<const A*>(args.row_shift)[tile.first + p];
    const ClassEntry<A> entry(args, t);
    const A z = to_accumulate(tile.z[t * tile.class_stride + p]);
    at.target_logit[p] = z * (at.c[p] * entry.a + A(1)) + (at.c[p] * entry.b + entry.o);
  }
}

// The most probable class of every position, ignored or not.
template <class T, bool Calibrated>
void predict_tile(const LossArgs& args, const Tile<T>& tile) {
  load<T, Calibrated, true, false>(args, tile);
  most_probable(tile, args.prediction + tile.first);
}

// What load_tile leaves of a tile that predict_tile has loaded, without the logits again.
template <class T, bool Calibrated>
void forget_ignored(const Tile<T>& tile) {
  using A = Accumulate<T>;
  if (tile.all_valid) return;
  for (int64_t p = 0; p < tile.size; ++p)
    if (tile.valid[p] == A(0)) tile.positions.c[p] = A(0);
  clear_ignored(tile, tile.e);
  if constexpr (Calibrated) clear_ignored(tile, tile.logits);
}

// The entropy of every position, whose exponentials are in the tile; 0 where ignored.
template <class T>
void write_entropy(const LossArgs& args, const Tile<T>& tile) {
  using A = Accumulate<T>;
  const Positions<A>& at = tile.positions;
  const auto* const margin = static_cast<const A*>(args.margin);
  A* const held = at.loss;  // which finish makes later
  const auto swap_targets = [&] {
    for (int64_t p = 0; p < tile.count && margin; ++p)
      if (at.target[p] >= 0) std::swap(held[p], tile.e[at.target[p] * tile.size + p]);
  };
  std::memset(held, 0, tile.size * sizeof(A));
  swap_targets();  // e_t has the margin: 0 while the others are added
  double *sum, *times_log;
  entropy_sums(tile, &sum, &times_log);
  swap_targets();
  A* const to = static_cast<A*>(args.entropy) + tile.first;
  for (int64_t p = 0; p < tile.count; ++p) {
    const int64_t t = at.target[p];
    const EntropySums sums{sum[p], times_log[p]};
    const double entropy =
        t < 0 ? 0.0
        : !margin
            ? entropy_of(sums)
            : entropy_of(sums, static_cast<double>(at.target_logit[p]) + margin[t] - at.maximum[p]);
    to[p] = static_cast<A>(entropy);
  }
}

template <class T, bool Calibrated, Spread S>
void run_tile(const LossArgs& args, bool backward, const Tile<T>& tile, Chunk& chunk) {
  if constexpr (S == Spread::kOwn) {
    if (args.probabilities_of_a)
      weigh<T, Accumulate<T>>(args, tile);
    else
      weigh<T, T>(args, tile);
  }
  const bool slope = Calibrated && args.grad_confidence;
  if (backward && !slope && !args.margin) {
    recall_targets(args, tile);
    load_tile<T, Calibrated, true>(args, tile);
  } else {
    if (args.prediction && !backward) {
      predict_tile<T, Calibrated>(args, tile);
      forget_ignored<T, Calibrated>(tile);
    } else {
      load_tile<T, Calibrated, false>(args, tile);
    }
    read_targets(args, backward, tile);
    if (slope)
      exponentiate_all<T, Calibrated, S>(args, tile);
    else
      exponentiate_all<T, false, S>(args, tile);
  }
  if (args.entropy && !backward) write_entropy(args, tile);
  finish(args, backward, tile, chunk);
  if constexpr (Calibrated) {
    if (args.class_gradients && !args.grad_logits)
      return emit<T, true, S, false, true, false>(args, tile, chunk);
    if (args.class_gradients && streams(args, tile))
      return emit<T, true, S, true, true, true>(args, tile, chunk);
    if (args.class_gradients) return emit<T, true, S, true, true, false>(args, tile, chunk);
  }
  if (!args.grad_logits) return;
  if (streams(args, tile)) return emit<T, Calibrated, S, true, false, true>(args, tile, chunk);
  emit<T, Calibrated, S, true, false, false>(args, tile, chunk);
}

template <class T, bool Calibrated>
void run_tile(const LossArgs& args, bool backward, const Tile<T>& tile, Chunk& chunk) {
  if (args.probabilities)
    run_tile<T, Calibrated, Spread::kOwn>(args, backward, tile, chunk);
  else if (args.label_smoothing > 0)
    run_tile<T, Calibrated, Spread::kClasses>(args, backward, tile, chunk);
  else
    run_tile<T, Calibrated, Spread::kNone>(args, backward, tile, chunk);
}

template <class T>
void ignore_tile(const LossArgs& args, bool backward, const Tile<T>& tile) {
  using A = Accumulate<T>;
  if (!backward) {
    Positions<A>::write_ignored(args, tile.first, tile.count);
    if (args.prediction && args.confidence)
      predict_tile<T, true>(args, tile);
    else if (args.prediction)
      predict_tile<T, false>(args, tile);
    if (args.entropy)
      std::memset(static_cast<A*>(args.entropy) + tile.first, 0, tile.count * sizeof(A));
  }
  if (args.grad_confidence)
    std::memset(static_cast<A*>(args.grad_confidence) + tile.first, 0, tile.count * sizeof(A));
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
    tile.image = image;
    tile.begin = begin;
    tile.count = args.inner - begin < tile.size ? args.inner - begin : tile.size;
    tile.z = static_cast<const T*>(args.logits) + image * args.outer_stride + begin;
    tile.grad_logits = static_cast<T*>(args.grad_logits) + image * args.grad_outer_stride + begin;
    if (!prepare(args, tile))
      ignore_tile(args, backward, tile);
    else if (args.confidence)
      run_tile<T, true>(args, backward, tile, chunk);
    else
      run_tile<T, false>(args, backward, tile, chunk);
  }
  stream_fence();
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
