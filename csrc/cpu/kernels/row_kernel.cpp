// Row kernels: calibrated softmax cross-entropy over rows of logits, forward and backward.
//
// - Maps: kRowBlock rows at a time, so that class vectors and class sums are loaded once for all of
//   them; classes in registers. The block's rows and their scratch stay in the second-level cache.
// - forward: guess, exponentiate (e = exp(u - shift) to scratch, its sum); the sum known, emit
//   makes whatever gradients are wanted from e and z. Memory: the logits are read once,
//   grad_logits written once.
// - backward: the shift and the sum are known from forward, so exponentiate comes first. Memory:
//   one read of the logits, one write of grad_logits, which may be the logits themselves (emit
//   reads a register of z before it writes the same place, and nothing else is read from the row
//   afterwards).
// - The target's entry is patched in scratch between exponentiate and emit: emit multiplies e by
//   softmax / s, so that subtracting s * target / softmax there subtracts `target` afterwards, in
//   the arithmetic dtype, before anything is rounded to the storage dtype.
#include "cpu/kernels/row_kernel.h"

#include "common/loss_math.h"
#include "cpu/kernels/row_details.h"
#include "cpu/kernels/row_gradients.h"
#include "cpu/kernels/row_passes.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

template <class T, int R>
DISALIGN_NOINLINE Rows<T, R> gather(const LossArgs& args, const int64_t* index,
                                    const Chunk& chunk) {
  using A = Accumulate<T>;
  Rows<T, R> rows;
  rows.classes = args.classes;
  rows.stride = args.outer_stride;
  for (int r = 0; r < R; ++r) {
    const int64_t i = index[r];
    rows.index[r] = i;
    rows.target[r] = args.target ? read_index(args.target, args.target_type, i) : -1;
    rows.z[r] = static_cast<const T*>(args.logits) + i * args.outer_stride;
    rows.e[r] = static_cast<A*>(chunk.scratch) + r * padded_classes(args.classes);
    rows.c[r] = args.confidence ? static_cast<A>(sigmoid(read_or<A>(args.confidence, i, 0))) : A(0);
    rows.target_weight[r] = rows.target[r] < 0 ? 1.0 : read_or<A>(args.weight, rows.target[r], 1.0);
    rows.sample_weight[r] = read_or<A>(args.sample_weight, i, 1.0);
    rows.grad[r] =
        args.grad_logits ? static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride : nullptr;
    rows.spread[r] = nullptr;
    rows.spread_ahead = 0;
    if (args.probabilities) {
      A* const scratch = static_cast<A*>(chunk.scratch) + (R + r) * padded_classes(args.classes);
      rows.spread[r] = spread_of<T>(args, i, scratch);
      if (rows.spread[r] != scratch) rows.spread_ahead = R * args.probability_outer_stride;
    }
  }
  return rows;
}

// The value k of row i of a shard's sums or factors.
template <class T>
Accumulate<T> factor(const LossArgs& args, ShardFactor k, int64_t i) {
  return static_cast<const Accumulate<T>*>(args.shard_factors)[k * args.outer + i];
}

template <class T>
void write_shard_sums(const LossArgs& args, int64_t i,
                      const Accumulate<T> (&values)[kShardValues]) {
  for (int k = 0; k < kShardValues; ++k)
    static_cast<Accumulate<T>*>(args.shard_sums)[k * args.outer + i] = values[k];
}

// The sums of a block of rows, whose exponentials are in scratch.
template <class T, int R>
DISALIGN_NOINLINE void write_shard_sums(const LossArgs& args, const Rows<T, R>& rows,
                                        const Sums<Accumulate<T>, R>& sums) {
  using A = Accumulate<T>;
  for (int r = 0; r < R; ++r) {
    const int64_t t = rows.target[r];
    const double at_target = t < 0 ? 0.0 : rows.e[r][t];  // 0 where it was kept out
    write_shard_sums<T>(args, rows.index[r],
                        {sums.shift[r], static_cast<A>(sums.exponential[r] - at_target),
                         args.probabilities ? static_cast<A>(sums.total[r]) : sums.target_logit[r],
                         sums.target_slope[r], static_cast<A>(sums.smooth[r])});
  }
}

