// Low-resolution rows of the upsampling kernels: in, calibrated and with the classes inmost; and
// out, as the gradients of everything that made them.
#pragma once

#include "common/loss_math.h"
#include "cpu/kernels/lanes.h"
#include "cpu/kernels/upsample_kernel.h"

namespace disalign::DISALIGN_CAPABILITY {

// What stands for -inf: finite, so that 0 times it is 0 between two columns, and so low that its
// exponential is 0. A position whose maximum is below kNothing has no class left.
template <class A>
constexpr A kMasked = -std::numeric_limits<A>::max() / 4;
template <class A>
constexpr A kNothing = kMasked<A> / 16;

// Rows of x.in columns of padded() classes, and what belongs to columns.
template <class A>
struct UpsampleScratch {
  A *upper, *lower;            // calibrated logits of rows r and r + 1
  A* blend;                    // of both, at the output row
  A *grad_upper, *grad_lower;  // gradients of the calibrated logits of rows r and r + 1
  A* grad_blend;
  A *first, *last;    // gradients of the chunk's first row and of the one after its last: join's
  A *strip, *spread;  // kStrip positions of padded() classes; see Strip
  A *c, *slope;       // a column each: confidence after the sigmoid; sum_j g_j d_j
  void* positions;

  UpsampleScratch(const UpsampleArgs& args, void* memory) {
    A* next = static_cast<A*>(memory);
    A** const rows[kUpsampleRows] = {&upper,      &lower,      &blend, &grad_upper,
                                     &grad_lower, &grad_blend, &first, &last};
    for (A** row : rows) {
      *row = next;
      next += args.row_values();
    }
    strip = next;
    spread = args.probabilities ? strip + kStrip * args.padded() : nullptr;
    c = strip + upsample_strips(args) * kStrip * args.padded();
    slope = c + padded(args.x.in);
    positions = slope + padded(args.x.in);
  }
};

template <class A>
void clear_row(const UpsampleArgs& args, A* row) {
  std::memset(row, 0, args.row_values() * sizeof(A));
}

template <class A>
void load_confidence(const UpsampleArgs& args, int64_t image, int64_t row, A* c) {
  const int64_t first = (image * args.y.in + row) * args.x.in;
  for (int64_t x = 0; x < args.x.in; ++x)
    c[x] = static_cast<A>(sigmoid(read_or<A>(args.confidence, first + x, 0)));
}

template <class A>
A entry(const void* vector, int64_t j) {
  return vector ? static_cast<const A*>(vector)[j] : A(0);
}

// u = (1 + c a) z + c b + o of a row. Lanes past the classes become kMasked.
template <class T>
void load_row(const UpsampleArgs& args, int64_t image, int64_t row,
              const UpsampleScratch<Accumulate<T>>& scratch, Accumulate<T>* __restrict__ to) {
  using A = Accumulate<T>;
  const int64_t columns = args.x.in, padded = args.padded();
  const T* from =
      static_cast<const T*>(args.logits) + image * args.outer_stride + row * args.y_stride;
  if (args.confidence) load_confidence(args, image, row, scratch.c);
  const A* __restrict__ c = scratch.c;
  for (int64_t j = 0; j < padded; ++j) {
    if (j >= args.classes) {
      for (int64_t x = 0; x < columns; ++x) to[x * padded + j] = kMasked<A>;
      continue;
    }
    const A a = entry<A>(args.scale, j), b = entry<A>(args.bias, j), o = entry<A>(args.prior, j);
    const T* z = from + j * args.class_stride;
    for (int64_t x = 0; x < columns; ++x) {
      A u = to_accumulate(z[x * args.x_stride]);
      u = args.confidence ? u * (c[x] * a + A(1)) + (c[x] * b + o) : u + o;
      to[x * padded + j] = u < kMasked<A> ? kMasked<A> : u;  // NaN passes
    }
  }
}

// From the gradient of a row's calibrated logits: those of the logits, the calibration and the
// confidence (sum_j g_j d_j, d_j = a_j z_j + b_j). Each place of the logits is read before it is
// written: the gradient may lie over them.
template <class T>
void store_row(const UpsampleArgs& args, int64_t image, int64_t row,
               const UpsampleScratch<Accumulate<T>>& scratch,
               const Accumulate<T>* __restrict__ grad, Chunk& chunk) {
  using A = Accumulate<T>;
  const int64_t columns = args.x.in, padded = args.padded();
  const int64_t first = (image * args.y.in + row) * columns;
  const T* from =
      static_cast<const T*>(args.logits) + image * args.outer_stride + row * args.y_stride;
  T* out = static_cast<T*>(args.grad_logits);
  if (out) out += image * args.grad_outer_stride + row * args.grad_y_stride;
  const bool calibrated = args.confidence && (args.class_gradients || args.grad_confidence);
  if (args.confidence) load_confidence(args, image, row, scratch.c);
  const A* __restrict__ c = scratch.c;
  A* __restrict__ slope = scratch.slope;
  for (int64_t x = 0; x < columns; ++x) slope[x] = A(0);
  for (int64_t j = 0; j < args.classes; ++j) {
    const A a = entry<A>(args.scale, j), b = entry<A>(args.bias, j);
    if (calibrated) {
      const T* z = from + j * args.class_stride;
      A grad_scale = 0, grad_bias = 0;
      for (int64_t x = 0; x < columns; ++x) {
        const A g = grad[x * padded + j];
        const A value = to_accumulate(z[x * args.x_stride]);
        const bool masked = value == -kInfinity<A>;  // no share in the scale's and confidence's
        grad_scale += masked ? A(0) : g * c[x] * value;
        grad_bias += g * c[x];
        const A d = a * value + b;
        slope[x] += masked || g == A(0) ? A(0) : g * d;  // d may overflow where z is as low
      }
      if (args.class_gradients) {
        chunk.grad_scale[j] += static_cast<double>(grad_scale);
        chunk.grad_bias[j] += static_cast<double>(grad_bias);
      }
    }
    if (out) {
      T* to = out + j * args.grad_class_stride;
      for (int64_t x = 0; x < columns; ++x) {
        A g = grad[x * padded + j];
        if (args.confidence) g *= c[x] * a + A(1);
        from_accumulate(g, to + x * args.grad_x_stride);
      }
    }
  }
  if (args.grad_confidence) {
    A* to = static_cast<A*>(args.grad_confidence) + first;
    for (int64_t x = 0; x < columns; ++x) to[x] = c[x] * (A(1) - c[x]) * slope[x];
  }
}

// The row `weight` of the way from upper to lower.
template <class A>
void blend_rows(const UpsampleArgs& args, A weight, const A* __restrict__ upper,
                const A* __restrict__ lower, A* __restrict__ to) {
  const int64_t values = args.row_values();
  for (int64_t i = 0; i < values; ++i) to[i] = upper[i] * (A(1) - weight) + lower[i] * weight;
}

// Its adjoint: adds the blend's gradient to those of the two rows, and clears it.
template <class A>
void spread_gradient(const UpsampleArgs& args, A weight, A* __restrict__ blend,
                     A* __restrict__ upper, A* __restrict__ lower) {
  const int64_t values = args.row_values();
  for (int64_t i = 0; i < values; ++i) {
    const A g = blend[i];
    upper[i] += g * (A(1) - weight);
    lower[i] += g * weight;
    blend[i] = A(0);
  }
}

}  // namespace disalign::DISALIGN_CAPABILITY
