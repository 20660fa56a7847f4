// Vectors of one register each, for the instruction set this translation unit is compiled for.
//
// - Lanes<A>: A = float or double; V is a GCC/Clang vector, so + - * work on it and a * b + c is
//   contracted to one fused multiply-add (-ffp-contract=fast).
// - load / store convert float, double, bfloat16 and float16 storage to and from the arithmetic A.
// - Everything lives in an inline namespace per instruction set: the linker must never merge an
//   AVX-512 copy of a function with the baseline's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef DISALIGN_CAPABILITY
#error "DISALIGN_CAPABILITY names the instruction set's namespace; CMakeLists.txt defines it"
#endif

#define DISALIGN_INLINE inline __attribute__((always_inline))
#define DISALIGN_ALWAYS_INLINE __attribute__((always_inline))  // for lambdas

namespace disalign::DISALIGN_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int N = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef float HalfV __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Lanes<double> {
  static constexpr int N = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename Lanes<A>::V;

template <bool B>
struct Flag {
  static constexpr bool value = B;
};

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class A>
DISALIGN_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // a broadcast; x + 0 would turn -0 into +0
}

template <class To, class From>
DISALIGN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- scalar conversions (row heads, targets, tails) ----

DISALIGN_INLINE float to_accumulate(float x) { return x; }
DISALIGN_INLINE double to_accumulate(double x) { return x; }
DISALIGN_INLINE float to_accumulate(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
DISALIGN_INLINE float to_accumulate(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent from half's bias to float's and normalises subnormals on the way.
  float f = bit_cast<float>(body) * 0x1p112f;
  if ((x.bits & 0x7c00u) == 0x7c00u) f = bit_cast<float>(body | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(f) | sign);
}

DISALIGN_INLINE void from_accumulate(float x, float* out) { *out = x; }
DISALIGN_INLINE void from_accumulate(double x, double* out) { *out = x; }
DISALIGN_INLINE void from_accumulate(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
DISALIGN_INLINE void from_accumulate(float x, Float16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // a half subnormal: let a float addition round it
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// ---- vector loads and stores ----

template <class T>
DISALIGN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DISALIGN_INLINE Vec<float> load(const BFloat16* p) {
  Lanes<float>::Half h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(__builtin_convertvector(h, Lanes<float>::U) << 16);
}
DISALIGN_INLINE Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < Lanes<float>::N; ++i) v[i] = to_accumulate(p[i]);
  return v;
#endif
}

template <class T>
DISALIGN_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}
DISALIGN_INLINE void store(BFloat16* p, Vec<float> v) {
  using U = Lanes<float>::U;
  const U bits = bit_cast<U>(v);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = bit_cast<U>((bits & 0x7fffffffu) > 0x7f800000u);
  const auto h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Lanes<float>::Half);
  std::memcpy(p, &h, sizeof(h));
}
DISALIGN_INLINE void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
#else
  for (int i = 0; i < Lanes<float>::N; ++i) from_accumulate(v[i], p + i);
#endif
}

