// How the kernels walk over classes, on top of vec_math.h.
#pragma once

#include "chunk.h"
#include "vec_functions.h"

namespace disalign::DISALIGN_CAPABILITY {

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

// Sums over classes are kept in lanes of A for so many classes, and added up in double beyond: with
// a million classes a lane of floats would lose two digits.
constexpr int64_t kSumClasses = 4096;

// Calls segment(begin, end) over the classes, kSumClasses at a time.
template <class Segment>
DISALIGN_INLINE void for_segments(int64_t classes, Segment segment) {
  for (int64_t begin = 0; begin < classes; begin += kSumClasses)
    segment(begin, begin + kSumClasses < classes ? begin + kSumClasses : classes);
}

template <class A>
DISALIGN_INLINE double read_or(const void* p, int64_t i, double otherwise) {
  return p ? static_cast<double>(static_cast<const A*>(p)[i]) : otherwise;
}

// Gradients of the logits beyond this size are streamed past the caches, which keep nothing of them
// for their reader.
constexpr int64_t kCachedBytes = int64_t{16} << 20;

// Streams a row of `count` entries, whatever the alignment of either side.
template <class A>
void stream_row(A* to, const A* from, int64_t count) {
  constexpr int N = Lanes<A>::N;
  const auto past =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kVectorBytes / sizeof(A));
  int64_t j = past ? N - past : 0;
  if (j > count) j = count;
  if (j > 0) store_tail(to, load_tail(from, static_cast<int>(j)), static_cast<int>(j));
  for (; j + N <= count; j += N) stream(to + j, load(from + j));
  const auto rest = static_cast<int>(count - j);
  if (rest > 0) store_tail(to + j, load_tail(from + j, rest), rest);
}

static inline void clear_class_sums(Chunk& chunk, int64_t classes) {
  const auto bytes = static_cast<size_t>(padded_classes(classes)) * sizeof(double);
  std::memset(chunk.grad_scale, 0, bytes);
  std::memset(chunk.grad_bias, 0, bytes);
}

}  // namespace disalign::DISALIGN_CAPABILITY
