// What every CUDA kernel uses: storage types, 16-byte IO, arithmetic. Device code only, no torch:
// tests/simt compiles it as C++ and executes it on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/loss_args.h"

// The seams to tests/simt, where global memory traffic is counted and shared memory is poisoned.
// CUDA has one name for all dynamic shared memory of a module, hence the macro.
#if defined(DISALIGN_SIMT)
#define DISALIGN_NOTE_LOAD(address, bytes) ::simt::note_load(address, bytes)
#define DISALIGN_NOTE_STORE(address, bytes) ::simt::note_store(address, bytes)
#define DISALIGN_SHARED_MEMORY(name) unsigned char* name = ::simt::dynamic_shared()
#define DISALIGN_ASSERT(condition, message)  \
  do {                                       \
    if (!(condition)) ::simt::fail(message); \
  } while (0)
#else
#define DISALIGN_NOTE_LOAD(address, bytes)
#define DISALIGN_NOTE_STORE(address, bytes)
#define DISALIGN_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
// As PyTorch's device-side assert; without assert (NDEBUG) the kernel stops all the same.
#define DISALIGN_ASSERT(condition, message) \
  do {                                      \
    if (!(condition)) {                     \
      assert(false && (message));           \
      __trap();                             \
    }                                       \
  } while (0)
#endif

namespace disalign::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;  // of the widest load

template <class T>
struct Storage {
  using Accumulate = float;
};
template <>
struct Storage<double> {
  using Accumulate = double;
};
template <class T>
using Accumulate = typename Storage<T>::Accumulate;

// Elements of T in a 16-byte vector.
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_accumulate(float v) { return v; }
__device__ __forceinline__ double to_accumulate(double v) { return v; }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_accumulate(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> v);
template <>
__device__ __forceinline__ float from_accumulate<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_accumulate<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulate<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_accumulate<__half>(float v) {
  return __float2half_rn(v);
}

// Logits and their gradient go through these four, so that tests/simt sees every access.
template <class T>
__device__ __forceinline__ T load_one(const T* p) {
  DISALIGN_NOTE_LOAD(p, sizeof(T));
  return *p;
}

template <class T>
__device__ __forceinline__ void store_one(T* p, T v) {
  DISALIGN_NOTE_STORE(p, sizeof(T));
  *p = v;
}

// 16 bytes in registers: every use is unrolled.
struct Raw {
  uint32_t word[4];
};

__device__ __forceinline__ Raw load_vector(const void* p) {
  DISALIGN_NOTE_LOAD(p, kVectorBytes);
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_vector(void* p, Raw raw) {
  DISALIGN_NOTE_STORE(p, kVectorBytes);
  *static_cast<uint4*>(p) = make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]);
}

