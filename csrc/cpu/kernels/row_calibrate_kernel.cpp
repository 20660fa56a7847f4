// Calibrated logits u = (1 + c a) z + c b over rows, forward and backward.
//
// - Maps: as row_kernel.cpp, kRowBlock rows together, classes in registers.
// - forward: one read of the logits, one write of the output.
// - backward: one read of the output's gradient g and, unless grad_logits alone is wanted, of the
//   logits; one write of grad_logits.
#include "common/loss_math.h"
#include "cpu/kernels/calibrate_kernel.h"
#include "cpu/kernels/lanes.h"
#include "cpu/kernels/row_kernel.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

template <class T>
DISALIGN_INLINE Accumulate<T> confidence_of(const CalibrateArgs& args, int64_t row) {
  using A = Accumulate<T>;
  return static_cast<A>(sigmoid(read_or<A>(args.confidence, row, 0)));
}

template <class T, int R>
void forward_block(const CalibrateArgs& args, int64_t row) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const A* scale = static_cast<const A*>(args.scale);
  const A* bias = static_cast<const A*>(args.bias);
  const T* z[R];
  T* out[R];
  A c[R];
  for (int r = 0; r < R; ++r) {
    z[r] = static_cast<const T*>(args.logits) + (row + r) * args.outer_stride;
    out[r] = static_cast<T*>(args.output) + (row + r) * args.classes;
    c[r] = confidence_of<T>(args, row + r);
  }
  for_lanes<A>(0, args.classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    const V a = load_lanes<Full>(scale + j, n);
    const V b = load_lanes<Full>(bias + j, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V u = load_lanes<Full>(z[r] + j, n) * (a * c[r] + A(1)) + b * c[r];
      store_lanes<Full>(out[r] + j, u, n);
    }
  });
}

template <class T, int R>
void backward_block(const CalibrateArgs& args, int64_t row, Chunk& chunk) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  const A* scale = static_cast<const A*>(args.scale);
  const A* bias = static_cast<const A*>(args.bias);
  const bool logits = args.grad_logits != nullptr;
  const bool classes = args.class_gradients;
  const bool slopes = args.grad_confidence != nullptr;
  const T *z[R], *g[R];
  T* out[R];
  A c[R];
  V slope[R];
  for (int r = 0; r < R; ++r) {
    z[r] = static_cast<const T*>(args.logits) + (row + r) * args.outer_stride;
    g[r] = static_cast<const T*>(args.grad_output) + (row + r) * args.classes;
    out[r] =
        logits ? static_cast<T*>(args.grad_logits) + (row + r) * args.grad_outer_stride : nullptr;
    c[r] = confidence_of<T>(args, row + r);
    slope[r] = V{};
  }
  for_lanes<A>(0, args.classes, [&](int64_t j, int n, auto full) DISALIGN_ALWAYS_INLINE {
    constexpr bool Full = decltype(full)::value;
    const V a = load_lanes<Full>(scale + j, n);
    const V b = load_lanes<Full>(bias + j, n);
    V grad_scale{}, grad_bias{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V grad = load_lanes<Full>(g[r] + j, n);
      if (classes || slopes) {
        const V value = load_lanes<Full>(z[r] + j, n);
        const auto masked = value == -kInfinity<A>;  // such a class adds 0, not g * -inf
        const V finite = masked ? V{} : value;
        grad_scale += grad * c[r] * finite;
        grad_bias += grad * c[r];
        slope[r] += masked ? V{} : grad * (a * finite + b);
      }
      if (logits) store_lanes<Full>(out[r] + j, grad * (a * c[r] + A(1)), n);
    }
    if (classes) {
      accumulate(chunk.grad_scale + j, grad_scale);
      accumulate(chunk.grad_bias + j, grad_bias);
    }
  });
  if (!slopes) return;
  for (int r = 0; r < R; ++r) {
    const double s = static_cast<double>(c[r]) * (1.0 - static_cast<double>(c[r]));
    static_cast<A*>(args.grad_confidence)[row + r] = static_cast<A>(s * reduce_add<A>(slope[r]));
  }
}

template <class T>
void forward(const CalibrateArgs& args, Chunk& chunk) {
  int64_t i = chunk.begin;
  for (; i + kRowBlock <= chunk.end; i += kRowBlock) forward_block<T, kRowBlock>(args, i);
  for (; i < chunk.end; ++i) forward_block<T, 1>(args, i);
}

template <class T>
void backward(const CalibrateArgs& args, Chunk& chunk) {
  if (args.class_gradients) clear_class_sums(chunk, args.classes);
  int64_t i = chunk.begin;
  for (; i + kRowBlock <= chunk.end; i += kRowBlock) backward_block<T, kRowBlock>(args, i, chunk);
  for (; i < chunk.end; ++i) backward_block<T, 1>(args, i, chunk);
}

template <class T>
constexpr CalibrateKernels kernels_of() {
  return {forward<T>, backward<T>};
}

}  // namespace

const CalibrateKernelTable& row_calibrate_kernels() {
  static const CalibrateKernelTable table{kernels_of<double>(), kernels_of<float>(),
                                          kernels_of<BFloat16>(), kernels_of<Float16>()};
  return table;
}

}  // namespace disalign::DISALIGN_CAPABILITY
