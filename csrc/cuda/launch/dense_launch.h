// What the dense operators launch; as row_launch.h.
#pragma once

#include <algorithm>

#include "cuda/kernels/dense_kernel.cuh"
#include "cuda/launch/dispatch.h"
#include "cuda/launch/finish_launch.h"

namespace disalign::cuda {

// Classes of a thread that a stage has, at most, but where forward makes gradients: a tile that is
// needed twice stays in one stage if it fits.
constexpr int kDenseRounds = 12;
// Class vectors and class sums lie in shared memory up to so many bytes each.
constexpr int64_t kDenseTableBytes = 32 << 10, kDenseSumBytes = 48 << 10;
// The system takes so much shared memory of each block; a block alone may have all the rest.
constexpr int64_t kReservedBytes = 1 << 10;

// Whether 16 bytes of a plane can be read, and written, at once.
template <class T>
bool has_whole_vectors(const DenseArgs& args) {
  const auto whole = [&](const void* plane, int64_t class_stride, int64_t outer_stride) {
    const int64_t strides = (class_stride | outer_stride) * static_cast<int64_t>(sizeof(T));
    return (reinterpret_cast<uintptr_t>(plane) | static_cast<uintptr_t>(strides)) % kVectorBytes ==
           0;
  };
  return args.inner % kVector<T> == 0 && whole(args.logits, args.class_stride, args.outer_stride) &&
         (!args.grad_logits ||
          whole(args.grad_logits, args.grad_class_stride, args.grad_outer_stride));
}

// By how much the multiprocessor with the most of so many tiles has more than the mean.
static inline double imbalance(int64_t tiles, int multiprocessors) {
  return static_cast<double>(divide_up(tiles, multiprocessors) * multiprocessors) /
         static_cast<double>(tiles);
}

// Returns the bytes of shared memory.
template <class T>
int64_t divide_dense(DenseArgs& args, const Limits& limits) {
  const bool second_pass = args.grad_logits || args.class_gradients || args.grad_confidence;
  const bool two_passes = !args.backward && second_pass;
  constexpr int64_t V = kVector<T>;
  const auto rounds_of = [&](int bits) { return divide_up(args.classes, kDenseThreads >> bits); };
  const auto tiles_of = [&](int bits) { return divide_up(args.inner, V << bits); };
  constexpr int kLeast = 2, kLine = 3;  // exponents: 64 and 128 bytes of a plane
  int bits = kDenseThreadBits;
  while ((V << bits) > 4 * kDenseThreads)
    --bits;  // a thread works on four positions alone, at most
  while (bits > kLeast && tiles_of(bits - 1) == 1) --bits;
  while (bits > kLine && rounds_of(bits) > kDenseRounds) --bits;
  while (bits > kLeast && args.outer * tiles_of(bits) < int64_t{64} * limits.multiprocessors &&
         imbalance(args.outer * tiles_of(bits), limits.multiprocessors) > 1.1)
    --bits;
  constexpr int64_t kRound = kDenseStages * kDenseRoundBytes;
  const int64_t limit = static_cast<int64_t>(limits.shared_bytes);
  // The shared memory that is not the stages'. The class vectors and the class sums stay in global
  // memory where they would not leave the stages two rounds.
  const auto set_lanes = [&](int exponent) {
    const auto bytes = [&] { return DenseMemory<T>::divide(args, second_pass); };
    args.lane_bits = exponent;
    args.lanes = 1 << exponent;
    args.slices = kDenseThreads >> exponent;
    args.rounds = 0;
    args.table =
        needs_class_entries(args) &&
        args.classes * static_cast<int64_t>(sizeof(ClassEntry<Accumulate<T>>)) <= kDenseTableBytes;
    args.shared_sums =
        args.class_gradients &&
        DenseMemory<T>::sum_entries(args) * static_cast<int64_t>(sizeof(ClassSum<Accumulate<T>>)) <=
            kDenseSumBytes;
    args.table = args.table && bytes() + 2 * kRound <= limit;
    args.shared_sums = args.shared_sums && bytes() + 2 * kRound <= limit;
    return bytes();
  };
  int64_t all, rounds;
  for (;; --bits) {
    const int64_t fixed = set_lanes(bits), most = (limit - fixed) / kRound;
    // Two blocks a multiprocessor, if their stages are not too small for it.
    const int64_t half = ((limit - kReservedBytes) / 2 - fixed) / kRound;
    all = std::max<int64_t>(1, rounds_of(bits));
    rounds = std::clamp<int64_t>(half < 4 ? most : half, 1, kDenseRounds);
    if (two_passes && all <= most) rounds = all;  // read once
    if ((all <= rounds && most > 0) || bits <= (two_passes ? kLeast : kLine)) break;
  }
  args.image_tiles = static_cast<int32_t>(tiles_of(bits));
  args.last_positions =
      static_cast<int32_t>(args.inner - (int64_t{args.image_tiles} - 1) * (V << bits));
  args.chunks = static_cast<int32_t>(divide_up(all, rounds));
  args.rounds = static_cast<int32_t>(divide_up(all, args.chunks));
  return DenseMemory<T>::divide(args, second_pass);
}

// Not every combination is compiled: planes that are not aligned, and doubles, are read element by
// element, whatever the options.
template <class T, bool Calibrated>
auto dense_kernel_of(const DenseArgs& args) {
  if constexpr (sizeof(T) < 8) {
    if (has_whole_vectors<T>(args))
      return has_options(args) ? dense_kernel<T, Calibrated, true, true>
                               : dense_kernel<T, Calibrated, true, false>;
  }
  return dense_kernel<T, Calibrated, false, true>;
}

// Of tiles that are divided already.
template <class T, class Launcher>
void launch_dense_kernel(Launcher& launcher, void (*kernel)(DenseArgs), int64_t shared_bytes,
                         DenseArgs& args, FinishArgs& last) {
  Shape shape;
  shape.threads = kDenseThreads;
  shape.shared_bytes = static_cast<size_t>(shared_bytes);
  const int blocks = launcher.blocks_per_multiprocessor(kernel, shape.threads, shape.shared_bytes);
  shape.grid_x = std::min(int64_t{launcher.limits().multiprocessors} * std::max(1, blocks),
                          args.outer * args.image_tiles);
  last.blocks = shape.grid_x;
  if (!args.backward && args.reduction != kReduceNone)
    args.block_sums = static_cast<double*>(launcher.allocate(2 * last.blocks * sizeof(double)));
  if (args.class_gradients) {
    last.class_blocks = shape.grid_x;
    args.class_sums =
        launcher.allocate(2 * last.class_blocks * args.classes * sizeof(Accumulate<T>));
    if (!args.shared_sums)
      args.thread_sums = launcher.allocate(last.class_blocks * DenseMemory<T>::sum_entries(args) *
                                           sizeof(ClassSum<Accumulate<T>>));
  }
  launcher.launch(kernel, shape, args);
}

template <class T, bool Calibrated, class Launcher>
void launch_dense_kernel(Launcher& launcher, DenseArgs& args, FinishArgs& last) {
  const int64_t shared_bytes = divide_dense<T>(args, launcher.limits());
  launch_dense_kernel<T>(launcher, dense_kernel_of<T, Calibrated>(args), shared_bytes, args, last);
}

// launch_kernel(args, last): the kernel of the positions.
template <class A, class Launcher, class LaunchKernel>
void run_dense_forward(Launcher& launcher, DenseArgs args, Dtype dtype,
                       LaunchKernel launch_kernel) {
  FinishArgs last;
  if (args.positions() > 0) {
    begin_forward<A>(launcher, args);
    launch_kernel(args, last);
  }
  if (args.ticket) return;
  static_cast<DivisorArgs&>(last) = args;
  last.forward = true;
  last.block_sums = args.block_sums;
  last.class_sums = args.class_sums;
  last.confidences = args.positions();
  finish(launcher, dtype, last);
}

template <class Launcher, class LaunchKernel>
void run_dense_backward(Launcher& launcher, DenseArgs args, Dtype dtype,
                        LaunchKernel launch_kernel) {
  FinishArgs last;
  args.backward = true;
  if (args.positions() > 0) launch_kernel(args, last);
  if (!args.class_gradients) return;
  static_cast<DivisorArgs&>(last) = args;
  last.grad_confidence = nullptr;  // written by the kernel
  last.class_sums = args.class_sums;
  finish(launcher, dtype, last);
}

template <class Launcher>
void launch_dense_forward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    using T = typename decltype(type)::type;
    run_dense_forward<Accumulate<T>>(
        launcher, args, dtype, [&](DenseArgs& divided, FinishArgs& last) {
          launch_dense_kernel<T, decltype(calibrated)::value>(launcher, divided, last);
        });
  });
}

template <class Launcher>
void launch_dense_backward(Launcher& launcher, Dtype dtype, const DenseArgs& args) {
  for_kernel(dtype, args, [&](auto type, auto calibrated) {
    using T = typename decltype(type)::type;
    run_dense_backward(launcher, args, dtype, [&](DenseArgs& divided, FinishArgs& last) {
      launch_dense_kernel<T, decltype(calibrated)::value>(launcher, divided, last);
    });
  });
}

}  // namespace disalign::cuda
