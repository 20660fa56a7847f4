// The passes of the dense kernels over a tile, class by class, a register of positions at a time
// (dense_kernel.cpp has the plan): load, exponentiate, emit.
#pragma once

#include <initializer_list>

#include "cpu/kernels/dense_kernel.h"
#include "cpu/kernels/details.h"
#include "cpu/kernels/positions.h"

namespace disalign::DISALIGN_CAPABILITY {

// Neighbouring positions of one image, with their scratch: planes of `size` positions a class, of
// which the first `count` exist, and vectors of one entry a position.
template <class T>
struct Tile {
  using A = Accumulate<T>;
  int64_t classes, size, class_stride;
  A* e;       // plane: u, then exp(u - maximum)
  A* logits;  // plane: z; null without a calibration
  A* spread;  // plane: b_j; null without class probabilities
  Positions<A> positions;
  A* valid;         // 0 where ignored
  A* target_slope;  // d_t, where d_j = a_j z_j + b_j; 0 where not finite
  A* sum[kSums];    // over a segment of classes, added to positions.total in double

  int64_t count = 0, first = 0;  // first: the tile's first position, counted over the batch
  bool all_valid = true;
  const T* z = nullptr;          // of class 0
  int64_t image = 0, begin = 0;  // the tile's first position in its image
  T* grad_logits = nullptr;      // of class 0

  Tile(const LossArgs& args, void* scratch)
      : classes(args.classes),
        size(dense_tile(args, sizeof(A))),
        class_stride(args.class_stride),
        e(static_cast<A*>(scratch)),
        logits(args.confidence ? e + classes * size : nullptr),
        spread(args.probabilities ? e + (dense_planes(args) - 1) * classes * size : nullptr),
        positions(e + dense_planes(args) * classes * size, size) {
    constexpr int kMore = 2 + kSums;
    static_assert(Positions<A>::bytes(1) + kMore * sizeof(A) <= kDensePositionBytes);
    A* next = reinterpret_cast<A*>(reinterpret_cast<char*>(positions.total[0]) +
                                   Positions<A>::bytes(size));
    valid = next;
    target_slope = next + size;
    for (int k = 0; k < kSums; ++k) sum[k] = next + (2 + k) * size;
  }
};

// Class vectors' entries of one class.
template <class A>
struct ClassEntry {
  A w, a, b, o;
  ClassEntry(const LossArgs& args, int64_t j)
      : w(at(args.weight, j)), a(at(args.scale, j)), b(at(args.bias, j)), o(at(args.prior, j)) {}

 private:
  static A at(const void* vector, int64_t j) {
    return vector ? static_cast<const A*>(vector)[j] : A(0);
  }
};

// b_j = w_j (keep y_j + share) of the class probabilities; 0 past the tile's positions.
template <class T, class Y>
DISALIGN_NOINLINE void weigh(const LossArgs& args, const Tile<T>& tile) {
  using A = Accumulate<T>;
  const int64_t stride = args.probability_class_stride;
  const Y* first = static_cast<const Y*>(args.probabilities) +
                   tile.image * args.probability_outer_stride + tile.begin;
  for (int64_t j = 0; j < tile.classes; ++j) {
    const A w = args.weight ? static_cast<const A*>(args.weight)[j] : A(1);
    const A factor = w * static_cast<A>(args.keep), rest = w * static_cast<A>(args.share);
    const Y* __restrict__ y = first + j * stride;
    A* __restrict__ b = tile.spread + j * tile.size;
    for_lanes<A>(0, tile.count, [&](int64_t p, int n, auto full) DISALIGN_ALWAYS_INLINE {
      constexpr bool Full = decltype(full)::value;
      __builtin_prefetch(y + 4 * stride + p, 0, 3);  // as in load; past the end it does no harm
      const auto made = load_lanes<Full>(y + p, n) * factor + rest;
      store(b + p, Full || lane_index<A>() < n ? made : Vec<A>{});
    });
  }
}

// u to e, its maximum, and the logits where a calibration's gradients will need them. Ignored
// positions become u = 0: whatever they hold, NaN or not, it goes no further. Known: the maximum is
// known, and e is exp(u - maximum) at once.
template <class T, bool Calibrated, bool AllValid, bool Known>
DISALIGN_NOINLINE void load(const LossArgs& args, const Tile<T>& tile) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  constexpr int N = Lanes<A>::N;
  A* __restrict__ maximum = tile.positions.maximum;
  if constexpr (!Known) {
    for (int64_t p = 0; p < tile.size; p += N)
      store(maximum + p, splat<A>(-std::numeric_limits<A>::max()));  // finite: never NaN below
  }
  for (int64_t j = 0; j < tile.classes; ++j) {
    const ClassEntry<A> entry(args, j);
    const T* __restrict__ z = tile.z + j * tile.class_stride;
    A* __restrict__ e = tile.e + j * tile.size;
    A* __restrict__ logits = tile.logits + j * tile.size;
    for_lanes<A>(0, tile.count, [&](int64_t p, int n, auto full) DISALIGN_ALWAYS_INLINE {
      // With exponentials to make meanwhile, the planes ahead arrive in time; the processor does
      // not foresee them. Past the end it does no harm.
      if constexpr (Known) __builtin_prefetch(z + 4 * tile.class_stride + p, 0, 3);
      V value = load_lanes<decltype(full)::value>(z + p, n);
      V u;
      if constexpr (Calibrated) {
        const V c = load(tile.positions.c + p);
        u = value * (c * entry.a + A(1)) + (c * entry.b + entry.o);
      } else {
        u = value + entry.o;
      }
      if constexpr (!AllValid) {
        const auto valid = load(tile.valid + p) != V{};
        u = valid ? u : V{};
        value = valid ? value : V{};
      }
      if constexpr (Calibrated) store(logits + p, value);
      if constexpr (Known) {
        store(e + p, exp_bounded(u - load(maximum + p)));
      } else {
        store(e + p, u);
        store(maximum + p, vmax(u, load(maximum + p)));
      }
    });
  }
}

