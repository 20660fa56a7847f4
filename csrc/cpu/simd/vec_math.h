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
#define DISALIGN_NOINLINE __attribute__((noinline))            // compiled once, for all its callers

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
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
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

// Past the cache, for memory that nothing reads again soon: the lines are not fetched before they
// are overwritten. Aligned to kVectorBytes, by whoever calls; other storage types store as ever.
template <class T>
DISALIGN_INLINE void stream(T* p, Vec<Accumulate<T>> v) {
  store(p, v);
}
#if defined(__AVX512F__)
DISALIGN_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, v); }
DISALIGN_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, v); }
#elif defined(__AVX2__)
DISALIGN_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, v); }
DISALIGN_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, v); }
#endif

// After the last stream: whoever sees what comes next in this thread sees what was streamed.
DISALIGN_INLINE void stream_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

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
#if defined(__AVX512F__)
// The same without a way through memory, which costs as much as 20 classes of a row.
template <>
DISALIGN_INLINE float reduce_max<float>(Vec<float> v) {
  return _mm512_reduce_max_ps(v);
}
template <>
DISALIGN_INLINE double reduce_add<float>(Vec<float> v) {
  return _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)) +
                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}
#endif

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
