// Upsampling kernels: calibrated softmax cross-entropy of bilinearly interpolated logits.
//
// - Maps: an output row at a time, a strip of its positions, classes in registers. The logits are
//   brought in a low-resolution row at a time, calibrated and with the classes inmost, so that a
//   position's u is two loads from the row blended for this output row, and its gradient goes back
//   by two additions: no gathers and no transpositions at the output's resolution.
// - A prior is added at low resolution: interpolation weights sum to 1.
// - forward and backward: interpolate (u to the strip, its maximum), exponentiate, the scalars of
//   each position, scatter (the gradient of the blended row). Positions between the same two
//   columns are taken four together and share their loads.
// - Gradients of low-resolution rows are sums: positions to the blended row, output rows to the two
//   rows it was blended from, in the order of the output. A row that two chunks share is finished
//   by join, after both.
// - Memory: the low-resolution logits and the target are read once; nothing is of the output's size
//   but vectors of one entry a position.
#include "cpu/kernels/upsample_kernel.h"

#include "cpu/kernels/details.h"
#include "cpu/kernels/row_passes.h"
#include "cpu/kernels/upsample_rows.h"
#include "cpu/kernels/upsample_strip.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

// u of a group's positions into the strip, and their maxima.
template <class T, int R>
void interpolate(const UpsampleArgs& args, const Strip<T>& strip, int at) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const int64_t padded = args.padded();
  const Group<A, R> group(args, strip.first_x, at);
  const A* left = strip.blend + group.left;
  const A* right = strip.blend + group.right;
  A* e[R];
  V maximum[R];
  for (int r = 0; r < R; ++r) {
    e[r] = strip.e + (at + r) * padded;
    maximum[r] = splat<A>(-std::numeric_limits<A>::max());
  }
  const Local<A*, R> to(e);
  const Local<A, R> left_weight(group.left_weight), right_weight(group.right_weight);
  for (int64_t j = 0; j < padded; j += Lanes<A>::N) {
    const V l = load(left + j), r_ = load(right + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V u = l * left_weight[r] + r_ * right_weight[r];
      store(to[r] + j, u);
      maximum[r] = vmax(u, maximum[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const A found = reduce_max<A>(maximum[r]);
    strip.positions.maximum[at + r] =
        found > kNothing<A> ? found : std::numeric_limits<A>::quiet_NaN();
  }
}

// e = exp(u - maximum) of a group, and its sums; the target's logit before that.
template <class T, int R, Spread S>
void exponentiate_group(const UpsampleArgs& args, bool backward, const Strip<T>& strip, int at,
                        int64_t first) {
  using A = Accumulate<T>;
  const Positions<A>& positions = strip.positions;
  const ClassVectors<A> classes(args);
  Rows<A, R> rows;
  Sums<A, R> sums;
  rows.classes = args.classes;
  rows.stride = rows.spread_ahead = 0;
  for (int r = 0; r < R; ++r) {
    rows.z[r] = rows.e[r] = strip.e + (at + r) * args.padded();
    rows.grad[r] = nullptr;
    rows.spread[r] = strip.spread + (at + r) * args.padded();
    rows.c[r] = A(0);
    const int64_t t = positions.target[at + r];
    rows.target[r] = t < 0 ? 0 : t;
    sums.shift[r] = positions.maximum[at + r];
    sums.target_slope[r] = A(0);
  }
  if (args.margin) apply_margin(classes, rows, sums);
  for (int r = 0; r < R; ++r) {
    positions.target_logit[at + r] = rows.e[r][rows.target[r]];
    if (backward) sums.shift[r] = static_cast<const A*>(args.row_shift)[first + at + r];
    positions.maximum[at + r] = sums.shift[r];
  }
  sums.clear();
  for_segments(args.classes, kSumTerms * Lanes<A>::N, [&](int64_t begin, int64_t end) {
    exponentiate<A, R, Kind::kPlain, true, false, S, false>(classes, rows, begin, end, sums);
  });
  for (int r = 0; r < R; ++r) {
    positions.total[kExponential][at + r] = sums.exponential[r];
    positions.total[kSmooth][at + r] = sums.smooth[r];
    positions.total[kTotal][at + r] = sums.total[r];
  }
}

// The gradient of a group's u to that of the blended row.
template <class T, int R, Spread S>
void scatter(const UpsampleArgs& args, const Strip<T>& strip, int at, Accumulate<T>* grad_blend) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const int64_t padded = args.padded();
  const Group<A, R> group(args, strip.first_x, at);
  A* left = grad_blend + group.left;
  A* right = grad_blend + group.right;
  const A* weight = static_cast<const A*>(args.weight);
  const A *e_[R], *spread_[R];
  A softmax_[R], smooth_[R];
  for (int r = 0; r < R; ++r) {
    e_[r] = strip.e + (at + r) * padded;
    spread_[r] = strip.spread + (at + r) * padded;
    softmax_[r] = strip.positions.softmax[at + r];
    smooth_[r] = strip.positions.smooth[at + r];
  }
  const Local<const A*, R> e(e_), spread(spread_);
  const Local<A, R> softmax(softmax_), smooth(smooth_);
  const Local<A, R> left_weight(group.left_weight), right_weight(group.right_weight);
  for_lanes<A>(0, args.classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    V w{}, to_left{}, to_right{};
    if constexpr (S == Spread::kClasses) w = load_lanes<decltype(full)::value>(weight + j, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V q = load(e[r] + j) * softmax[r];
      if constexpr (S == Spread::kOwn) w = load(spread[r] + j);
      if constexpr (S != Spread::kNone) q = q - w * smooth[r];
      to_left += q * left_weight[r];
      to_right += q * right_weight[r];
    }
    store(left + j, load(left + j) + to_left);
    store(right + j, load(right + j) + to_right);  // may be left: not before its store
  });
}

