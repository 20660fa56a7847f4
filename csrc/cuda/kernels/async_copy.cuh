// Asynchronous copies of 16 bytes from global to shared memory.
#pragma once

#include "cuda/kernels/device.cuh"

namespace disalign::cuda {

// Vector `At` after `from` to the same place after `shared`, if there are more than so many. It is on
// its way until wait_for_copies: what a thread copies it sees after its own wait, other threads
// after a barrier that follows. sm_75 has no such copies, and waits here.
template <int At, int Middle>
__device__ __forceinline__ void copy_vector(unsigned char* shared, const unsigned char* from,
                                            int vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // In one piece, or there would be a branch and an addition of 64 bits for each vector.
  asm volatile(
      "{ .reg .pred there; setp.gt.s32 there, %2, %3;\n"
      "@there cp.async.cg.shared.global [%0 + %4], [%1 + %5], 16; }" ::"r"(
          static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(from), "r"(vectors), "n"(At), "n"(At * kVectorBytes), "n"((At - Middle) * kVectorBytes)
      : "memory");
#else
  if (vectors <= At) return;
  const unsigned char* begin = from + (At - Middle) * kVectorBytes;
  DISALIGN_NOTE_LOAD(begin, kVectorBytes);
#if defined(DISALIGN_SIMT)
  ::simt::copy_async(shared + At * kVectorBytes, begin, kVectorBytes);
#else
  *reinterpret_cast<uint4*>(shared + At * kVectorBytes) = *reinterpret_cast<const uint4*>(begin);
#endif
#endif
}

// The same of one vector that there is.
__device__ __forceinline__ void copy_vector(unsigned char* shared, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(from)
               : "memory");
#else
  DISALIGN_NOTE_LOAD(from, kVectorBytes);
#if defined(DISALIGN_SIMT)
  ::simt::copy_async(shared, from, kVectorBytes);
#else
  *reinterpret_cast<uint4*>(shared) = *static_cast<const uint4*>(from);
#endif
#endif
}

// Of so many vectors, every 32nd, the one that the addresses are made from: an instruction adds from
// -2048 to 2047 bytes.
template <int Count>
constexpr int kMiddleVector = 32 * (Count / 2 < 4 ? Count / 2 : 4);

// Every 32nd vector of those that there are: so many from this lane's first on. middle: of
// kMiddleVector.
template <int... k>
__device__ __forceinline__ void copy_vectors(unsigned char* shared, const void* middle, int vectors,
                                             std::integer_sequence<int, k...>) {
  constexpr int kMiddle = kMiddleVector<sizeof...(k)>;
  (copy_vector<32 * k, kMiddle>(shared, static_cast<const unsigned char*>(middle), vectors), ...);
}

// Ends a group of copies; a group may be empty.
__device__ __forceinline__ void commit_copies() {
#if defined(DISALIGN_SIMT)
  ::simt::commit_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of this thread's groups but the last `Pending` have arrived.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(DISALIGN_SIMT)
  ::simt::wait_for_copies(Pending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace disalign::cuda
