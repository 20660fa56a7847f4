// The passes of the row kernels over the classes of a block of rows (row_kernel.cpp has the plan) as
// far as the sums: maximise or guess, exponentiate, and the target's margin between the two.
// row_gradients.h has the last pass.
//
// A pass is a function of its own, compiled once for all forms of a block that share it: inlined
// into each form, the passes took twice as long to compile. They take the class vectors by value:
// these pointers then stay in registers, which a store might else have changed.
#pragma once

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/row_kernel.h"

namespace disalign::DISALIGN_CAPABILITY {

// What u is: the logits; with a prior or a margin; calibrated (and perhaps those).
enum class Kind { kPlain, kShifted, kCalibrated };

template <class A>
struct ClassVectors {
  const A *weight, *scale, *bias, *prior, *margin;
  explicit ClassVectors(const LossArgs& args)
      : weight(static_cast<const A*>(args.weight)),
        scale(static_cast<const A*>(args.scale)),
        bias(static_cast<const A*>(args.bias)),
        prior(static_cast<const A*>(args.prior)),
        margin(static_cast<const A*>(args.margin)) {}
};

// The rows of a block and what is known of each before its classes are read.
template <class T, int R>
struct Rows {
  using A = Accumulate<T>;
  int64_t classes, stride;
  int64_t index[R], target[R];  // target < 0: it is in another shard, or there are probabilities
  const T* z[R];
  A* e[R];               // scratch of the row: u where it is stored, then exp(u - shift)
  T* grad[R];            // grad_logits of the row; null where it is not wanted
  const A* spread[R];    // b_j, with class probabilities
  int64_t spread_ahead;  // to the b_j that this thread most likely takes next; 0 in scratch
  A c[R];                // confidence after the sigmoid
  double target_weight[R], sample_weight[R];
};

// What the passes over a block's classes yield for each row.
template <class A, int R>
struct Sums {
  A shift[R];              // what is taken off u: its maximum, or a guess a little below
  A target_logit[R];       // u_t, margin included
  A target_slope[R] = {};  // d_t, where d_j = a_j z_j + b_j; 0 where not finite
  // Of exponentiate:
  A maximum[R];             // of u
  double exponential[R];    // sum_j exp(u_j - shift)
  double smooth[R];         // sum_j w_j (u_j - shift), w_j or b_j as Spread says
  double total[R];          // sum_j b_j, with class probabilities
  double softmax_slope[R];  // sum_j exp(u_j - shift) (d_j - d_t)
  double smooth_slope[R];   // sum_j w_j (d_j - d_t)

  void clear() {
    for (int r = 0; r < R; ++r) {
      maximum[r] = -std::numeric_limits<A>::max();  // finite: u - maximum is never NaN
      exponential[r] = smooth[r] = total[r] = softmax_slope[r] = smooth_slope[r] = 0;
    }
  }

  bool finite(int r) const {
    return ((exponential[r] + smooth[r]) + (softmax_slope[r] + smooth_slope[r])) * 0 == 0;
  }
};

// The class vectors that u needs, one register of each.
template <class V>
struct Affine {
  V a{}, b{}, o{};

  template <bool Full, Kind K, bool Masked, class A>
  static DISALIGN_INLINE Affine load(const ClassVectors<A>& classes, int64_t j, int n) {
    Affine v;
    if constexpr (K == Kind::kCalibrated) {
      v.a = load_lanes<Full>(classes.scale + j, n);
      v.b = load_lanes<Full>(classes.bias + j, n);
    }
    if constexpr (K == Kind::kShifted || (K == Kind::kCalibrated && Masked)) {
      if (classes.prior) v.o = load_lanes<Full>(classes.prior + j, n);
    }
    return v;
  }

  DISALIGN_INLINE V slope(V z) const { return a * z + b; }

