// Row kernels: calibrated softmax cross-entropy over rows of logits, forward and backward.
//
// - Maps: kRowBlock rows at a time, so that class vectors and class sums are loaded once for all of
//   them; classes in registers. The block's rows and their scratch stay in the second-level cache.
// - forward: affine (u to scratch, its maximum), exponentiate (e = exp(u - maximum) in scratch, its
//   sum); then, the sum known, emit makes whatever gradients are wanted from e and z.
//   Memory: the logits are read once, grad_logits written once.
// - backward: the same with the maximum and sum of forward. Memory: one read of the logits, one
//   write of grad_logits, which may be the logits themselves (emit reads a register of z before it
//   writes the same place, and nothing else is read from the row afterwards).
// - The target's entry is patched in scratch between exponentiate and emit: emit multiplies e by
//   softmax / s, so that subtracting s * target / softmax there subtracts `target` afterwards, in
//   the arithmetic dtype, before anything is rounded to the storage dtype.
#include "row_kernel.h"

#include "../common/loss_math.h"
#include "lanes.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

// What u is: the logits; with a prior or a margin; calibrated (and perhaps those).
enum class Kind { kPlain, kShifted, kCalibrated };

constexpr double kHuge = std::numeric_limits<double>::max();

template <class A>
struct ClassVectors {
  const A *weight, *scale, *bias, *prior, *margin;
  explicit ClassVectors(const RowArgs& args)
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
  int64_t index[R], target[R];
  const T* z[R];
  A* e[R];  // scratch of the row: u, then exp(u - maximum)
  A c[R];   // confidence after the sigmoid
  double target_weight[R], sample_weight[R];
};

// What the passes over a block's classes yield for each row.
template <class A, int R>
struct Sums {
  A maximum[R];
  A target_logit[R];             // u_t, margin included
  A target_slope[R];             // d_t, where d_j = a_j z_j + b_j; 0 for a masked class
  double exponential[R] = {};    // sum_j exp(u_j - maximum)
  double smooth[R] = {};         // sum_j w_j (u_j - maximum)
  double softmax_slope[R] = {};  // sum_j exp(u_j - maximum) (d_j - d_t)
  double smooth_slope[R] = {};   // sum_j w_j (d_j - d_t)
};

// Finds the maximum of u = (1 + c a) z + c b + o and writes u to scratch, unless it is the logits,
// which exponentiate reads again. Lanes behind the last class become -inf, so that they count
// nothing.
template <class T, int R, Kind K>
DISALIGN_INLINE void affine(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows,
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
    V a{}, b{}, o{};
    if constexpr (K == Kind::kCalibrated) {
      a = load_lanes<Full>(classes.scale + j, n);
      b = load_lanes<Full>(classes.bias + j, n);
    }
    if (K != Kind::kPlain && classes.prior) o = load_lanes<Full>(classes.prior + j, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V u = load_lanes<Full>(z[r] + j, n);
      if constexpr (K == Kind::kCalibrated) u = u * (a * c[r] + A(1)) + (b * c[r] + o);
      if constexpr (K == Kind::kShifted) u = u + o;
      if constexpr (!Full) u = lane_index<A>() < n ? u : splat<A>(-kInfinity<A>);
      maximum[r] = vmax(u, maximum[r]);
      if constexpr (K != Kind::kPlain) store(e[r] + j, u);
    }
  });
  for (int r = 0; r < R; ++r) sums.maximum[r] = reduce_max<A>(maximum[r]);
}

// Takes the target's margin off u_t in scratch, where the maximum may change with it.
template <class T, int R>
void apply_margin(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows,
                  Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  for (int r = 0; r < R; ++r) {
    A* u = rows.e[r];
    const int64_t t = rows.target[r];
    const A before = u[t];
    u[t] = before - classes.margin[t];
    if (u[t] > sums.maximum[r]) {
      sums.maximum[r] = u[t];
    } else if (before == sums.maximum[r]) {
      Vec<A> m = splat<A>(-std::numeric_limits<A>::max());
      for (int64_t j = 0; j < rows.classes; j += Lanes<A>::N) m = vmax(load(u + j), m);
      sums.maximum[r] = reduce_max<A>(m);
    }
  }
}