// The bits of one element, and element v of a vector from and to them.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <class T>
__device__ __forceinline__ Bits<T> bits_of(T v) {
  Bits<T> bits;
  memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <class T>
__device__ __forceinline__ T from_bits(Bits<T> bits) {
  T v;
  memcpy(static_cast<void*>(&v), &bits, sizeof(T));
  return v;
}

template <class T>
__device__ __forceinline__ T element(const Raw& raw, int v) {
  if constexpr (sizeof(T) == 2)
    return from_bits<T>(static_cast<uint16_t>(raw.word[v / 2] >> (v % 2 * 16)));
  else if constexpr (sizeof(T) == 4)
    return from_bits<T>(raw.word[v]);
  else
    return from_bits<T>(raw.word[2 * v] | uint64_t{raw.word[2 * v + 1]} << 32);
}

template <class T>
__device__ __forceinline__ void set_element(Raw& raw, int v, T value) {
  const auto bits = bits_of(value);
  if constexpr (sizeof(T) == 2) {
    const int shift = v % 2 * 16;
    raw.word[v / 2] = (raw.word[v / 2] & ~(0xffffu << shift)) | uint32_t{bits} << shift;
  } else if constexpr (sizeof(T) == 4) {
    raw.word[v] = bits;
  } else {
    raw.word[2 * v] = static_cast<uint32_t>(bits);
    raw.word[2 * v + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

template <class A>
constexpr A kLowest = static_cast<A>(-FLT_MAX);
template <>
inline constexpr double kLowest<double> = -DBL_MAX;

// The larger one; that which is no NaN. One instruction of a float.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return std::fmax(a, b);
}

// Entries of the arithmetic type that one load brings from shared memory: kernels work on so many
// elements at a time, a part of a vector, which bounds the registers they need.
template <class T>
constexpr int kPart = kVector<Accumulate<T>>;

// Two neighbouring elements of half precision from and to a word, in as few instructions as there are.
__device__ __forceinline__ void unpack_pair(uint32_t word, __nv_bfloat16, float& low, float& high) {
  low = from_bits<float>(word << 16);
  high = from_bits<float>(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_pair(uint32_t word, __half, float& low, float& high) {
  low = __half2float(from_bits<__half>(static_cast<uint16_t>(word)));
  high = __half2float(from_bits<__half>(static_cast<uint16_t>(word >> 16)));
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Two elements of a word, the lowest finite number where they are -inf.
__device__ __forceinline__ uint32_t finite_pair(uint32_t word, __nv_bfloat16) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0xff7fff7fu));
  return word;
}
__device__ __forceinline__ uint32_t finite_pair(uint32_t word, __half) {
  asm("max.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0xfbfffbffu));
  return word;
}
#endif

template <class T>
__device__ __forceinline__ void unpack(const Raw& raw, int part, Accumulate<T> (&out)[kPart<T>]) {
#pragma unroll
  for (int q = 0; q < kPart<T>; ++q) {
    if constexpr (sizeof(T) == 2) {
      if (q % 2 == 0) unpack_pair(raw.word[(part * kPart<T> + q) / 2], T(), out[q], out[q + 1]);
    } else {
      out[q] = to_accumulate(element<T>(raw, part * kPart<T> + q));
    }
  }
}

// A vector's elements, all of them.
template <class T>
__device__ __forceinline__ void unpack_vector(const Raw& raw, Accumulate<T> (&out)[kVector<T>]) {
#pragma unroll
  for (int part = 0; part < kVector<T> / kPart<T>; ++part) {
    Accumulate<T> z[kPart<T>];
    unpack<T>(raw, part, z);
#pragma unroll
    for (int q = 0; q < kPart<T>; ++q) out[part * kPart<T> + q] = z[q];
  }
}

// A part, with the lowest finite number of T or of the arithmetic for -inf.
template <class T>
__device__ __forceinline__ void unpack_finite(Raw raw, int part, Accumulate<T> (&out)[kPart<T>]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool kInPairs = sizeof(T) == 2;  // one instruction for two elements
#else
  constexpr bool kInPairs = false;
#endif
  if constexpr (kInPairs) {
#pragma unroll
    for (int q = 0; q < kPart<T>; q += 2) {
      uint32_t& word = raw.word[(part * kPart<T> + q) / 2];
      word = finite_pair(word, T());
    }
  }
  unpack<T>(raw, part, out);
  if constexpr (!kInPairs) {
#pragma unroll
    for (int q = 0; q < kPart<T>; ++q) out[q] = larger(out[q], kLowest<Accumulate<T>>);
  }
}

template <class T>
__device__ __forceinline__ void pack(const Accumulate<T>* in, int part, Raw& raw) {
#pragma unroll
  for (int q = 0; q < kPart<T>; ++q) {
    const int v = part * kPart<T> + q;
    if constexpr (sizeof(T) == 2) {
      if (q % 2 == 0) raw.word[v / 2] = pack_pair(in[q], in[q + 1], T());
    } else {
      set_element(raw, v, from_accumulate<T>(in[q]));
    }
  }
}

__device__ __forceinline__ Raw read_shared(const unsigned char* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void write_shared(unsigned char* to, Raw raw) {
  *reinterpret_cast<uint4*>(to) = make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]);
}

// An address in shared memory that the compiler keeps, if it shall, and does not make anew wherever it
// is used.
template <bool Keeps, class V>
__device__ __forceinline__ V* kept_address(V* shared) {
#if defined(__CUDA_ARCH__)
  if constexpr (Keeps) {
    auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm("" : "+r"(address));
    return static_cast<V*>(__cvta_shared_to_generic(address));
  }
#endif
  return shared;
}

// What is in shared memory is loaded again after this: registers that would keep it are few.
__device__ __forceinline__ void forget_loads() { __syncwarp(); }

template <class A>
__device__ __forceinline__ void store_shared(A* to, const A (&values)[kVector<A>]) {
  Raw raw = {};
#pragma unroll
  for (int v = 0; v < kVector<A>; ++v) set_element(raw, v, values[v]);
  write_shared(reinterpret_cast<unsigned char*>(to), raw);
}

template <class A>
__device__ __forceinline__ void load_shared(const A* from, A (&out)[kVector<A>]) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  unpack<A>(Raw{{v.x, v.y, v.z, v.w}}, 0, out);
}

// MUFU.EX2. Subnormal results are 0.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  const float power = std::exp2(x);
  return power < FLT_MIN ? 0.0f : power;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A product and MUFU.EX2: __expf is twice as many, so as to keep subnormal results.
__device__ __forceinline__ float exponential(float x) { return power_of_two(x * kLog2E); }
__device__ __forceinline__ double exponential(double x) { return std::exp(x); }

// 1 / x to the last bit but one, of a normal x: a division is ten instructions and a branch.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / x;
#endif
}
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// u becomes exp(u - maximum) times a factor that all of them share; returns what takes it off. A
// float's difference and product with log2 e are one multiply-add: the factor is what maximum * log2 e
// is rounded by.
template <class A, int Count>
__device__ __forceinline__ A make_exponentials(A (&u)[Count], A maximum) {
  if constexpr (std::is_same_v<A, float>) {
    if (std::fabs(maximum) < 1e6f) {  // beyond, the factor would leave the range of floats
      const float product = maximum * kLog2E;
#pragma unroll
      for (int p = 0; p < Count; ++p) u[p] = power_of_two(std::fma(u[p], kLog2E, -product));
      return power_of_two(std::fma(-maximum, kLog2E, product));
    }
  }
#pragma unroll
  for (int p = 0; p < Count; ++p) u[p] = exponential(u[p] - maximum);
  return 1;
}

// The same of one u, by a shift that others have too: shifted_exponential(u, shift_product(shift)) and
// the factor `correction`. Where that would leave the range of floats the shift is not `is_near`.
template <class A>
__device__ __forceinline__ bool is_near(A shift) {
  return std::is_same_v<A, double> || std::fabs(shift) < A(1e6);
}
template <class A>
__device__ __forceinline__ A correction(A shift) {
  if constexpr (std::is_same_v<A, double>)
    return 1;
  else
    return power_of_two(std::fma(-shift, kLog2E, shift * kLog2E));
}
template <class A>
__device__ __forceinline__ A shifted_exponential(A u, A product) {
  if constexpr (std::is_same_v<A, double>)
    return exponential(u - product);
  else
    return power_of_two(std::fma(u, kLog2E, -product));
}
template <class A>
__device__ __forceinline__ A shift_product(A shift) {
  return std::is_same_v<A, double> ? shift : shift * static_cast<A>(kLog2E);
}

template <class A>
__device__ __forceinline__ A negative_infinity() {
  return static_cast<A>(-INFINITY);
}

// z + c (a z + b), the same bits wherever it is inlined.
template <class A>
__device__ __forceinline__ A calibrated(A z, A a, A b, A c) {
  return std::fma(z, std::fma(a, c, A(1)), b * c);
}

template <class A>
__device__ __forceinline__ A finite_or_zero(A v) {
  return std::fabs(v) <= -kLowest<A> ? v : A(0);
}

template <class A>
__device__ __forceinline__ A vector_entry(const void* vector, int64_t i, A absent) {
  return vector ? static_cast<const A*>(vector)[i] : absent;
}

}  // namespace disalign::cuda