  // u = z + c d + o with the slope d = a z + b, for a class whose d is not finite (its logit masks
  // it) z (1 + c a) + c b + o. Unless Masked there is no prior, and such a class comes out NaN or
  // infinite. A class whose d is finite has the same u, to the last bit, whether Masked or not:
  // backward takes the maximum and the sum that forward found, and need not run in forward's form.
  template <Kind K, bool Masked, class A>
  DISALIGN_INLINE V of(V z, A c) const {
    if constexpr (K == Kind::kCalibrated) {
      const V d = slope(z), u = d * c + z;
      if constexpr (!Masked) return u;
      return d * A(0) == V{} ? u + o : z * (a * c + A(1)) + (b * c + o);  // finite * 0 is 0
    }
    if constexpr (K == Kind::kShifted) return z + o;
    return z;
  }
};

// u_j without its margin, rounded as the passes round it.
template <class T, int R, Kind K, bool Masked>
Accumulate<T> class_logit(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows, int r,
                          int64_t j) {
  using A = Accumulate<T>;
  const auto vectors = Affine<Vec<A>>::template load<false, K, Masked>(classes, j, 1);
  return vectors.template of<K, Masked>(splat<A>(to_accumulate(rows.z[r][j])), rows.c[r])[0];
}

template <class T, int R>
using ClassLogit = Accumulate<T> (*)(const ClassVectors<Accumulate<T>>&, const Rows<T, R>&, int,
                                     int64_t);

// d_t, rounded as exponentiate rounds it; 0 where it is not finite, as there.
template <class T, int R>
Accumulate<T> target_slope(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows,
                           int r) {
  using A = Accumulate<T>;
  const int64_t t = rows.target[r];
  if (t < 0) return 0;
  const A z = to_accumulate(rows.z[r][t]);
  const A d = classes.scale[t] * z + classes.bias[t];
  return d * A(0) == A(0) ? d : A(0);
}

// The maximum of u over the classes, u to scratch: for a margin, and for exponentiate.
template <class T, int R, Kind K>
DISALIGN_NOINLINE void maximise(ClassVectors<Accumulate<T>> classes, const Rows<T, R>& rows,
                                Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  V maximum[R];
  for (int r = 0; r < R; ++r)
    maximum[r] = splat<A>(-std::numeric_limits<A>::max());  // finite: u - maximum is never NaN
  const Local<const T*, R> z(rows.z);
  const Local<A*, R> e(rows.e);
  const Local<A, R> c(rows.c);
  for_lanes<A>(0, rows.classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    const auto vectors = Affine<V>::template load<Full, K, true>(classes, j, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V u = vectors.template of<K, true>(load_lanes<Full>(z[r] + j, n), c[r]);
      if constexpr (!Full) u = lane_index<A>() < n ? u : splat<A>(-kInfinity<A>);
      maximum[r] = vmax(u, maximum[r]);
      store(e[r] + j, u);
    }
  });
  for (int r = 0; r < R; ++r) sums.shift[r] = reduce_max<A>(maximum[r]);
}

// exp(u - shift) is as good with a shift a little below the maximum as with the maximum itself,
// whose search would cost a pass. So the shift is guessed: the larger of u_t, which a trained
// classifier makes the largest most often, and the maximum of a few registers of classes spread
// over the row. exponentiate finds the real maximum on the way; where it lies further above than
// this, it is called again with it.
constexpr int kGuessRegisters = 8;
template <class A>
constexpr A kHeadroom = A(16);  // exp loses 2e-8 of itself with every unit

template <class T, int R, Kind K, bool Masked>
DISALIGN_NOINLINE void guess(ClassVectors<Accumulate<T>> classes, const Rows<T, R>& rows,
                             Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  constexpr int N = Lanes<A>::N;
  V maximum[R];
  for (int r = 0; r < R; ++r) maximum[r] = splat<A>(-std::numeric_limits<A>::max());
  const Local<const T*, R> z(rows.z);
  const Local<A, R> c(rows.c);
  const int64_t full = rows.classes / N;
  const int64_t step = (full / kGuessRegisters + (full < kGuessRegisters)) * N;
  for (int64_t j = 0; j + N <= rows.classes; j += step) {
    const auto vectors = Affine<V>::template load<true, K, Masked>(classes, j, N);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      maximum[r] = vmax(vectors.template of<K, Masked>(load(z[r] + j), c[r]), maximum[r]);
  }
  for (int r = 0; r < R; ++r) {
    const A found = reduce_max<A>(maximum[r]);
    sums.shift[r] = sums.target_logit[r] > found ? sums.target_logit[r] : found;
  }
}