// Scratch: u becomes exp(u - maximum). Slope: also the sums for the confidence's gradient, which is
// sum_j q_j d_j = sum_j q_j (d_j - d_t), for sum_j q_j = 0: so the target's own term, which would
// cancel only up to rounding where p_t is next to 1, is exactly 0. Masked: d = 0 for classes with
// z = -inf; without it they make the sums NaN, which the caller sees.
template <class T, int R, Kind K, bool Slope, bool Smooth, bool Masked>
DISALIGN_INLINE void exponentiate(const ClassVectors<Accumulate<T>>& classes,
                                  const Rows<T, R>& rows, int64_t begin, int64_t end,
                                  Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const Local<A, R> maximum(sums.maximum);
  const Local<A, R> target_slope(sums.target_slope);
  // The rows that this thread most likely takes next; a prefetch past the end does no harm.
  const int64_t ahead = R * rows.stride;
  V exponential[R], smooth[R], softmax_slope[R], smooth_slope[R];
  for (int r = 0; r < R; ++r) {
    exponential[r] = smooth[r] = V{};
    softmax_slope[r] = smooth_slope[r] = V{};
  }
  const Local<const T*, R> z(rows.z);
  const Local<A*, R> e(rows.e);
  for_lanes<A>(begin, end, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    V a{}, b{}, w{};
    if constexpr (Smooth) w = load_lanes<Full>(classes.weight + j, n);
    if constexpr (Slope) {
      a = load_lanes<Full>(classes.scale + j, n);
      b = load_lanes<Full>(classes.bias + j, n);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(z[r] + ahead + j, 0, 2);
      V u;
      if constexpr (K == Kind::kPlain) {
        u = load_lanes<Full>(z[r] + j, n);
        if constexpr (!Full) u = lane_index<A>() < n ? u : splat<A>(-kInfinity<A>);
      } else {
        u = load(e[r] + j);
      }
      u = u - maximum[r];
      const V x = exp_nonpositive(u);
      store(e[r] + j, x);
      exponential[r] += x;
      if constexpr (Smooth) {
        if constexpr (!Full) u = lane_index<A>() < n ? u : V{};  // w u there would be 0 * -inf
        smooth[r] += w * u;
      }
      if constexpr (Slope) {
        const V value = load_lanes<Full>(z[r] + j, n);
        V d = a * value + b;
        if constexpr (Masked) d = value == -kInfinity<A> ? V{} : d;
        d = d - target_slope[r];
        softmax_slope[r] += x * d;
        if constexpr (Smooth) smooth_slope[r] += w * d;
      }
    }
  });
  for (int r = 0; r < R; ++r) {
    sums.exponential[r] += reduce_add<A>(exponential[r]);
    if constexpr (Smooth) sums.smooth[r] += reduce_add<A>(smooth[r]);
    if constexpr (Slope) sums.softmax_slope[r] += reduce_add<A>(softmax_slope[r]);
    if constexpr (Slope && Smooth) sums.smooth_slope[r] += reduce_add<A>(smooth_slope[r]);
  }
}

// A row's gradient by u: q_j = softmax * e_j - smooth * w_j, everything from above included.
template <class T, int R>
struct Emission {
  Accumulate<T> softmax[R], smooth[R];
  T* grad_logits[R];
};

// From e in scratch: grad_logits, and the block's share of the class gradients.
template <class T, int R, bool Calibrated, bool Smooth, bool Masked, bool Logits, bool Classes>
DISALIGN_INLINE void emit(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows,
                          const Emission<T, R>& out, const Chunk& chunk) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const Local<T*, R> grad_logits(out.grad_logits);
  // Without grad_logits the confidence is multiplied in once a row, not once a class.
  A softmax[R], smooth[R];
  for (int r = 0; r < R; ++r) {
    softmax[r] = Logits ? out.softmax[r] : out.softmax[r] * rows.c[r];
    smooth[r] = Logits ? out.smooth[r] : out.smooth[r] * rows.c[r];
  }
  const Local<const T*, R> z(rows.z);
  const Local<A*, R> e(rows.e);
  const Local<A, R> c(rows.c);
  for_lanes<A>(0, rows.classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    V a{}, w{}, grad_scale{}, grad_bias{};
    if constexpr (Calibrated && Logits) a = load_lanes<Full>(classes.scale + j, n);
    if constexpr (Smooth) w = load_lanes<Full>(classes.weight + j, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V q = load(e[r] + j) * softmax[r];
      if constexpr (Smooth) q = q - w * smooth[r];
      if constexpr (Classes) {
        V value = load_lanes<Full>(z[r] + j, n);
        if constexpr (Masked) value = value == -kInfinity<A> ? V{} : value;
        const V qc = Logits ? q * c[r] : q;
        grad_scale += qc * value;
        grad_bias += qc;
      }
      if constexpr (Logits) {
        if constexpr (Calibrated) q = q * (a * c[r] + A(1));
        store_lanes<Full>(grad_logits[r] + j, q, n);
      }
    }
    if constexpr (Classes) {
      accumulate(chunk.grad_scale + j, grad_scale);
      accumulate(chunk.grad_bias + j, grad_bias);
    }
  });
}

