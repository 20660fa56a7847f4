// Calibrated logits u = (1 + c a) z + c b, forward and backward, over rows and class planes.
//
// - Maps: row_tile.cuh and dense_tile.cuh.
// - Forward: one read, one write. Backward, from the gradient g of the calibrated
//   logits: one read of g and of the logits, one write of grad_logits = g (1 + c a). Class sums are
//   in registers for rows; for planes a warp adds its positions by shuffles, class by class, into
//   sums of its own in global memory.
// - A masked class (z = -inf) adds 0 to the gradients of scale and confidence, not g * -inf.
#pragma once

#include "cuda/kernels/dense_tile.cuh"
#include "cuda/kernels/row_tile.cuh"

namespace disalign::cuda {

constexpr int kCalibrateThreads = 256;

// Blocks that shall fit on a multiprocessor: see row_backward_kernel.cuh.
template <class T, bool Backward, bool Wide>
constexpr int kCalibrateBlocks = Backward || sizeof(T) == 8 ? 1
                                 : Wide                     ? 2
                                                            : 4;

template <class T, bool Backward, bool Wide>
__global__ void __launch_bounds__(Wide ? kCalibrateThreads : kNarrowThreads,
                                  (kCalibrateBlocks<T, Backward, Wide>))
    row_calibrate_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, K = kKept<T>, Q = kPart<T>, N = kPartsOfVector<T>;
  DISALIGN_SHARED_MEMORY(memory);
  A* class_memory = reinterpret_cast<A*>(memory + kRowScratchBytes<A, Wide>);
  const Tile<T, Wide> tile(args);
  const ClassVectors<T> classes(args, tile, class_memory);
  Group<A, Wide> group(tile.lanes, class_memory - Group<A, Wide>::kScratchEntries);
  A grad_scale[Backward ? K * V : 1] = {}, grad_bias[Backward ? K * V : 1] = {};

  int64_t i = tile.row;
  for (int round = 0; round < tile.rounds; ++round, i += tile.row_step) {
    const bool inside = i < args.outer;
    const A c = inside ? confidence_of<A>(args, i) : A(0);
    Raw raw[K] = {}, given[Backward ? K : 1] = {};
    if (inside) {  // groups beyond the last row go along, with zeros
      tile.load(static_cast<const T*>(args.logits) + i * args.outer_stride, raw);
      if constexpr (Backward) {
        const T* from = static_cast<const T*>(args.grad_output) + i * args.classes;
        tile.load(from, given, tile.aligned(from));
      }
    }
    void* out_memory = Backward ? args.grad_logits : args.output;
    T* to = static_cast<T*>(out_memory) + i * args.grad_outer_stride;
    const bool aligned = tile.aligned(to);
    A slope = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Raw out = {};
#pragma unroll
      for (int part = 0; part < N; ++part) {
        A z[Q], u[Q];
        unpack<T>(raw[k], part, z);
        if constexpr (!Backward) {
          classes.template affine<true>(tile.vector(k), part, z, c, u);
        } else {
          A g[Q], a[Q], d[Q];
          unpack<T>(given[k], part, g);
          classes.load(classes.scale, tile.vector(k), part, a);
          classes.slope(tile.vector(k), part, z, d);
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            const int p = k * V + part * Q + q;
            const bool own = inside && tile.vector(k) < tile.vectors &&
                             tile.own(tile.class_of(k) + part * Q + q);
            const A gc = own ? g[q] * c : A(0);
            const bool masked = z[q] == negative_infinity<A>();
            grad_scale[p] += masked ? A(0) : gc * z[q];
            grad_bias[p] += gc;
            slope += own && !masked ? g[q] * d[q] : A(0);
            u[q] = g[q] * (a[q] * c + A(1));
          }
        }
        pack<T>(u, part, out);
      }
      if (out_memory && inside) tile.store(to, k, aligned, out);
    }
    if (!Backward || !args.confidence_sums) continue;
    A values[1] = {slope};
    group.sum(values);
    if (tile.lane == 0 && inside)
      static_cast<A*>(args.confidence_sums)[blockIdx.y * args.outer + i] =
          c * (A(1) - c) * values[0];
  }
  if constexpr (Backward) {
    if (args.class_sums) write_class_sums<T, Wide>(args, tile, grad_scale, grad_bias, class_memory);
  }
}

template <class T, bool Backward>
__global__ void __launch_bounds__(kDenseThreads, 1) dense_calibrate_kernel(const DenseArgs args) {
  using A = Accumulate<T>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  A* exchange = reinterpret_cast<A*>(raw_memory);  // [slices][lanes]
  const DensePlace place(args);                    // of a thread with one position
  A* sums = static_cast<A*>(args.class_sums) +
            int64_t{2} * (blockIdx.x * (place.lanes / 32) + place.lane / 32) * args.classes;
  const bool first = threadIdx.x % 32 == 0;
  if (Backward && args.class_sums && first) {
    for (int j = place.slice; j < place.classes; j += place.slices)
      sums[j] = sums[place.classes + j] = A(0);
  }
  for (DenseTiles tiles(args); tiles.image < args.outer; tiles.next(args)) {
    const int64_t at = int64_t{tiles.tile} * place.lanes + place.lane;
    const bool inside = at < args.inner;
    const int64_t i = tiles.image * args.inner + at;
    const T* logits = static_cast<const T*>(args.logits) + tiles.image * args.outer_stride + at;
    const int64_t out_offset = tiles.image * args.grad_outer_stride + at;
    const A c = inside ? confidence_of<A>(args, i) : A(0);
    A slope = 0;
    for (int j = place.slice; j < place.classes; j += place.slices) {
      const A a = static_cast<const A*>(args.scale)[j], b = static_cast<const A*>(args.bias)[j];
      const A z = inside ? to_accumulate(load_one(logits + j * args.class_stride)) : A(0);
      A out = z * (a * c + A(1)) + b * c;
      const int64_t to = out_offset + j * args.grad_class_stride;
      if constexpr (Backward) {
        const A g =
            inside ? to_accumulate(load_one(static_cast<const T*>(args.grad_output) + to)) : A(0);
        const bool masked = z == negative_infinity<A>();
        out = g * (a * c + A(1));
        slope += masked ? A(0) : g * finite_or_zero(a * z + b);
        if (args.class_sums) {
          const A scale = warp_sum(masked ? A(0) : g * c * z), bias = warp_sum(g * c);
          if (first) {
            sums[j] += scale;
            sums[place.classes + j] += bias;
          }
        }
      }
      void* out_memory = Backward ? args.grad_logits : args.output;
      if (out_memory && inside)
        store_one(static_cast<T*>(out_memory) + to, from_accumulate<T>(out));
    }
    if (!Backward || !args.grad_confidence) continue;
    exchange[threadIdx.x] = slope;
    __syncthreads();
    if (place.slice == 0 && inside) {
      for (int slice = 1; slice < place.slices; ++slice)
        slope += exchange[slice * place.lanes + place.lane];
      static_cast<A*>(args.grad_confidence)[i] = c * (A(1) - c) * slope;
    }
    __syncthreads();
  }
}

}  // namespace disalign::cuda
