// What is asked of a position beside its loss: its most probable class, and the entropy of its
// softmax, without the margin, which only training knows.
#pragma once

#include <cmath>

#include "cpu/kernels/lanes.h"

namespace disalign::DISALIGN_CAPABILITY {

// The first class j with x[j] == value for which is(j); -1 if there is none.
template <class A, class Is>
DISALIGN_INLINE int64_t first_class(const A* x, int64_t classes, A value, Is is) {
  for (int64_t begin = 0; begin < classes; begin += 16) {
    const int64_t end = begin + 16 < classes ? begin + 16 : classes;
    int equal = 0;
    for (int64_t j = begin; j < end; ++j) equal += x[j] == value;
    if (equal == 0) continue;
    for (int64_t j = begin; j < end; ++j)
      if (x[j] == value && is(j)) return j;
  }
  return -1;
}

// The first class j whose u(j) is NaN, which is larger than any other to argmax; -1 if there is none.
template <class U>
DISALIGN_INLINE int64_t first_nan(int64_t classes, U u) {
  for (int64_t j = 0; j < classes; ++j)
    if (std::isnan(u(j))) return j;
  return -1;
}

// The first class with the largest u, NaN left out of account.
template <class A>
int64_t most_probable(const A* u, int64_t classes, A maximum) {
  const int64_t found = first_class(u, classes, maximum, [](int64_t) { return true; });
  return found < 0 ? 0 : found;  // nothing but NaN, or masked classes
}

// x log x of exponentials, 0 at 0.
DISALIGN_INLINE Vec<double> times_log(Vec<double> x) {
  return x > 0.0 ? x * log_positive(x) : Vec<double>{};
}

// Of exponentials x_j: sum_j x_j and sum_j x_j log x_j.
struct EntropySums {
  double sum, times_log;
};

// Of a row, whose exponentials are 0 past its end.
template <class A>
DISALIGN_NOINLINE EntropySums entropy_sums(const A* x, int64_t classes) {
  Vec<double> sum{}, log{};
  for (int64_t j = 0; j < classes; j += Lanes<double>::N) {
    const Vec<double> wide = load_wide(x + j);
    sum += wide;
    log += times_log(wide);
  }
  return {reduce_add<double>(sum), reduce_add<double>(log)};
}

// -sum_j p_j log p_j of p_j = x_j / sum.
inline double entropy_of(EntropySums x) {
  return x.sum == 0 ? 0.0 : std::log(x.sum) - x.times_log / x.sum;  // 0: all classes are masked
}

// The same of others and one more, x_t = exp(above), which may be far larger.
inline double entropy_of(EntropySums others, double above) {
  const double raised = above > 0 ? above : 0.0;
  const double factor = std::exp(-raised), x = std::exp(above - raised);
  return entropy_of({others.sum * factor + x, factor * (others.times_log - raised * others.sum) +
                                                  (x > 0 ? x * (above - raised) : 0.0)});
}

}  // namespace disalign::DISALIGN_CAPABILITY
