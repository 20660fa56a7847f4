// Row kernels whose targets are class probabilities, of rows by groups of lanes and of float64; others
// are those of warps (soft_row_warp_kernel.cuh, soft_row_sums_kernel.cuh). Forward, forward with
// gradients, and backward are one kernel.
//
// - Maps: row_tile.cuh. A thread has the same classes of the logits and of the probabilities, in
//   registers from the one read of both to the gradients. Several blocks a multiprocessor have rows on
//   their way while others compute.
// - Forward: the maximum of u, then the sums (soft_position.cuh), by one reduction each. Backward has
//   both from forward.
// - With more vectors than a block keeps each block sums a tile, soft_combine_kernel adds the tiles, and
//   gradients are a second launch's.
// - Memory: one read of logits and probabilities, one write of the gradient, which may be the logits: a
//   thread has read a vector before it writes it, and needs no other of the row. Rows of tiles are read
//   again for their gradients.
#pragma once

#include "cuda/kernels/row_details.cuh"
#include "cuda/kernels/row_tile.cuh"
#include "cuda/kernels/soft_position.cuh"

namespace disalign::cuda {

// Blocks that shall fit on a multiprocessor: class sums need the registers.
template <class T, bool Calibrated, bool Wide>
constexpr int kSoftBlocks = Calibrated      ? 1
                            : sizeof(T) < 8 ? 5
                            : Wide          ? 2
                                            : 3;

// b_j / w_j of this thread's classes of row i; 0 of what is not the row's own. Probabilities lie like
// the logits where both rows are aligned alike.
template <class Y, class T, bool Wide>
__device__ __forceinline__ void load_probabilities(const RowArgs& args, const Tile<T, Wide>& tile,
                                                   const SoftOptions<Accumulate<T>>& options,
                                                   int64_t i, Accumulate<T> (&b)[kElements<T>]) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, W = kVector<Y>;  // a vector of T is one or two of Y
  const Y* row = static_cast<const Y*>(args.probabilities) + i * args.probability_outer_stride;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(row) + tile.first_class * static_cast<int64_t>(sizeof(Y))) %
          kVectorBytes ==
      0;
  const auto load_whole = [&](int k, const Y* from) {
#pragma unroll
    for (int v = 0; v < V; v += W) {
      A y[W];
      unpack_vector<Y>(load_vector(from + v), y);
#pragma unroll
      for (int w = 0; w < W; ++w) b[k * V + v + w] = options.of(y[w]);
    }
  };
  if (aligned && tile.all_whole) {
    const Y* first = row + tile.class_of(0);
#pragma unroll
    for (int k = 0; k < kKept<T>; ++k) load_whole(k, first + k * tile.vector_step() * V);
    return;
  }
#pragma unroll
  for (int k = 0; k < kKept<T>; ++k) {
    const int j = tile.class_of(k);
    if (aligned && tile.vector(k) < tile.vectors && tile.whole(j)) {
      load_whole(k, row + j);
      continue;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool load = tile.vector(k) < tile.vectors && tile.own(j + v);
      b[k * V + v] = load ? options.of(to_accumulate(load_one(row + j + v))) : A(0);
    }
  }
}

template <class T, bool Calibrated, bool Wide>
__global__ void __launch_bounds__(Wide ? kWideThreads<T> : kNarrowThreads,
                                  (kSoftBlocks<T, Calibrated, Wide>))
    soft_row_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, K = kKept<T>, Q = kPart<T>, N = kPartsOfVector<T>;
  constexpr int P = kElements<T>;
  DISALIGN_SHARED_MEMORY(memory);
  A* class_memory = reinterpret_cast<A*>(memory + kRowScratchBytes<A, Wide>);

  const Tile<T, Wide> tile(args);
  const ClassVectors<T> classes(args, tile, class_memory, args.weight != nullptr);
  BlockSums block_sums(reinterpret_cast<double*>(memory), tile.groups);
  Group<A, Wide> group(tile.lanes, class_memory - Group<A, Wide>::kScratchEntries);
  const SoftOptions<A> options(args);
  const bool slopes = Calibrated && args.confidence_sums;
  const bool sum_classes = Calibrated && args.class_gradients;
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  const bool gradients = writes_logits || slopes || sum_classes;
  if (args.backward && !gradients) return;
  const A shared = args.backward ? shared_scale(args, inverse_denominator<A>(args)) : A(1);
  // Of the logits' gradient alone: finish_kernel divides the others.
  const A inverse =
      !args.backward && args.grad_logits ? inverse_of<A>(forward_denominator(args)) : A(1);
  A grad_scale[Calibrated ? P : 1] = {}, grad_bias[Calibrated ? P : 1] = {};

  int64_t i = tile.row;