// What emit needs of a row of a shard, and its share of the confidence's gradient.
template <class T, int R>
void take_shard_factors(const LossArgs& args, const Rows<T, R>& rows,
                        const Sums<Accumulate<T>, R>& sums, int r, Emission<T, R>& out) {
  using A = Accumulate<T>;
  const int64_t i = rows.index[r], t = rows.target[r];
  const A softmax = factor<T>(args, kFactorSoftmax, i), smooth = factor<T>(args, kFactorSmooth, i);
  out.softmax[r] = softmax;
  out.smooth[r] = smooth;
  // Of the target itself d_j - d_t is 0.
  const double slope = softmax * sums.softmax_slope[r] - smooth * sums.smooth_slope[r],
               c = rows.c[r];
  if (args.grad_confidence)
    static_cast<A*>(args.grad_confidence)[i] = static_cast<A>(c * (1 - c) * slope);
  if (t >= 0 && softmax != 0)
    rows.e[r][t] = static_cast<A>(rows.e[r][t] -
                                  static_cast<double>(factor<T>(args, kFactorTarget, i)) / softmax);
}

// The rows' scalars, once their sums are known: losses, statistics, the confidence's gradient, and
// what emit needs. Compiled once for all kinds of u: without a calibration there is no gradient of
// the confidence, and the slopes are 0.
template <class T, int R>
DISALIGN_NOINLINE void finish_rows(const LossArgs& args, bool backward, const Rows<T, R>& rows,
                                   const Sums<Accumulate<T>, R>& sums, Emission<T, R>& out,
                                   Chunk& chunk) {
  using A = Accumulate<T>;
  for (int r = 0; r < R; ++r) {
    const int64_t i = rows.index[r];
    if (args.shard_factors) {
      take_shard_factors(args, rows, sums, r, out);
      continue;
    }
    const double sum =
        backward ? read_or<A>(args.row_sum, i, 0) : static_cast<double>(sums.exponential[r]);
    const double log_sum = std::log(sum);
    const double nll = (static_cast<double>(sums.shift[r]) - sums.target_logit[r]) + log_sum;
    const RowTerms<double> terms =
        args.probabilities
            ? soft_row_terms(log_sum, sums.total[r], sums.smooth[r])
            : row_terms(nll, log_sum, rows.target_weight[r], args.label_smoothing, args.weight_sum,
                        sums.smooth[r], static_cast<double>(args.classes), args.focal_gamma);
    if (!backward) {
      const double loss = terms.loss * rows.sample_weight[r];
      chunk.loss_sum += loss;
      if (args.loss) static_cast<A*>(args.loss)[i] = static_cast<A>(loss);
      if (args.row_shift) {
        static_cast<A*>(args.row_shift)[i] = sums.shift[r];
        static_cast<A*>(args.row_sum)[i] = static_cast<A>(sum);
      }
      if (args.row_total) static_cast<A*>(args.row_total)[i] = static_cast<A>(sums.total[r]);
    }
    // A denominator of 0 means that nothing is left: every gradient is 0, whatever stands above.
    const double g = args.inverse_denominator == 0
                         ? 0.0
                         : read_or<A>(args.upstream, i * args.upstream_stride, 1.0) *
                               rows.sample_weight[r] * args.inverse_denominator;
    out.softmax[r] = static_cast<A>(g * terms.softmax / sum);
    out.smooth[r] = static_cast<A>(g * terms.smooth);
    if (args.grad_confidence) {
      const double c = rows.c[r];
      const double slope_sum =
          terms.softmax * sums.softmax_slope[r] / sum - terms.smooth * sums.smooth_slope[r];
      static_cast<A*>(args.grad_confidence)[i] = static_cast<A>(g * c * (1 - c) * slope_sum);
    }
    if (terms.softmax != 0 && rows.target[r] >= 0) {
      A& e = rows.e[r][rows.target[r]];
      e = static_cast<A>(static_cast<double>(e) - sum * terms.target / terms.softmax);
    }
  }
}

// The passes over a block for one form of u. Each is compiled once for all forms that share it.
template <class T, int R>
struct Passes {
  using A = Accumulate<T>;
  using Pass = void (*)(ClassVectors<A>, const Rows<T, R>&, Sums<A, R>&);
  using Exponentiate = void (*)(ClassVectors<A>, const Rows<T, R>&, int64_t, int64_t, Sums<A, R>&);
  using Emit = void (*)(ClassVectors<A>, const Rows<T, R>&, const Emission<T, R>&,
                        const ClassSums<A>&);

  bool calibrated, stored, masked;  // of Kind::kCalibrated; u is stored; masked classes may be met
  Pass maximise, guess;             // where u is stored; where it is not
  ClassLogit<T, R> class_logit;
  Exponentiate exponentiate, exponentiate_slope;
  Emit emit_logits, emit_classes, emit_both;  // the last two: where calibrated
};