// Whether a guess was too low for exponentiate's sums; then the maximum takes its place.
template <class A, int R>
bool correct_guess(Sums<A, R>& sums) {
  bool wrong = false;
  for (int r = 0; r < R; ++r) {
    if (!(sums.maximum[r] - sums.shift[r] > kHeadroom<A>)) continue;
    sums.shift[r] = sums.maximum[r];
    wrong = true;
  }
  return wrong;
}

// b_j = w_j (keep y_j + share) of class probabilities to scratch.
template <class Y, class A, bool Weighted>
DISALIGN_NOINLINE void weigh(int64_t classes, const Y* __restrict__ y, int64_t ahead,
                             const A* __restrict__ weight, A keep, A share, A* __restrict__ to) {
  for_lanes<A>(0, classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    __builtin_prefetch(y + ahead + j, 0, 2);
    auto b = load_lanes<Full>(y + j, n) * keep + share;
    if constexpr (Weighted) b = b * load_lanes<Full>(weight + j, n);
    store(to + j, b);
  });
}

template <class T, class Y>
void weigh(const LossArgs& args, const Y* y, Accumulate<T>* to) {
  using A = Accumulate<T>;
  const auto run = args.weight ? weigh<Y, A, true> : weigh<Y, A, false>;
  run(args.classes, y, kRowBlock * args.probability_outer_stride,
      static_cast<const A*>(args.weight), static_cast<A>(args.keep), static_cast<A>(args.share),
      to);
}

// The b_j of row i: the probabilities themselves where they are that, else made in `scratch`.
template <class T>
const Accumulate<T>* spread_of(const LossArgs& args, int64_t i, Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t at = i * args.probability_outer_stride;
  if (!args.probabilities_of_a) {
    weigh<T>(args, static_cast<const T*>(args.probabilities) + at, scratch);
    return scratch;
  }
  const A* y = static_cast<const A*>(args.probabilities) + at;
  if (args.weight == nullptr && args.share == 0) return y;
  weigh<T>(args, y, scratch);
  return scratch;
}

// Takes the target's margin off u_t in scratch, where the maximum may change with it.
template <class T, int R>
void apply_margin(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows,
                  Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  for (int r = 0; r < R; ++r) {
    A* u = rows.e[r];
    const int64_t t = rows.target[r];
    if (t < 0) continue;
    const A before = u[t];
    u[t] = before - classes.margin[t];
    if (u[t] > sums.shift[r]) {
      sums.shift[r] = u[t];
    } else if (before == sums.shift[r]) {
      Vec<A> m = splat<A>(-std::numeric_limits<A>::max());
      for (int64_t j = 0; j < rows.classes; j += Lanes<A>::N) m = vmax(load(u + j), m);
      sums.shift[r] = reduce_max<A>(m);
    }
  }
}

// A block's sums of a segment of classes, in lanes; which of them there are beside exponential.
template <class A, int R>
struct LaneSums {
  Vec<A> maximum[R], exponential[R], smooth[R], total[R], softmax_slope[R], smooth_slope[R];
};
struct WhichSums {
  bool maximum, smooth, total, softmax_slope, smooth_slope;
};

template <class A, int R>
DISALIGN_NOINLINE void add_lanes(const LaneSums<A, R>& lanes, WhichSums which, Sums<A, R>& sums) {
  for (int r = 0; r < R; ++r) {
    sums.exponential[r] += reduce_add<A>(lanes.exponential[r]);
    if (which.maximum) sums.maximum[r] = reduce_max<A>(lanes.maximum[r]);
    if (which.smooth) sums.smooth[r] += reduce_add<A>(lanes.smooth[r]);
    if (which.total) sums.total[r] += reduce_add<A>(lanes.total[r]);
    if (which.softmax_slope) sums.softmax_slope[r] += reduce_add<A>(lanes.softmax_slope[r]);
    if (which.smooth_slope) sums.smooth_slope[r] += reduce_add<A>(lanes.smooth_slope[r]);
  }
}