#pragma unroll 1
  for (int round = 0; round < tile.rounds; ++round, i += tile.row_step) {
    const bool there = Wide || i < args.outer;
    const bool first = tile.lane == 0 && there;
    Raw raw[K] = {};
    A e[P], b[P] = {};  // u, then exp(u - shift); b_j
    A c = 0;
    if (there) {
      tile.load(static_cast<const T*>(args.logits) + i * args.outer_stride, raw);
      if (sizeof(T) == 2 && !args.probabilities_of_a)
        load_probabilities<T>(args, tile, options, i, b);
      else
        load_probabilities<A>(args, tile, options, i, b);
      if constexpr (Calibrated) c = confidence_of<A>(args, i);
    }
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      A z[Q], u[Q];
      unpack<T>(raw[part / N], part % N, z);
      classes.template affine<Calibrated>(tile.vector(part / N), part % N, z, c, u);
#pragma unroll
      for (int q = 0; q < Q; ++q) e[part * Q + q] = u[q];
    }
    if (args.weight) {
#pragma unroll
      for (int part = 0; part < kParts<T>; ++part) {
        A w[Q];
        classes.load(classes.weight, tile.vector(part / N), part % N, w);
#pragma unroll
        for (int q = 0; q < Q; ++q) b[part * Q + q] *= w[q];
      }
    }

    SoftFactors<A> row;
    if (args.backward) {
      if (there) row = soft_factors(args, i, shared);
#pragma unroll
      for (int p = 0; p < P; ++p) e[p] = exponential(e[p] - row.shift);
    } else {
      if (args.details)
        write_soft_details<false, P>(
            args, e, kLowest<A>, [&](int p) { return tile.class_of(p / V) + p % V; }, group, i,
            blockIdx.y, args.tiles > 1, first);
      PositionSums<A> sums;
#pragma unroll
      for (int p = 0; p < P; ++p) sums.maximum = larger(sums.maximum, e[p]);
      sums.maximum = group.max(sums.maximum);
      A values[3] = {};
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const A below = e[p] - sums.maximum;
        e[p] = exponential(below);
        values[0] += e[p];
        values[1] += soft_term(b[p], below);
        values[2] += b[p];
      }
      group.sum(values);
      sums.rest = values[0], sums.smooth = values[1], sums.weight = values[2];
      if (args.tiles > 1) {
        if (tile.lane == 0)
          sums.write(static_cast<A*>(args.tile_sums) + blockIdx.y * args.outer + i,
                     args.tiles * args.outer);
        continue;
      }
      const A v_i = there ? vector_entry<A>(args.sample_weight, i, A(1)) : A(0);
      row = soft_factors(sums, v_i, there);
      if (first) {
        const A loss = write_soft_position(args, i, sums, v_i);
        block_sums.add(tile.group, loss, divisor_share(args, A(1), v_i));
      }
    }
    if (!gradients) continue;

    T* grad = static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride;
    const bool aligned = tile.aligned(grad), writes = writes_logits && there;
    const A factor = Calibrated ? A(1) : inverse;
    const A of_e = factor * row.softmax, of_b = factor * row.smooth;
    const A c_inverse = c * inverse;
    A slope = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Raw out = {};
#pragma unroll
      for (int part = 0; part < N; ++part) {
        const int begin = k * V + part * Q;
        A g[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) g[q] = of_e * e[begin + q] - of_b * b[begin + q];
        if constexpr (Calibrated) {
          if (slopes || sum_classes) {
            A z[Q], d[Q];
            unpack<T>(raw[k], part, z);
            classes.slope(tile.vector(k), part, z, d);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
              slope += g[q] * d[q];
              // A masked class adds 0, not 0 * -inf.
              const A gc = g[q] * c;
              grad_scale[begin + q] += z[q] == negative_infinity<A>() ? A(0) : gc * z[q];
              grad_bias[begin + q] += gc;
            }
          }
          A a[Q];
          classes.load(classes.scale, tile.vector(k), part, a);
#pragma unroll
          for (int q = 0; q < Q; ++q) g[q] *= std::fma(a[q], c_inverse, inverse);
        }
        pack<T>(g, part, out);
      }
      if (writes) tile.store(grad, k, aligned, out);
    }
    if (slopes) {
      A values[1] = {slope};
      group.sum(values);
      if (first)
        static_cast<A*>(args.confidence_sums)[blockIdx.y * args.outer + i] =
            c * (A(1) - c) * values[0];
    }
  }
  if (args.block_sums && args.tiles == 1) block_sums.template write_and_finish<A>(args);
  if constexpr (Calibrated) {
    if (sum_classes) write_class_sums<T, Wide>(args, tile, grad_scale, grad_bias, class_memory);
  }
}

// The tiles of each row added up; a warp a row.
template <class A>
__global__ void __launch_bounds__(kNarrowThreads, 1) soft_combine_kernel(const RowArgs args) {
  DISALIGN_SHARED_MEMORY(memory);
  const int64_t stride = args.tiles * args.outer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  BlockSums block_sums(reinterpret_cast<double*>(memory), warps);
  for (int64_t i = int64_t{blockIdx.x} * warps + warp; i < args.outer;
       i += int64_t{gridDim.x} * warps) {
    if (args.tile_details) combine_details<A>(args, i, lane, true);
    PositionSums<A> sums;
    for (int tile = lane; tile < args.tiles; tile += 32)
      sums.add(PositionSums<A>::read(static_cast<const A*>(args.tile_sums) + tile * args.outer + i,
                                     stride),
               true);
    for (int distance = 16; distance > 0; distance /= 2) sums.add(sums.of_lane(distance), true);
    if (lane > 0) continue;
    const A v_i = vector_entry<A>(args.sample_weight, i, A(1));
    const A loss = write_soft_position(args, i, sums, v_i);
    block_sums.add(warp, loss, divisor_share(args, A(1), v_i));
  }
  if (args.block_sums) block_sums.write(args.block_sums);
}

}  // namespace disalign::cuda
