// Calibrated logits u = (1 + c a) z + c b of class planes, forward and backward.
//
// - Maps: a tile of positions, class by class, positions in registers.
// - forward: one read of the logits, one write of the output.
// - backward: one read of the output's gradient g and, unless grad_logits alone is wanted, of the
//   logits; one write of grad_logits.
#include "common/loss_math.h"
#include "cpu/kernels/calibrate_kernel.h"
#include "cpu/kernels/lanes.h"

namespace disalign::DISALIGN_CAPABILITY {
namespace {

// Neighbouring positions of one image. c: their confidence after the sigmoid, 0 past `count`.
template <class A>
struct Positions {
  int64_t image, begin, count, first;
  A *c, *slope;
};

template <class A>
Positions<A> positions_of(const CalibrateArgs& args, int64_t unit, const Chunk& chunk) {
  const int64_t tiles = calibrate_tiles(args);
  Positions<A> at;
  at.image = unit / tiles;
  at.begin = unit % tiles * kCalibrateTile;
  at.count = args.inner - at.begin < kCalibrateTile ? args.inner - at.begin : kCalibrateTile;
  at.first = at.image * args.inner + at.begin;
  at.c = static_cast<A*>(chunk.scratch);
  at.slope = at.c + kCalibrateTile;
  for (int64_t p = 0; p < kCalibrateTile; ++p)
    at.c[p] =
        p < at.count ? static_cast<A>(sigmoid(read_or<A>(args.confidence, at.first + p, 0))) : A(0);
  return at;
}

template <class T>
void forward(const CalibrateArgs& args, Chunk& chunk) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  for (int64_t unit = chunk.begin; unit < chunk.end; ++unit) {
    const auto at = positions_of<A>(args, unit, chunk);
    const A* __restrict__ c = at.c;
    for (int64_t j = 0; j < args.classes; ++j) {
      const A a = static_cast<const A*>(args.scale)[j], b = static_cast<const A*>(args.bias)[j];
      const T* z = static_cast<const T*>(args.logits) + at.image * args.outer_stride +
                   j * args.class_stride + at.begin;
      T* out = static_cast<T*>(args.output) + (at.image * args.classes + j) * args.inner + at.begin;
      for_lanes<A>(0, at.count, [&](int64_t p, int n, auto full) DISALIGN_ALWAYS_INLINE {
        constexpr bool Full = decltype(full)::value;
        const V share = load(c + p);
        store_lanes<Full>(out + p, load_lanes<Full>(z + p, n) * (share * a + A(1)) + share * b, n);
      });
    }
  }
}

template <class T>
void backward(const CalibrateArgs& args, Chunk& chunk) {
  using A = Accumulate<T>;
  using V = Vec<A>;
  if (args.class_gradients) clear_class_sums(chunk, args.classes);
  const bool logits = args.grad_logits != nullptr;
  const bool sums = args.class_gradients || args.grad_confidence;
  for (int64_t unit = chunk.begin; unit < chunk.end; ++unit) {
    const auto at = positions_of<A>(args, unit, chunk);
    const A* __restrict__ c = at.c;
    A* __restrict__ slope = at.slope;
    std::memset(slope, 0, kCalibrateTile * sizeof(A));
    for (int64_t j = 0; j < args.classes; ++j) {
      const A a = static_cast<const A*>(args.scale)[j], b = static_cast<const A*>(args.bias)[j];
      const T* z = static_cast<const T*>(args.logits) + at.image * args.outer_stride +
                   j * args.class_stride + at.begin;
      const int64_t to = (at.image * args.classes + j) * args.inner + at.begin;
      const T* g = static_cast<const T*>(args.grad_output) + to;
      T* out = static_cast<T*>(args.grad_logits) + to;
      V grad_scale{}, grad_bias{};
      for_lanes<A>(0, at.count, [&](int64_t p, int n, auto full) DISALIGN_ALWAYS_INLINE {
        constexpr bool Full = decltype(full)::value;
        const V share = load(c + p);
        const V grad = load_lanes<Full>(g + p, n);
        if (sums) {
          const V value = load_lanes<Full>(z + p, n);
          const auto masked = value == -kInfinity<A>;  // such a class adds 0, not g * -inf
          const V finite = masked ? V{} : value;
          grad_scale += grad * share * finite;
          grad_bias += grad * share;
          store(slope + p, load(slope + p) + (masked ? V{} : grad * (finite * a + b)));
        }
        if (logits) store_lanes<Full>(out + p, grad * (share * a + A(1)), n);
      });
      if (args.class_gradients) {
        chunk.grad_scale[j] += reduce_add<A>(grad_scale);
        chunk.grad_bias[j] += reduce_add<A>(grad_bias);
      }
    }
    if (!args.grad_confidence) continue;
    A* grad = static_cast<A*>(args.grad_confidence) + at.first;
    for (int64_t p = 0; p < at.count; ++p) grad[p] = c[p] * (A(1) - c[p]) * slope[p];
  }
}

template <class T>
constexpr CalibrateKernels kernels_of() {
  return {forward<T>, backward<T>};
}

}  // namespace

const CalibrateKernelTable& dense_calibrate_kernels() {
  static const CalibrateKernelTable table{kernels_of<double>(), kernels_of<float>(),
                                          kernels_of<BFloat16>(), kernels_of<Float16>()};
  return table;
}

}  // namespace disalign::DISALIGN_CAPABILITY