template <class T, int R>
Rows<T, R> gather(const RowArgs& args, const int64_t* index, const Chunk& chunk) {
  using A = Accumulate<T>;
  Rows<T, R> rows;
  rows.classes = args.classes;
  rows.stride = args.row_stride;
  for (int r = 0; r < R; ++r) {
    const int64_t i = index[r];
    rows.index[r] = i;
    rows.target[r] = read_index(args.target, args.target_type, i);
    rows.z[r] = static_cast<const T*>(args.logits) + i * args.row_stride;
    rows.e[r] = static_cast<A*>(chunk.scratch) + r * padded_classes(args.classes);
    rows.c[r] = args.confidence ? static_cast<A>(sigmoid(read_or<A>(args.confidence, i, 0))) : A(0);
    rows.target_weight[r] = read_or<A>(args.weight, rows.target[r], 1.0);
    rows.sample_weight[r] = read_or<A>(args.sample_weight, i, 1.0);
  }
  return rows;
}

// d_t, rounded as exponentiate rounds it.
template <class T, int R>
Accumulate<T> target_slope(const ClassVectors<Accumulate<T>>& classes, const Rows<T, R>& rows,
                           int r) {
  using A = Accumulate<T>;
  const int64_t t = rows.target[r];
  const A z = to_accumulate(rows.z[r][t]);
  return z == -kInfinity<A> ? A(0) : classes.scale[t] * z + classes.bias[t];
}

// Everything of a block: the passes, the rows' scalars, the gradients. False, with nothing written,
// if a masked class was met and Masked is not set.
template <class T, int R, Kind K, bool Smooth, bool Masked>
bool run_block(const RowArgs& args, bool backward, const Rows<T, R>& rows, Chunk& chunk) {
  using A = Accumulate<T>;
  constexpr bool Calibrated = K == Kind::kCalibrated;
  const ClassVectors<A> classes(args);
  const bool slope = Calibrated && (args.grad_confidence || args.class_gradients);
  Sums<A, R> sums;
  affine<T, R, K>(classes, rows, sums);
  if (classes.margin) apply_margin(classes, rows, sums);
  for (int r = 0; r < R; ++r) {
    const int64_t t = rows.target[r];
    sums.target_logit[r] = K == Kind::kPlain ? to_accumulate(rows.z[r][t]) : rows.e[r][t];
    if constexpr (Calibrated) sums.target_slope[r] = target_slope(classes, rows, r);
    if (backward) sums.maximum[r] = static_cast<const A*>(args.row_max)[rows.index[r]];
  }
  for_segments(args.classes, [&](int64_t begin, int64_t end) {
    if (Calibrated && slope)
      exponentiate<T, R, K, Calibrated, Smooth, Masked>(classes, rows, begin, end, sums);
    else
      exponentiate<T, R, K, false, Smooth, Masked>(classes, rows, begin, end, sums);
  });
  if (slope && !Masked) {
    for (int r = 0; r < R; ++r) {
      const bool finite =
          std::abs(sums.softmax_slope[r]) <= kHuge && std::abs(sums.smooth_slope[r]) <= kHuge;
      if (!finite) return false;
    }
  }

  Emission<T, R> out;
  for (int r = 0; r < R; ++r) {
    const int64_t i = rows.index[r];
    const double sum =
        backward ? read_or<A>(args.row_sum, i, 0) : static_cast<double>(sums.exponential[r]);
    const double log_sum = std::log(sum);
    const double nll = (static_cast<double>(sums.maximum[r]) - sums.target_logit[r]) + log_sum;
    const RowTerms<double> terms =
        row_terms(nll, log_sum, rows.target_weight[r], args.label_smoothing, args.weight_sum,
                  sums.smooth[r], static_cast<double>(args.classes), args.focal_gamma);
    if (!backward) {
      const double loss = terms.loss * rows.sample_weight[r];
      chunk.loss_sum += loss;
      if (args.loss) static_cast<A*>(args.loss)[i] = static_cast<A>(loss);
      static_cast<A*>(args.row_max)[i] = sums.maximum[r];
      static_cast<A*>(args.row_sum)[i] = static_cast<A>(sum);
    }
    // A denominator of 0 means that nothing is left: every gradient is 0, whatever stands above.
    const double g = args.inverse_denominator == 0
                         ? 0.0
                         : read_or<A>(args.upstream, i * args.upstream_stride, 1.0) *
                               rows.sample_weight[r] * args.inverse_denominator;
    out.softmax[r] = static_cast<A>(g * terms.softmax / sum);
    out.smooth[r] = static_cast<A>(g * terms.smooth);
    out.grad_logits[r] =
        args.grad_logits ? static_cast<T*>(args.grad_logits) + i * args.grad_row_stride : nullptr;
    if constexpr (Calibrated) {
      if (args.grad_confidence) {
        const double c = rows.c[r];
        const double slope_sum =
            terms.softmax * sums.softmax_slope[r] / sum - terms.smooth * sums.smooth_slope[r];
        static_cast<A*>(args.grad_confidence)[i] = static_cast<A>(g * c * (1 - c) * slope_sum);
      }
    }
    if (terms.softmax != 0) {
      A& e = rows.e[r][rows.target[r]];
      e = static_cast<A>(static_cast<double>(e) - sum * terms.target / terms.softmax);
    }
  }

  if constexpr (Calibrated) {
    if (args.class_gradients && args.grad_logits)
      emit<T, R, true, Smooth, Masked, true, true>(classes, rows, out, chunk);
    else if (args.class_gradients)
      emit<T, R, true, Smooth, Masked, false, true>(classes, rows, out, chunk);
    else if (args.grad_logits)
      emit<T, R, true, Smooth, Masked, true, false>(classes, rows, out, chunk);
  } else if (args.grad_logits) {
    emit<T, R, false, Smooth, Masked, true, false>(classes, rows, out, chunk);
  }
  return true;
}