// e becomes exp(u - maximum); sums over the classes [begin, end). Slope: those for the confidence's
// gradient, as in row_passes.h; where d is not finite, z is masked and adds nothing.
template <class T, bool Slope, Spread S>
DISALIGN_NOINLINE void exponentiate(const LossArgs& args, const Tile<T>& tile, int64_t begin,
                                    int64_t end) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  constexpr int N = Lanes<A>::N;
  const A* __restrict__ maximum = tile.positions.maximum;
  const A* __restrict__ target_slope = tile.target_slope;
  A* __restrict__ exponential = tile.sum[kExponential];
  A* __restrict__ smooth = tile.sum[kSmooth];
  A* __restrict__ total = tile.sum[kTotal];
  A* __restrict__ softmax_slope = tile.sum[kSoftmaxSlope];
  A* __restrict__ smooth_slope = tile.sum[kSmoothSlope];
  for (int64_t j = begin; j < end; ++j) {
    const ClassEntry<A> entry(args, j);
    A* __restrict__ e = tile.e + j * tile.size;
    const A* __restrict__ logits = tile.logits + j * tile.size;
    const A* __restrict__ spread = tile.spread + j * tile.size;
    // The tile that this thread most likely takes next; a prefetch past the end does no harm.
    const T* next = tile.z + j * tile.class_stride + tile.count;
    for (int64_t p = 0; p < tile.count; p += N) {
      __builtin_prefetch(next + p, 0, 2);
      const V u = load(e + p) - load(maximum + p);
      const V x = exp_bounded(u);
      store(e + p, x);
      store(exponential + p, load(exponential + p) + x);
      V w = splat<A>(entry.w);
      if constexpr (S == Spread::kOwn) {
        w = load(spread + p);
        store(total + p, load(total + p) + w);
        // A masked class that is not asked for adds 0, not 0 * -inf.
        store(smooth + p, load(smooth + p) + w * (w == V{} ? V{} : u));
      } else if constexpr (S == Spread::kClasses) {
        store(smooth + p, load(smooth + p) + u * w);
      }
      if constexpr (Slope) {
        V d = load(logits + p) * entry.a + entry.b;
        d = d * A(0) == V{} ? d : V{};  // finite * 0 is 0, else NaN
        d = d - load(target_slope + p);
        store(softmax_slope + p, load(softmax_slope + p) + x * d);
        if constexpr (S != Spread::kNone) store(smooth_slope + p, load(smooth_slope + p) + d * w);
      }
    }
  }
}