template <class T>
void predict_strip(const UpsampleArgs& args, const Strip<T>& strip, int64_t first) {
  for (int p = 0; p < strip.count; ++p)
    args.prediction[first + p] =
        most_probable(strip.e + p * args.padded(), args.classes, strip.positions.maximum[p]);
}

template <class T>
void interpolate_strip(const UpsampleArgs& args, const Strip<T>& strip, bool all) {
  for_groups(args, strip, all,
             [&](int at, auto size) { interpolate<T, decltype(size)::value>(args, strip, at); });
}

// Softmax of the target, without the margin, which only training knows.
template <class A>
double target_probability(const LossArgs& args, const Positions<A>& at, int p) {
  const double maximum = at.maximum[p], u = at.target_logit[p];
  const double rest = at.total[kExponential][p] - std::exp(u - maximum);
  const double logit = u + read_or<A>(args.margin, at.target[p], 0);
  const double highest = logit > maximum ? logit : maximum;
  const double e = std::exp(logit - highest);
  return e / (rest * std::exp(maximum - highest) + e);
}

template <class T, Spread S>
void run_strip(const UpsampleArgs& args, bool backward, const Strip<T>& strip, int64_t first,
               Accumulate<T>* grad_blend, Chunk& chunk) {
  using A = Accumulate<T>;
  const Positions<A>& at = strip.positions;
  const int64_t valid = at.prepare(args, first, strip.count);
  const bool predict = !backward && args.prediction;
  if (valid > 0 || predict) interpolate_strip(args, strip, predict);
  if (predict) predict_strip(args, strip, first);
  if (valid > 0) {
    for_groups(args, strip, false, [&](int p, auto size) {
      exponentiate_group<T, decltype(size)::value, S>(args, backward, strip, p, first);
    });
    if (backward) at.take_statistics(args, first, strip.count);
    at.finish(args);
  }
  for (int p = 0; p < kStrip; ++p)
    if (at.target[p] < 0) at.loss[p] = A(0);
  if (!backward) {
    chunk.loss_sum += at.write(args, first, strip.count);
    if (args.probability) {
      A* to = static_cast<A*>(args.probability) + first;
      for (int p = 0; p < strip.count; ++p)
        to[p] = at.target[p] < 0 ? A(0) : static_cast<A>(target_probability(args, at, p));
    }
  }
  if (valid == 0 || !args.gradients) return;
  for (int p = 0; p < strip.count; ++p)
    if (at.target[p] >= 0) strip.e[p * args.padded() + at.target[p]] -= at.patch[p];
  for_groups(args, strip, false, [&](int p, auto size) {
    scatter<T, decltype(size)::value, S>(args, strip, p, grad_blend);
  });
}

// Calls body(image, row, y, blend) for every output row of the chunk, after_row(image, row) after
// all of a low-resolution row's, and after_image(image, end) after the chunk's part [.., end) of
// it.
template <class T, class Body, class AfterRow, class AfterImage>
DISALIGN_INLINE void for_output_rows(const UpsampleArgs& args, const Chunk& chunk,
                                     UpsampleScratch<Accumulate<T>>& scratch, Body body,
                                     AfterRow after_row, AfterImage after_image) {
  using A = Accumulate<T>;
  const int64_t rows = args.y.in;
  for (int64_t unit = chunk.begin; unit < chunk.end;) {
    const int64_t image = unit / rows, begin = unit % rows;
    const int64_t end = begin + (chunk.end - unit) < rows ? begin + (chunk.end - unit) : rows;
    load_row<T>(args, image, begin, scratch, scratch.upper);
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < rows) load_row<T>(args, image, row + 1, scratch, scratch.lower);
      for (int64_t y = args.first_row[row]; y < args.first_row[row + 1]; ++y) {
        const A weight = static_cast<A>(args.y.weight[y]);
        if (weight != A(0)) blend_rows(args, weight, scratch.upper, scratch.lower, scratch.blend);
        body(image, y, weight, weight != A(0) ? scratch.blend : scratch.upper);
      }
      after_row(image, row);
      A* const upper = scratch.upper;
      scratch.upper = scratch.lower;
      scratch.lower = upper;
    }
    after_image(image, end);
    unit += end - begin;
  }
}