template <class T, int R, Kind K, bool Stored, Spread S, bool Masked>
constexpr Passes<T, R> passes_of() {
  constexpr bool kCalibrated = K == Kind::kCalibrated;
  Passes<T, R> passes{};
  passes.calibrated = kCalibrated;
  passes.stored = Stored;
  passes.masked = Masked;
  passes.class_logit = class_logit<T, R, K, Masked>;
  if constexpr (Stored) {
    passes.maximise = maximise<T, R, K>;
    // exp(u - shift) of what is stored, however it was made.
    passes.exponentiate = exponentiate<T, R, Kind::kPlain, true, false, S, false>;
  } else {
    passes.guess = guess<T, R, K, Masked>;
    passes.exponentiate = exponentiate<T, R, K, false, false, S, Masked>;
  }
  passes.emit_logits = emit<T, R, kCalibrated, S, false, true, false>;
  if constexpr (kCalibrated) {
    passes.exponentiate_slope = exponentiate<T, R, K, Stored, true, S, Masked>;
    passes.emit_classes = emit<T, R, true, S, Masked, false, true>;
    passes.emit_both = emit<T, R, true, S, Masked, true, true>;
  }
  return passes;
}

// Everything of a block: the passes, the rows' scalars, the gradients. False, with nothing written,
// if a masked class was met and the passes are not for these.
template <class T, int R>
bool run_block(const LossArgs& args, bool backward, const Rows<T, R>& rows,
               const Passes<T, R>& passes, Chunk& chunk) {
  using A = Accumulate<T>;
  const ClassVectors<A> classes(args);
  Sums<A, R> sums;
  if (passes.stored) {
    passes.maximise(classes, rows, sums);
    if (args.prediction && !backward) {
      for (int r = 0; r < R; ++r)
        args.prediction[rows.index[r]] = most_probable(rows.e[r], rows.classes, sums.shift[r]);
    }
    if (classes.margin) apply_margin(classes, rows, sums);
  }
  for (int r = 0; r < R; ++r) {
    const int64_t t = rows.target[r];
    sums.target_logit[r] = t < 0           ? A(0)  // it is elsewhere
                           : passes.stored ? rows.e[r][t]
                                           : passes.class_logit(classes, rows, r, t);
    if (passes.calibrated)
      sums.target_slope[r] = args.shard_factors ? factor<T>(args, kFactorSlope, rows.index[r])
                                                : target_slope(classes, rows, r);
    if (backward) sums.shift[r] = static_cast<const A*>(args.row_shift)[rows.index[r]];
    // Kept out of a shard's sum, the target does not round off what else is in it. (With smoothing
    // no loss is so small, and w u would be infinite.)
    if (args.shard_sums && !(args.label_smoothing > 0) && t >= 0) rows.e[r][t] = -kInfinity<A>;
  }
  const bool guessed = !passes.stored && !backward;
  if (guessed && args.probabilities) {
    for (int r = 0; r < R; ++r) sums.target_logit[r] = -std::numeric_limits<A>::max();
  }
  if (guessed) passes.guess(classes, rows, sums);
  const bool slope = passes.calibrated && (args.grad_confidence || args.class_gradients);
  const auto exponentiate = slope ? passes.exponentiate_slope : passes.exponentiate;
  do {
    sums.clear();
    for_segments(args.classes, kSumTerms * Lanes<A>::N, [&](int64_t begin, int64_t end) {
      exponentiate(classes, rows, begin, end, sums);
    });
  } while (guessed && correct_guess(sums));
  if (passes.calibrated && !passes.masked) {
    for (int r = 0; r < R; ++r)
      if (!sums.finite(r)) return false;
  }

  if (!backward && (args.prediction || args.entropy))
    write_details(args, rows, sums, passes.stored, passes.class_logit, classes);
  if (args.shard_sums) {
    write_shard_sums(args, rows, sums);
    return true;
  }
  Emission<T, R> out;
  finish_rows(args, backward, rows, sums, out, chunk);
  const auto emit = !args.class_gradients ? passes.emit_logits
                    : args.grad_logits    ? passes.emit_both
                                          : passes.emit_classes;
  if (args.grad_logits || args.class_gradients) emit(classes, rows, out, ClassSums<A>(chunk));
  return true;
}

template <class T, int R, Kind K, bool Stored, bool Masked>
const Passes<T, R>& passes_for(const LossArgs& args) {
  static constexpr Passes<T, R> kPasses = passes_of<T, R, K, Stored, Spread::kNone, Masked>();
  static constexpr Passes<T, R> kSmooth = passes_of<T, R, K, Stored, Spread::kClasses, Masked>();
  static constexpr Passes<T, R> kSoft = passes_of<T, R, K, Stored, Spread::kOwn, Masked>();
  if (args.probabilities) return kSoft;
  return args.label_smoothing > 0 ? kSmooth : kPasses;
}

