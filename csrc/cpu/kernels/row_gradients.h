// The last pass of the row kernels over the classes of a block of rows: emit, which makes the
// gradients of the logits, and the sums of those of scale and bias. row_kernel.cpp (finish_rows)
// makes that of the confidence.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cpu/kernels/row_passes.h"

namespace disalign::DISALIGN_CAPABILITY {

// The chunk's class gradients while they are added up, in the memory of its sums in double. An
// update in double costs more than a block's share in float, so each register of float classes has
// two of sums: `low`, which takes the shares of kSumBlocks blocks, and `high`, to which low is then
// carried. What that addition rounds off stays in low: the sum of both is as good as in double.
constexpr int kSumBlocks = 16;

template <class A>
struct ClassSums {
  static constexpr int N = Lanes<A>::N;
  static constexpr bool kPairs = std::is_same_v<A, float>;
  A *scale, *bias;

  explicit ClassSums(const Chunk& chunk)
      : scale(reinterpret_cast<A*>(chunk.grad_scale)),
        bias(reinterpret_cast<A*>(chunk.grad_bias)) {}

  // Where the sums of the classes from j on are, a multiple of N; low is N behind high.
  static DISALIGN_INLINE int64_t at(int64_t j) { return kPairs ? 2 * j : j; }

  static DISALIGN_INLINE void add(A* sums, int64_t j, Vec<A> share) {
    A* low = sums + at(j) + (kPairs ? N : 0);
    store(low, load(low) + share);
  }

  void carry(int64_t classes) const {
    if constexpr (kPairs) {
      for (int64_t j = 0; j < classes; j += N) {
        for (A* sums : {scale, bias}) {
          A* p = sums + at(j);
          const Vec<A> high = load(p), low = load(p + N), sum = high + low;
          // Knuth's TwoSum: sum + rest = high + low without rounding.
          const Vec<A> taken = sum - high;
          const Vec<A> rest = (high - (sum - taken)) + (low - taken);
          store(p, sum);
          store(p + N, rest);
        }
      }
    }
  }

  // The sums become doubles, in place.
  void finish(int64_t classes) const {
    if constexpr (kPairs) {
      for (int64_t j = 0; j < classes; j += N) {
        for (A* sums : {scale, bias}) {
          A* p = sums + at(j);
          double sum[N] = {};
          accumulate(sum, load(p));
          accumulate(sum, load(p + N));
          std::memcpy(p, sum, sizeof(sum));
        }
      }
    }
  }
};

// A row's gradient by u: q_j = softmax * e_j - smooth * w_j (b_j), everything from above included.
template <class T, int R>
struct Emission {
  Accumulate<T> softmax[R], smooth[R];
};

// From e in scratch: grad_logits, and the block's share of the class gradients.
template <class T, int R, bool Calibrated, Spread S, bool Masked, bool Logits, bool Classes>
DISALIGN_NOINLINE void emit(ClassVectors<Accumulate<T>> classes, const Rows<T, R>& rows,
                            const Emission<T, R>& out, const ClassSums<Accumulate<T>>& sums) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const Local<T*, R> grad_logits(rows.grad);
  A *const scale_sums = sums.scale, *const bias_sums = sums.bias;
  // Without grad_logits the confidence is multiplied in once a row, not once a class.
  A softmax[R], smooth[R];
  for (int r = 0; r < R; ++r) {
    softmax[r] = Logits ? out.softmax[r] : out.softmax[r] * rows.c[r];
    smooth[r] = Logits ? out.smooth[r] : out.smooth[r] * rows.c[r];
  }
  const Local<const T*, R> z(rows.z);
  const Local<A*, R> e(rows.e);
  const Local<A, R> c(rows.c);
  const Local<const A*, R> spread(rows.spread);
  for_lanes<A>(0, rows.classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    V a{}, w{}, grad_scale{}, grad_bias{};
    if constexpr (Calibrated && Logits) a = load_lanes<Full>(classes.scale + j, n);
    if constexpr (S == Spread::kClasses) w = load_lanes<Full>(classes.weight + j, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V q = load(e[r] + j) * softmax[r];
      if constexpr (S == Spread::kOwn) w = load_lanes<Full>(spread[r] + j, n);
      if constexpr (S != Spread::kNone) q = q - w * smooth[r];
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
      ClassSums<A>::add(scale_sums, j, grad_scale);
      ClassSums<A>::add(bias_sums, j, grad_bias);
    }
  });
}

}  // namespace disalign::DISALIGN_CAPABILITY