// The first n < N lanes; the others are 0, and memory past n is neither read nor written.
template <class T>
DISALIGN_INLINE Vec<Accumulate<T>> load_tail(const T* p, int n) {
  T buffer[Lanes<Accumulate<T>>::N] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
DISALIGN_INLINE void store_tail(T* p, Vec<Accumulate<T>> v, int n) {
  T buffer[Lanes<Accumulate<T>>::N];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}
#if defined(__AVX512F__)
// Masked, since an odd C (1203) has a tail in every row and a memcpy of n bytes is a call.
DISALIGN_INLINE Vec<float> load_tail(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
DISALIGN_INLINE void store_tail(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
DISALIGN_INLINE Vec<float> load_tail(const BFloat16* p, int n) {
  BFloat16 buffer[Lanes<float>::N];
  const auto bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  std::memcpy(buffer, &bits, sizeof(buffer));
  return load(buffer);
}
#elif defined(__AVX2__)
DISALIGN_INLINE __m256i tail_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DISALIGN_INLINE Vec<float> load_tail(const float* p, int n) {
  return _mm256_maskload_ps(p, tail_mask(n));
}
DISALIGN_INLINE void store_tail(float* p, Vec<float> v, int n) {
  _mm256_maskstore_ps(p, tail_mask(n), v);
}
#endif

// full: whether all N lanes exist, known when compiling so that the body of a loop has no branch.
template <bool Full, class T>
DISALIGN_INLINE Vec<Accumulate<T>> load_lanes(const T* p, int n) {
  if constexpr (Full)
    return load(p);
  else
    return load_tail(p, n);
}
template <bool Full, class T>
DISALIGN_INLINE void store_lanes(T* p, Vec<Accumulate<T>> v, int n) {
  if constexpr (Full)
    store(p, v);
  else
    store_tail(p, v, n);
}

template <class A>
DISALIGN_INLINE typename Lanes<A>::I lane_index() {
  typename Lanes<A>::I index;
  for (int i = 0; i < Lanes<A>::N; ++i) index[i] = i;
  return index;
}

// ---- arithmetic ----

// a > b ? a : b, so a NaN in a yields b: callers see NaN through the sum of exponentials.
DISALIGN_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
DISALIGN_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <class A>
DISALIGN_INLINE A reduce_max(Vec<A> v) {
  A lane[Lanes<A>::N];
  std::memcpy(lane, &v, sizeof(v));
  for (int width = Lanes<A>::N / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
  return lane[0];
}

// In double, by halves: a chain of additions would wait for each one.
template <class A>
DISALIGN_INLINE double reduce_add(Vec<A> v) {
  double lane[Lanes<A>::N];
  for (int i = 0; i < Lanes<A>::N; ++i) lane[i] = static_cast<double>(v[i]);
  for (int width = Lanes<A>::N / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// exp(x) for x <= 0 (a little above is fine); exactly 0 for -inf and below the normal range, NaN
// for NaN. float: relative error below 1.5e-7 + 2e-8 |x|; double: below 3e-16.
DISALIGN_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  constexpr float kLog2e = 1.44269504088896341f;
  // f = x log2(e) - n. One fused operation rounds log2(e) alone; without it the product would be
  // rounded too, so that n ln(2) is taken off x in two parts first, the larger of them exact.
#if defined(__AVX512F__)
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f),
                    x);  // keeps f finite at -inf; NaN passes (2nd operand)
  const Vec<float> n = _mm512_roundscale_ps(x * kLog2e, 0);
  const Vec<float> f = _mm512_fmsub_ps(x, splat(kLog2e), n);
#else
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = x * kLog2e + kRound;
  const Vec<float> n = shifted - kRound;
#if defined(__AVX2__)
  const Vec<float> f = _mm256_fmsub_ps(x, splat(kLog2e), n);
#else
  const Vec<float> f = ((x - n * 0.693145752f) - n * 1.42860677e-6f) * kLog2e;
#endif
#endif
  // Minimax polynomial of 2^f on [-1/2, 1/2], p(0) = 1.
  Vec<float> p = f * 1.3264737e-3f + 9.6715130e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  using I = Lanes<float>::I;
  const Vec<float> scale = bit_cast<Vec<float>>((bit_cast<I>(shifted) + 127) << 23);
  return x < -87.3365f ? Vec<float>{} : p * scale;
#endif
}

DISALIGN_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  constexpr double kLog2e = 1.44269504088896340736;
  constexpr double kLn2High = 6.93147180369123816490e-01;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  constexpr double kRound = 0x1.8p52;
  const Vec<double> shifted = x * kLog2e + kRound;
  const Vec<double> n = shifted - kRound;
  const Vec<double> r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor to degree 13: the next term is 3e-18 of the sum at |r| = ln(2) / 2.
  Vec<double> p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  using I = Lanes<double>::I;
  const Vec<double> scale = bit_cast<Vec<double>>((bit_cast<I>(shifted) + 1023) << 52);
  return x < -708.0 ? Vec<double>{} : p * scale;
}

// acc[0..N) += v, in double.
DISALIGN_INLINE void accumulate(double* acc, Vec<double> v) { store(acc, load(acc) + v); }
DISALIGN_INLINE void accumulate(double* acc, Vec<float> v) {
  using HalfV = Lanes<float>::HalfV;
  HalfV half[2];
  std::memcpy(half, &v, sizeof(v));
  constexpr int n = Lanes<double>::N;
  store(acc, load(acc) + __builtin_convertvector(half[0], Vec<double>));
  store(acc + n, load(acc + n) + __builtin_convertvector(half[1], Vec<double>));
}

}  // namespace disalign::DISALIGN_CAPABILITY