// The first class whose u, in e, is NaN, else that whose u is the maximum, of every position; 0 if
// there is neither.
template <class T>
DISALIGN_NOINLINE void most_probable(const Tile<T>& tile, int64_t* __restrict__ to) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const A* __restrict__ maximum = tile.positions.maximum;
  A* __restrict__ found = tile.sum[0];  // exact: planes of 2^24 classes would be too many
  std::memset(found, 0, tile.size * sizeof(A));
  V nan{};  // 1 where there was one
  for (int64_t j = tile.classes - 1; j >= 0; --j) {
    const A* __restrict__ e = tile.e + j * tile.size;
    const V number = splat<A>(static_cast<A>(j));
    for (int64_t p = 0; p < tile.count; p += Lanes<A>::N) {
      const V u = load(e + p);
      store(found + p, u == load(maximum + p) ? number : load(found + p));
      nan = u != u ? splat<A>(A(1)) : nan;
    }
  }
  const bool any = reduce_add<A>(nan) != 0;
  for (int64_t p = 0; p < tile.count; ++p) {
    int64_t first = -1;
    if (any) first = first_nan(tile.classes, [&](int64_t j) { return tile.e[j * tile.size + p]; });
    to[p] = first >= 0 ? first : static_cast<int64_t>(found[p]);
  }
}

// Makes a plane of every class 0 where a position is ignored, whatever it holds.
template <class T>
DISALIGN_NOINLINE void clear_ignored(const Tile<T>& tile, Accumulate<T>* plane) {
  using A = Accumulate<T>;
  const A* __restrict__ valid = tile.valid;
  for (int64_t j = 0; j < tile.classes; ++j) {
    A* __restrict__ x = plane + j * tile.size;
    for (int64_t p = 0; p < tile.count; p += Lanes<A>::N)
      store(x + p, load(valid + p) != Vec<A>{} ? load(x + p) : Vec<A>{});
  }
}

// EntropySums of the exponentials in e, of every position; in the scratch of the tile's sums.
template <class T>
DISALIGN_NOINLINE void entropy_sums(const Tile<T>& tile, double** sum, double** log) {
  using A = Accumulate<T>;
  static_assert(kSums * sizeof(A) >= 2 * sizeof(double));  // they lie one after the other
  *sum = reinterpret_cast<double*>(tile.sum[0]);
  *log = *sum + tile.size;
  std::memset(*sum, 0, 2 * tile.size * sizeof(double));
  double* const __restrict__ to = *sum;
  for (int64_t j = 0; j < tile.classes; ++j) {
    const A* __restrict__ e = tile.e + j * tile.size;
    for (int64_t p = 0; p < tile.count; p += Lanes<double>::N) {
      const Vec<double> x = load_wide(e + p);
      store(to + p, load(to + p) + x);
      store(to + tile.size + p, load(to + tile.size + p) + times_log(x));
    }
  }
}

// From e: the gradient of the logits and the tile's share of the class gradients.
template <class T, bool Calibrated, Spread S, bool Logits, bool Classes, bool Stream>
DISALIGN_INLINE void emit(const LossArgs& args, const Tile<T>& tile, const Chunk& chunk) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const A* __restrict__ softmax = tile.positions.softmax;
  const A* __restrict__ smooth = tile.positions.smooth;
  const A* __restrict__ c = tile.positions.c;
  for (int64_t j = 0; j < tile.classes; ++j) {
    const ClassEntry<A> entry(args, j);
    const A* __restrict__ e = tile.e + j * tile.size;
    const A* __restrict__ logits = tile.logits + j * tile.size;
    const A* __restrict__ spread = tile.spread + j * tile.size;
    T* __restrict__ grad = tile.grad_logits + j * args.grad_class_stride;
    V grad_scale{}, grad_bias{};
    for_lanes<A>(0, tile.count, [&](int64_t p, int n, auto full) DISALIGN_ALWAYS_INLINE {
      V q = load(e + p) * load(softmax + p);
      if constexpr (S == Spread::kOwn) q = q - load(smooth + p) * load(spread + p);
      if constexpr (S == Spread::kClasses) q = q - load(smooth + p) * entry.w;
      if constexpr (Classes) {
        // Past the tile's positions softmax and smooth are 0, and e is finite.
        const V qc = q * load(c + p);
        const V z = load(logits + p);
        grad_scale += qc * (z == -kInfinity<A> ? V{} : z);  // a masked class adds nothing
        grad_bias += qc;
      }
      if constexpr (Logits) {
        if constexpr (Calibrated) q = q * (load(c + p) * entry.a + A(1));
        if constexpr (Stream && decltype(full)::value)
          stream(grad + p, q);
        else
          store_lanes<decltype(full)::value>(grad + p, q, n);
      }
    });
    if constexpr (Classes) {
      chunk.grad_scale[j] += reduce_add<A>(grad_scale);
      chunk.grad_bias[j] += reduce_add<A>(grad_bias);
    }
  }
}

}  // namespace disalign::DISALIGN_CAPABILITY
