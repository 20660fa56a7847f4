// exp and log of vectors.
#pragma once

#include "cpu/simd/vec_math.h"

namespace disalign::DISALIGN_CAPABILITY {

// exp(x) for x <= 80; exactly 0 for -inf and below the normal range, NaN for NaN.
// float: relative error below 1.8e-7 + 2e-8 |x|; double: below 3e-16.
#if defined(__AVX512F__)
// x log2(e) = n + f with n a multiple of 1/32: 2^n from a table in two registers, 2^f from two
// terms. Adding kRound leaves 32 n in the low bits: the five lowest choose the table's entry, and
// all of them, moved to where the exponent is, add to its bits; the entries have taken off what
// those five add below the exponent.
alignas(64) constexpr int32_t kExp2Table[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

DISALIGN_INLINE Vec<float> exp_bounded(Vec<float> x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kRound = 0x1.8p18f;
  const __m512i low = _mm512_load_si512(kExp2Table), high = _mm512_load_si512(kExp2Table + 16);
  // Fused, the product is not rounded: f is off by what log2(e) is rounded by alone.
  const Vec<float> shifted = _mm512_fmadd_ps(x, splat(kLog2e), splat(kRound));
  const Vec<float> f = _mm512_fmsub_ps(x, splat(kLog2e), shifted - kRound);
  const __m512i bits = _mm512_castps_si512(shifted);
  const Vec<float> scale = _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(bits, 18), _mm512_permutex2var_epi32(low, bits, high)));
  // Minimax polynomial of (2^f - 1) / f on [-1/64, 1/64].
  const Vec<float> p = (f * 2.4022650e-1f + 6.9315732e-1f) * f;
  // Not "x >= ...": that would make 0 of NaN.
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat(-87.3365f), _CMP_NLT_UQ);
  return _mm512_maskz_fmadd_ps(normal, scale, p, scale);
}
#else
DISALIGN_INLINE Vec<float> exp_bounded(Vec<float> x) {
  constexpr float kLog2e = 1.44269504088896341f;
  // f = x log2(e) - n. One fused operation rounds log2(e) alone; without it the product would be
  // rounded too, so that n ln(2) is taken off x in two parts first, the larger of them exact.
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = x * kLog2e + kRound;
  const Vec<float> n = shifted - kRound;
#if defined(__AVX2__)
  const Vec<float> f = _mm256_fmsub_ps(x, splat(kLog2e), n);
#else
  const Vec<float> f = ((x - n * 0.693145752f) - n * 1.42860677e-6f) * kLog2e;
#endif
  // Minimax polynomial of 2^f on [-1/2, 1/2], p(0) = 1.
  Vec<float> p = f * 1.3264737e-3f + 9.6715130e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.0f;
  using I = Lanes<float>::I;
  const Vec<float> scale = bit_cast<Vec<float>>((bit_cast<I>(shifted) + 127) << 23);
  return x < -87.3365f ? Vec<float>{} : p * scale;
}
#endif

DISALIGN_INLINE Vec<double> exp_bounded(Vec<double> x) {
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
  using U = Lanes<double>::U;  // a sum that wraps, of numbers that do not occur
  const Vec<double> scale = bit_cast<Vec<double>>((bit_cast<U>(shifted) + 1023) << 52);
  return x < -708.0 ? Vec<double>{} : p * scale;
}

// log(x) for x >= 0: -inf at 0; NaN for NaN. Relative error below 1 ulp or so: the method and the
// coefficients are those of fdlibm's e_log.c. Numbers below the normal range do not occur.
DISALIGN_INLINE Vec<double> log_positive(Vec<double> x) {
  using I = Lanes<double>::I;
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;
  // Unsigned where the numbers that do not occur, which other lanes may hold, would overflow.
  using U = Lanes<double>::U;
  const U bits = bit_cast<U>(x);
  const I exponent = bit_cast<I>(bits - kRootHalf) >> 52;
  const Vec<double> k = __builtin_convertvector(exponent, Vec<double>);
  const Vec<double> f =
      bit_cast<Vec<double>>(bits - (bit_cast<U>(exponent) << 52)) - 1.0;  // sqrt(1/2) .. sqrt(2)
  const Vec<double> s = f / (f + 2.0);
  const Vec<double> z = s * s;
  Vec<double> r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  r = r * z;
  const Vec<double> half = f * f * 0.5;
  const Vec<double> log = k * 6.93147180369123816490e-01 -
                          ((half - (s * (half + r) + k * 1.90821492927058770002e-10)) - f);
  const Vec<double> special = x == 0.0 ? splat<double>(-kInfinity<double>) : x;  // inf, NaN
  return ((x > 0.0) & (x < kInfinity<double>)) ? log : special;
}

}  // namespace disalign::DISALIGN_CAPABILITY
