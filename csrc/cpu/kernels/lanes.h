// How the kernels walk over classes, on top of vec_math.h.
#pragma once

#include "cpu/kernels/chunk.h"
#include "cpu/simd/vec_functions.h"

namespace disalign::DISALIGN_CAPABILITY {

// What the sum over all classes weighs them by: there is none; label smoothing's class weights; the
// b_j of class probabilities, a position's own.
enum class Spread { kNone, kClasses, kOwn };

// A kernel's stores are bytes to the compiler and might change any object whose address is known;
// a local copy keeps pointers and factors in registers.
template <class X, int R>
struct Local {
  X x[R];
  explicit Local(const X (&from)[R]) {
    for (int r = 0; r < R; ++r) x[r] = from[r];
  }
  DISALIGN_INLINE X operator[](int r) const { return x[r]; }
};

// Calls body(j, n, full) over the classes [begin, end): full registers first, then the rest.
template <class A, class Body>
DISALIGN_INLINE void for_lanes(int64_t begin, int64_t end, Body body) {
  constexpr int N = Lanes<A>::N;
  int64_t j = begin;
  for (; j + N <= end; j += N) body(j, N, Flag<true>{});
  if (j < end) body(j, static_cast<int>(end - j), Flag<false>{});
}

// Sums over classes are kept in lanes of A for so many terms of a lane, and added up in double beyond:
// with a million classes a lane of floats would lose two digits.
constexpr int64_t kSumTerms = 512;

// Calls segment(begin, end) over the classes, `size` at a time.
template <class Segment>
DISALIGN_INLINE void for_segments(int64_t classes, int64_t size, Segment segment) {
  for (int64_t begin = 0; begin < classes; begin += size)
    segment(begin, begin + size < classes ? begin + size : classes);
}

// Lanes<double>::N entries as doubles.
DISALIGN_INLINE Vec<double> load_wide(const double* p) { return load(p); }
DISALIGN_INLINE Vec<double> load_wide(const float* p) {
  Lanes<float>::HalfV half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Vec<double>);
}

template <class A>
DISALIGN_INLINE double read_or(const void* p, int64_t i, double otherwise) {
  return p ? static_cast<double>(static_cast<const A*>(p)[i]) : otherwise;
}

static inline void clear_class_sums(Chunk& chunk, int64_t classes) {
  const auto bytes = static_cast<size_t>(padded_classes(classes)) * sizeof(double);
  std::memset(chunk.grad_scale, 0, bytes);
  std::memset(chunk.grad_bias, 0, bytes);
}

}  // namespace disalign::DISALIGN_CAPABILITY
