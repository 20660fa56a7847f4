// What is asked of rows beside their losses (details.h).
#pragma once

#include <utility>

#include "cpu/kernels/details.h"
#include "cpu/kernels/row_passes.h"

namespace disalign::DISALIGN_CAPABILITY {

// The most probable class of a row whose exponentials are in scratch.
template <class T, int R>
int64_t most_probable(const Rows<T, R>& rows, const Sums<Accumulate<T>, R>& sums, int r,
                      ClassLogit<T, R> class_logit, const ClassVectors<Accumulate<T>>& classes) {
  using A = Accumulate<T>;
  const A maximum = sums.maximum[r];
  const auto is = [&](int64_t j) { return class_logit(classes, rows, r, j) == maximum; };
  // Logits that are equal have equal exponentials, but not the other way round.
  const A of_maximum = exp_bounded(splat<A>(maximum) - splat<A>(sums.shift[r]))[0];
  int64_t found = first_class(rows.e[r], rows.classes, of_maximum, is);
  if (found < 0) {  // an infinite logit, whose exponential is NaN, or no class at all
    for (found = 0; found < rows.classes && !is(found); ++found) {
    }
    if (found == rows.classes) found = 0;
  }
  return found;
}

// The most probable class and the entropy of a block's rows, whose exponentials are in scratch.
// predicted: the class was found before the margin was taken off, NaN left out of account.
template <class T, int R>
DISALIGN_NOINLINE void write_details(const LossArgs& args, const Rows<T, R>& rows,
                                     const Sums<Accumulate<T>, R>& sums, bool predicted,
                                     ClassLogit<T, R> class_logit,
                                     const ClassVectors<Accumulate<T>>& classes) {
  using A = Accumulate<T>;
  for (int r = 0; r < R; ++r) {
    A* e = rows.e[r];
    const int64_t i = rows.index[r], t = rows.target[r];
    if (args.prediction) {
      int64_t nan = -1;
      if (std::isnan(sums.exponential[r]))  // of infinite logits, too
        nan = first_nan(rows.classes, [&](int64_t j) { return class_logit(classes, rows, r, j); });
      if (nan >= 0)
        args.prediction[i] = nan;
      else if (!predicted)
        args.prediction[i] = most_probable(rows, sums, r, class_logit, classes);
    }
    if (args.entropy) {
      // A margin is in e_t, and a shard's sums leave it out.
      const bool without = t >= 0 && (classes.margin || args.shard_sums);
      const A held = without ? std::exchange(e[t], A(0)) : A(0);
      const EntropySums of_row = entropy_sums(e, rows.classes);
      double entropy = entropy_of(of_row);
      if (without) {
        e[t] = held;
        const double margin = classes.margin ? classes.margin[t] : A(0);
        entropy = entropy_of(of_row, sums.target_logit[r] + margin - sums.shift[r]);
      }
      static_cast<A*>(args.entropy)[i] = static_cast<A>(entropy);
    }
  }
}

}  // namespace disalign::DISALIGN_CAPABILITY
