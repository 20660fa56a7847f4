// What the dense operators launch where targets are class probabilities; as dense_launch.h.
#pragma once

#include "cuda/kernels/soft_dense_kernel.cuh"
#include "cuda/launch/dense_launch.h"

namespace disalign::cuda {

// Returns the bytes of shared memory. A tile stays there whole if it fits; two blocks a multiprocessor,
// if their tiles are not too narrow for it.
template <class T>
int64_t divide_soft_dense(DenseArgs& args, const Limits& limits) {
  constexpr int64_t V = kVector<T>;
  constexpr int kLeast = 2, kLine = 3;    // exponents: 64 and 128 bytes of a plane
  constexpr int64_t kRoundsOfThread = 4;  // at least, that the sums over its slices are worth
  const int64_t limit = static_cast<int64_t>(limits.shared_bytes);
  const int64_t half = (limit - kReservedBytes) / 2;
  const auto rounds_of = [&](int bits) { return divide_up(args.classes, kDenseThreads >> bits); };
  const auto tiles_of = [&](int bits) { return divide_up(args.inner, V << bits); };
  // The bytes of a tile of so many rounds. The class vectors and the class sums stay in global memory
  // where they would not leave two rounds.
  const auto divide = [&](int bits, int64_t rounds) {
    using Memory = SoftDenseMemory<T>;
    args.lane_bits = bits;
    args.lanes = 1 << bits;
    args.slices = kDenseThreads >> bits;
    args.rounds = 0;
    args.table =
        needs_soft_entries(args) &&
        args.classes * static_cast<int64_t>(sizeof(ClassEntry<Accumulate<T>>)) <= kDenseTableBytes;
    args.shared_sums =
        args.class_gradients &&
        DenseMemory<T>::sum_entries(args) * static_cast<int64_t>(sizeof(ClassSum<Accumulate<T>>)) <=
            kDenseSumBytes;
    const int64_t least = 2 * Memory::round_bytes(args);
    args.table = args.table && Memory::divide(args) + least <= limit;
    args.shared_sums = args.shared_sums && Memory::divide(args) + least <= limit;
    args.rounds = static_cast<int32_t>(rounds);
    return Memory::divide(args);
  };
  int bits = kLine;
  while (bits < kDenseThreadBits && rounds_of(bits) < kRoundsOfThread) ++bits;
  while (bits > kLeast && tiles_of(bits - 1) == 1) --bits;
  while (bits > kLeast && args.outer * tiles_of(bits) < int64_t{2} * limits.multiprocessors) --bits;
  const auto whole = [&](int exponent) {
    return divide(exponent, std::max<int64_t>(1, rounds_of(exponent)));
  };
  int narrow = bits;
  while (narrow > kLeast && whole(narrow) > half) --narrow;
  int64_t bytes = whole(narrow);
  if (bytes > limit) {  // in chunks, which are read once a pass
    narrow = std::min(bits, kLine);
    const int64_t fixed = divide(narrow, 0), round = SoftDenseMemory<T>::round_bytes(args);
    const int64_t in_half = (half - fixed) / round;
    bytes = divide(narrow, std::max<int64_t>(1, in_half < 2 ? (limit - fixed) / round : in_half));
  }
  args.chunks =
      static_cast<int32_t>(divide_up(std::max<int64_t>(1, rounds_of(narrow)), args.rounds));
  args.image_tiles = static_cast<int32_t>(tiles_of(narrow));
  args.last_positions =
      static_cast<int32_t>(args.inner - (int64_t{args.image_tiles} - 1) * (V << narrow));
  return bytes;
}

// Whether 16 bytes of both inputs' planes can be read, and of the gradient's written, at once.
template <class T>
bool has_whole_soft_vectors(const DenseArgs& args) {
  const int64_t size = args.probabilities_of_a ? sizeof(Accumulate<T>) : sizeof(T);
  const int64_t strides = (args.probability_class_stride | args.probability_outer_stride) * size;
  return has_whole_vectors<T>(args) &&
         (reinterpret_cast<uintptr_t>(args.probabilities) | static_cast<uintptr_t>(strides)) %
                 kVectorBytes ==
             0;
}

// Planes that are not aligned, and doubles, are read element by element.
template <class T, bool Calibrated>
auto soft_dense_kernel_of(const DenseArgs& args) {
  if constexpr (sizeof(T) < 8) {
    if (has_whole_soft_vectors<T>(args)) return soft_dense_kernel<T, Calibrated, true>;
  }
  return soft_dense_kernel<T, Calibrated, false>;
}

template <class T, bool Calibrated, class Launcher>
void launch_soft_dense_kernel(Launcher& launcher, DenseArgs& args, FinishArgs& last) {
  const int64_t shared_bytes = divide_soft_dense<T>(args, launcher.limits());
  launch_dense_kernel<T>(launcher, soft_dense_kernel_of<T, Calibrated>(args), shared_bytes, args,
                         last);
}

template <class Launcher>
void launch_soft_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    using T = typename decltype(type)::type;
    run_dense_forward<Accumulate<T>>(
        launcher, args, dtype, [&](DenseArgs& divided, FinishArgs& last) {
          launch_soft_dense_kernel<T, decltype(calibrated)::value>(launcher, divided, last);
        });
  });
}

template <class Launcher>
void launch_soft_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    using T = typename decltype(type)::type;
    run_dense_backward(launcher, args, dtype, [&](DenseArgs& divided, FinishArgs& last) {
      launch_soft_dense_kernel<T, decltype(calibrated)::value>(launcher, divided, last);
    });
  });
}

}  // namespace disalign::cuda