template <class T>
void run_chunk(const UpsampleArgs& args, bool backward, Chunk& chunk) {
  using A = Accumulate<T>;
  UpsampleScratch<A> scratch(args, chunk.scratch);
  const Positions<A> positions(scratch.positions, kStrip);
  if (args.class_gradients) clear_class_sums(chunk, args.classes);
  chunk.loss_sum = 0;
  if (chunk.begin == chunk.end) return;
  const int64_t shared = chunk.begin % args.y.in != 0 ? chunk.begin : -1;
  clear_row(args, scratch.grad_upper);
  clear_row(args, scratch.grad_lower);
  clear_row(args, scratch.grad_blend);
  for_output_rows<T>(
      args, chunk, scratch,
      [&](int64_t image, int64_t y, A weight, const A* blend) {
        const int64_t row = (image * args.y.out + y) * args.x.out;
        for (int64_t x = 0; x < args.x.out; x += kStrip) {
          const int64_t count = args.x.out - x < kStrip ? args.x.out - x : kStrip;
          const Strip<A> strip{blend, x, count, positions, scratch.strip, scratch.spread};
          const auto run = [&](auto spread) {
            constexpr Spread kSpread = decltype(spread)::value;
            run_strip<A, kSpread>(args, backward, strip, row + x, scratch.grad_blend, chunk);
          };
          if (args.probabilities) {
            if (args.probabilities_of_a)
              weigh_strip<A, A>(args, strip, row + x);
            else
              weigh_strip<A, T>(args, strip, row + x);
            run(std::integral_constant<Spread, Spread::kOwn>{});
          } else if (args.label_smoothing > 0) {
            run(std::integral_constant<Spread, Spread::kClasses>{});
          } else {
            run(std::integral_constant<Spread, Spread::kNone>{});
          }
        }
        if (args.gradients)
          spread_gradient(args, weight, scratch.grad_blend, scratch.grad_upper, scratch.grad_lower);
      },
      [&](int64_t image, int64_t row) {
        if (!args.gradients) return;
        if (image * args.y.in + row == shared)
          std::memcpy(scratch.first, scratch.grad_upper, args.row_values() * sizeof(A));
        else
          store_row<T>(args, image, row, scratch, scratch.grad_upper, chunk);
        A* const upper = scratch.grad_upper;
        scratch.grad_upper = scratch.grad_lower;
        scratch.grad_lower = upper;
        clear_row(args, scratch.grad_lower);
      },
      [&](int64_t, int64_t end) {
        if (!args.gradients) return;
        if (end < args.y.in)
          std::memcpy(scratch.last, scratch.grad_upper, args.row_values() * sizeof(A));
        clear_row(args, scratch.grad_upper);
      });
}

template <class T>
void join(const UpsampleArgs& args, const Chunk& before, Chunk& after) {
  using A = Accumulate<T>;
  if (after.begin % args.y.in == 0) return;
  const UpsampleScratch<A> earlier(args, before.scratch), later(args, after.scratch);
  for (int64_t i = 0; i < args.row_values(); ++i) later.first[i] = earlier.last[i] + later.first[i];
  store_row<T>(args, after.begin / args.y.in, after.begin % args.y.in, later, later.first, after);
}

template <class T>
void predict(const UpsampleArgs& args, Chunk& chunk) {
  using A = Accumulate<T>;
  UpsampleScratch<A> scratch(args, chunk.scratch);
  const Positions<A> positions(scratch.positions, kStrip);
  for_output_rows<T>(
      args, chunk, scratch,
      [&](int64_t image, int64_t y, A, const A* blend) {
        const int64_t row = (image * args.y.out + y) * args.x.out;
        for (int64_t x = 0; x < args.x.out; x += kStrip) {
          const int64_t count = args.x.out - x < kStrip ? args.x.out - x : kStrip;
          const Strip<A> strip{blend, x, count, positions, scratch.strip, nullptr};
          interpolate_strip(args, strip, true);
          predict_strip(args, strip, row + x);
        }
      },
      [](int64_t, int64_t) {}, [](int64_t, int64_t) {});
}

template <class T>
void forward(const UpsampleArgs& args, Chunk& chunk) {
  run_chunk<T>(args, false, chunk);
}

template <class T>
void backward(const UpsampleArgs& args, Chunk& chunk) {
  run_chunk<T>(args, true, chunk);
}

template <class T>
constexpr UpsampleKernels kernels_of() {
  return {forward<T>, backward<T>, join<T>, predict<T>};
}

}  // namespace

const UpsampleKernelTable& upsample_kernels() {
  static const UpsampleKernelTable table{kernels_of<double>(), kernels_of<float>(),
                                         kernels_of<BFloat16>(), kernels_of<Float16>()};
  return table;
}

}  // namespace disalign::DISALIGN_CAPABILITY