// Scratch becomes exp(u - shift), u from scratch where Stored, which then has the shift's maximum.
// Slope: also the sums for the confidence's gradient, which is sum_j q_j d_j = sum_j q_j (d_j -
// d_t), for sum_j q_j = 0: so the target's own term, which would cancel only up to rounding where
// p_t is next to 1, is exactly 0. Masked: d = 0 where it is not finite (z = -inf, or finfo.min
// times a scale above 1); without it such a class makes softmax_slope NaN or infinite, which the
// caller sees: where nobody needs that sum, it is the sum of d, for this alone. A logit that is NaN
// or +inf shows in sum_j e_j all the same.
template <class T, int R, Kind K, bool Stored, bool Slope, Spread S, bool Masked>
DISALIGN_NOINLINE void exponentiate(ClassVectors<Accumulate<T>> classes, const Rows<T, R>& rows,
                                    int64_t begin, int64_t end, Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const Local<A, R> shift(sums.shift);
  const Local<A, R> target_slope(sums.target_slope);
  // Prefetched: the rows that this thread most likely takes next (past the end it does no harm),
  // and the lines that emit will write, lest its stores wait for them.
  const int64_t ahead = R * rows.stride;
  const Local<T*, R> grad(rows.grad);
  const bool writes = grad[0] && grad[0] != rows.z[0];
  constexpr bool Smooth = S != Spread::kNone;
  V exponential[R], smooth[R], total[R], softmax_slope[R], smooth_slope[R], maximum[R];
  for (int r = 0; r < R; ++r) {
    exponential[r] = smooth[r] = total[r] = V{};
    softmax_slope[r] = smooth_slope[r] = V{};
    maximum[r] = splat<A>(sums.maximum[r]);
  }
  const Local<const T*, R> z(rows.z);
  const Local<A*, R> e(rows.e);
  const Local<A, R> c(rows.c);
  const Local<const A*, R> spread(rows.spread);
  const int64_t spread_ahead = rows.spread_ahead;
  for_lanes<A>(begin, end, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    V w{};
    if constexpr (S == Spread::kClasses) w = load_lanes<Full>(classes.weight + j, n);
    const auto vectors = Affine<V>::template load<Full, K, Masked>(classes, j, n);
    if (writes) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) __builtin_prefetch(grad[r] + j, 1, 2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(z[r] + ahead + j, 0, 2);
      V value{}, u;
      if constexpr (!Stored || Slope) value = load_lanes<Full>(z[r] + j, n);
      if constexpr (Stored) {
        u = load(e[r] + j);
      } else {
        u = vectors.template of<K, Masked>(value, c[r]);
        if constexpr (!Full) u = lane_index<A>() < n ? u : splat<A>(-kInfinity<A>);
        maximum[r] = vmax(u, maximum[r]);
      }
      u = u - shift[r];
      const V x = exp_bounded(u);
      store(e[r] + j, x);
      exponential[r] += x;
      if constexpr (S == Spread::kOwn) {
        __builtin_prefetch(spread[r] + spread_ahead + j, 0, 2);
        w = load_lanes<Full>(spread[r] + j, n);
        total[r] += w;
        u = w == V{} ? V{} : u;  // a masked class that is not asked for adds 0, not 0 * -inf
        smooth[r] += w * u;
      } else if constexpr (Smooth) {
        if constexpr (!Full) u = lane_index<A>() < n ? u : V{};  // w u there would be 0 * -inf
        smooth[r] += w * u;
      }
      if constexpr (Slope) {
        V d = vectors.slope(value);
        if constexpr (Masked) d = d * A(0) == V{} ? d : V{};  // finite * 0 is 0, else NaN
        d = d - target_slope[r];
        softmax_slope[r] += x * d;
        if constexpr (Smooth) smooth_slope[r] += w * d;
      } else if constexpr (K == Kind::kCalibrated && !Stored && !Masked) {
        softmax_slope[r] += vectors.slope(value);
      }
    }
  });
  LaneSums<A, R> lanes;
  constexpr bool kSlopes = Slope || (K == Kind::kCalibrated && !Stored && !Masked);
  for (int r = 0; r < R; ++r) {
    lanes.exponential[r] = exponential[r];
    if constexpr (!Stored) lanes.maximum[r] = maximum[r];
    if constexpr (Smooth) lanes.smooth[r] = smooth[r];
    if constexpr (S == Spread::kOwn) lanes.total[r] = total[r];
    if constexpr (kSlopes) lanes.softmax_slope[r] = softmax_slope[r];
    if constexpr (Slope && Smooth) lanes.smooth_slope[r] = smooth_slope[r];
  }
  add_lanes<A, R>(lanes, {!Stored, Smooth, S == Spread::kOwn, kSlopes, Slope && Smooth}, sums);
}

}  // namespace disalign::DISALIGN_CAPABILITY