template <class T, int R>
void run_rows(const RowArgs& args, bool backward, const int64_t* index, Chunk& chunk) {
  const Rows<T, R> rows = gather<T, R>(args, index, chunk);
  const bool smooth = args.label_smoothing > 0;
  if (!args.confidence) {
    const bool plain = !args.prior && !args.margin;
    if (plain && smooth) run_block<T, R, Kind::kPlain, true, false>(args, backward, rows, chunk);
    if (plain && !smooth) run_block<T, R, Kind::kPlain, false, false>(args, backward, rows, chunk);
    if (!plain && smooth) run_block<T, R, Kind::kShifted, true, false>(args, backward, rows, chunk);
    if (!plain && !smooth)
      run_block<T, R, Kind::kShifted, false, false>(args, backward, rows, chunk);
    return;
  }
  const bool done =
      smooth ? run_block<T, R, Kind::kCalibrated, true, false>(args, backward, rows, chunk)
             : run_block<T, R, Kind::kCalibrated, false, false>(args, backward, rows, chunk);
  if (done) return;
  if (smooth)
    run_block<T, R, Kind::kCalibrated, true, true>(args, backward, rows, chunk);
  else
    run_block<T, R, Kind::kCalibrated, false, true>(args, backward, rows, chunk);
}

// An ignored row: loss and gradients 0 without looking at its logits, NaN or not.
template <class T>
void skip_row(const RowArgs& args, bool backward, int64_t i) {
  using A = Accumulate<T>;
  if (!backward) {
    if (args.loss) static_cast<A*>(args.loss)[i] = A(0);
    static_cast<A*>(args.row_max)[i] = A(0);
    static_cast<A*>(args.row_sum)[i] = A(1);
  }
  if (args.grad_confidence) static_cast<A*>(args.grad_confidence)[i] = A(0);
  if (args.grad_logits) {
    T* grad = static_cast<T*>(args.grad_logits) + i * args.grad_row_stride;
    std::memset(grad, 0, args.classes * sizeof(T));
  }
}

template <class T>
void run_chunk(const RowArgs& args, bool backward, Chunk& chunk) {
  if (args.class_gradients) clear_class_sums(chunk, args.classes);
  chunk.loss_sum = 0;
  int64_t block[kRowBlock];
  int count = 0;
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    if (read_index(args.target, args.target_type, i) == args.ignore_index) {
      skip_row<T>(args, backward, i);
      continue;
    }
    block[count++] = i;
    if (count == kRowBlock) {
      run_rows<T, kRowBlock>(args, backward, block, chunk);
      count = 0;
    }
  }
  for (int i = 0; i < count; ++i) run_rows<T, 1>(args, backward, block + i, chunk);
}

template <class T>
void forward(const RowArgs& args, Chunk& chunk) {
  run_chunk<T>(args, false, chunk);
}

template <class T>
void backward(const RowArgs& args, Chunk& chunk) {
  run_chunk<T>(args, true, chunk);
}

template <class T>
constexpr RowKernels kernels_of() {
  return {forward<T>, backward<T>};
}

}  // namespace

const RowKernelTable& row_kernels() {
  static const RowKernelTable table{kernels_of<double>(), kernels_of<float>(),
                                    kernels_of<BFloat16>(), kernels_of<Float16>()};
  return table;
}

}  // namespace disalign::DISALIGN_CAPABILITY
