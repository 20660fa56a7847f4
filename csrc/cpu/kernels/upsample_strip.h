// Strips: the output positions that the upsampling kernels work on together.
#pragma once

#include "cpu/kernels/positions.h"
#include "cpu/kernels/upsample_kernel.h"

namespace disalign::DISALIGN_CAPABILITY {

// Neighbouring positions of an output row. T: the arithmetic type, for a strip and all that works on
// it knows nothing of the logits' storage.
template <class T>
struct Strip {
  using A = Accumulate<T>;
  const A* blend;  // the row that they are interpolated from
  int64_t first_x, count;
  Positions<A> positions;
  A* e;       // kStrip positions of padded() classes: u, then exp(u - maximum)
  A* spread;  // the same of b_j; null without class probabilities
};

// Positions of a strip between the same two columns, [at, at + R).
template <class A, int R>
struct Group {
  int at;
  int64_t left, right;  // offsets of the two columns in a row
  A left_weight[R], right_weight[R];

  Group(const UpsampleArgs& args, int64_t first_x, int at) : at(at) {
    const int64_t source = args.x.source[first_x + at], padded = args.padded();
    left = source * padded;
    right = (source + 1 < args.x.in ? source + 1 : source) * padded;
    for (int r = 0; r < R; ++r) {
      right_weight[r] = static_cast<A>(args.x.weight[first_x + at + r]);
      left_weight[r] = static_cast<A>(1 - args.x.weight[first_x + at + r]);
    }
  }
};

// Calls body(at, count) with count a Size<R>: runs of positions between the same columns, at most
// four; ignored ones are left out unless `all`.
template <int R>
struct Size {
  static constexpr int value = R;
};
template <class T, class Body>
DISALIGN_INLINE void for_groups(const UpsampleArgs& args, const Strip<T>& strip, bool all,
                                Body body) {
  const int64_t* source = args.x.source + strip.first_x;
  const auto is_valid = [&](int p) { return all || strip.positions.target[p] >= 0; };
  for (int p = 0; p < strip.count;) {
    if (!is_valid(p)) {
      ++p;
      continue;
    }
    int n = 1;
    while (n < 4 && p + n < strip.count && source[p + n] == source[p] && is_valid(p + n)) ++n;
    if (n == 4) {
      body(p, Size<4>{});
      p += 4;
    } else if (n >= 2) {
      body(p, Size<2>{});
      p += 2;
    } else {
      body(p, Size<1>{});
      p += 1;
    }
  }
}

// b_j = w_j (keep y_j + share) of a strip's class probabilities, the classes inmost.
template <class T, class Y>
void weigh_strip(const UpsampleArgs& args, const Strip<T>& strip, int64_t first) {
  using A = Accumulate<T>;
  const int64_t image = first / args.inner, padded = args.padded();
  const Y* y = static_cast<const Y*>(args.probabilities) + image * args.probability_outer_stride +
               (first - image * args.inner);
  const A* weight = static_cast<const A*>(args.weight);
  for (int64_t j = 0; j < args.classes; ++j, y += args.probability_class_stride) {
    const A w = weight ? weight[j] : A(1);
    const A factor = w * static_cast<A>(args.keep), rest = w * static_cast<A>(args.share);
    for (int64_t p = 0; p < strip.count; ++p)
      strip.spread[p * padded + j] = static_cast<A>(to_accumulate(y[p])) * factor + rest;
  }
  for (int64_t p = 0; p < strip.count; ++p)
    for (int64_t j = args.classes; j < padded; ++j) strip.spread[p * padded + j] = A(0);
}

}  // namespace disalign::DISALIGN_CAPABILITY