template <class T, int R>
void run_rows(const LossArgs& args, bool backward, const int64_t* index, Chunk& chunk) {
  const Rows<T, R> rows = gather<T, R>(args, index, chunk);
  const auto run = [&](const Passes<T, R>& passes) {
    return run_block<T, R>(args, backward, rows, passes, chunk);
  };
  // A margin changes u_t between two passes, and a shard's maximum is no guess.
  const bool stored = args.margin || args.shard_sums;
  if (!args.confidence) {
    if (stored)
      run(passes_for<T, R, Kind::kShifted, true, false>(args));
    else if (args.prior)
      run(passes_for<T, R, Kind::kShifted, false, false>(args));
    else
      run(passes_for<T, R, Kind::kPlain, false, false>(args));
    return;
  }
  if (stored) {
    run(passes_for<T, R, Kind::kCalibrated, true, true>(args));
    return;
  }
  // Of single rows, which are few, there is the general form alone.
  if constexpr (R > 1) {
    if (!args.prior && !chunk.masked) {
      if (run(passes_for<T, R, Kind::kCalibrated, false, false>(args))) return;
      chunk.masked = true;  // where one block masks classes, the next one most likely does
    }
  }
  run(passes_for<T, R, Kind::kCalibrated, false, true>(args));
}

// The most probable class of an ignored row, of which nothing else is known.
template <class T>
DISALIGN_NOINLINE void predict_row(const LossArgs& args, int64_t i, const Chunk& chunk) {
  using A = Accumulate<T>;
  LossArgs without_target = args;  // ignore_index is no class
  without_target.target = nullptr;
  const Rows<T, 1> rows = gather<T, 1>(without_target, &i, chunk);
  Sums<A, 1> sums;
  const auto pass =
      args.confidence ? maximise<T, 1, Kind::kCalibrated> : maximise<T, 1, Kind::kShifted>;
  pass(ClassVectors<A>(args), rows, sums);
  int64_t found = first_nan(rows.classes, [&](int64_t j) { return rows.e[0][j]; });
  if (found < 0) found = most_probable(rows.e[0], rows.classes, sums.shift[0]);
  args.prediction[i] = found;
}

// An ignored row: loss and gradients 0 without looking at its logits, NaN or not.
template <class T>
void skip_row(const LossArgs& args, bool backward, int64_t i, const Chunk& chunk) {
  using A = Accumulate<T>;
  if (args.shard_sums) {
    write_shard_sums<T>(args, i, {});
  } else if (!backward) {
    if (args.loss) static_cast<A*>(args.loss)[i] = A(0);
    if (args.row_shift) {
      static_cast<A*>(args.row_shift)[i] = A(0);
      static_cast<A*>(args.row_sum)[i] = A(1);
    }
  }
  if (args.prediction) predict_row<T>(args, i, chunk);
  if (args.entropy) static_cast<A*>(args.entropy)[i] = A(0);
  if (args.grad_confidence) static_cast<A*>(args.grad_confidence)[i] = A(0);
  if (args.grad_logits) {
    T* grad = static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride;
    std::memset(grad, 0, args.classes * sizeof(T));
  }
}

template <class T>
void run_chunk(const LossArgs& args, bool backward, Chunk& chunk) {
  const ClassSums<Accumulate<T>> sums(chunk);
  if (args.class_gradients) clear_class_sums(chunk, args.classes);
  chunk.loss_sum = 0;
  chunk.masked = false;
  int64_t block[kRowBlock];
  int count = 0, blocks = 0;
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    if (args.target && read_index(args.target, args.target_type, i) == args.ignore_index) {
      skip_row<T>(args, backward, i, chunk);
      continue;
    }
    block[count++] = i;
    if (count == kRowBlock) {
      run_rows<T, kRowBlock>(args, backward, block, chunk);
      count = 0;
      if (args.class_gradients && ++blocks % kSumBlocks == 0) sums.carry(args.classes);
    }
  }
  for (int i = 0; i < count; ++i) run_rows<T, 1>(args, backward, block + i, chunk);
  if (args.class_gradients) sums.finish(args.classes);
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

const LossKernelTable& row_kernels() {
  static const LossKernelTable table{kernels_of<double>(), kernels_of<float>(),
                                     kernels_of<BFloat16>(), kernels_of<Float16>()};
  return table;
}

}  // namespace disalign::DISALIGN_CAPABILITY
