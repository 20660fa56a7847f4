// Row kernels, a warp a row: rows that a warp keeps in its registers. Forward, forward with the
// gradient of the logits, and backward are one kernel.
//
// - Maps: a row is its whole 16-byte vectors, the k-th of a lane 32 k after its first, and at its
//   edges fewer elements than two vectors have, at most one a lane. So every vector is whole, and
//   rows of any length and alignment take the same path. Rows aligned alike: row_tile.cuh.
// - The next rows' vectors are on their way to shared memory while this one is computed; a lane reads
//   what it has copied, so that nothing waits for other lanes. No barrier but at the ends.
// - What is of a row alone (target, weights; loss, statistics) is read and made by one lane for 32
//   rows of the warp at a time, one a lane: a turn.
// - The target's logit is marked -inf in shared memory: its exponential is 0 and it is left out of
//   the sums, as PositionSums wants it.
// - Memory: one read of the logits (besides the target's), one write of their gradient, which may be
//   the logits.
#pragma once

#include "cuda/kernels/position.cuh"
#include "cuda/kernels/row_tile.cuh"

namespace disalign::cuda {

constexpr int kWarpRowThreads = 128;
constexpr int kWarpSumsThreads =
    256;  // with class sums: 255 registers, and one block a multiprocessor
constexpr int kWarpRowVectors = 10;  // of a lane: with class sums about all that registers hold
// Vectors in shared memory, of a lane: a row's and the next one's; of short rows, the next three's.
constexpr int kWarpStaged = 2 * kWarpRowVectors;
template <int K>
constexpr int kWarpStages = kWarpStaged / K;
constexpr int kWarpScratchBytes = BlockSums::entries(32) * static_cast<int>(sizeof(double));

template <class T, int K>
struct WarpTile : GroupRows {
  static constexpr int V = kVector<T>;

  int lane;
  int first_class;  // of the row's first whole vector
  int vectors;      // whole ones
  int edge;         // this lane's class at the row's edges, or -1
  int classes;

  __device__ __forceinline__ explicit WarpTile(const RowArgs& args)
      // Neighbouring rows are those of different blocks: no block has a round more than another.
      : GroupRows(args, static_cast<const T*>(args.logits),
                  block(args) + blocks(args) * (threadIdx.x / 32), blocks(args) * (blockDim.x / 32),
                  block(args) + blocks(args) * (threadIdx.x / 32)),
        lane(threadIdx.x % 32),
        first_class((V - phase) % V),
        vectors((static_cast<int>(args.classes) - first_class) / V),
        classes(static_cast<int>(args.classes)) {
    // Of a number below V the compiler would make `first | 32 k V`, in a register for each k.
    asm("" : "+r"(first_class));
    const int after = classes - first_class - vectors * V;
    edge = lane < first_class ? lane : lane >= 32 - after ? classes - 32 + lane : -1;
  }

  static __device__ __forceinline__ int capacity() { return 32 * K; }
  __device__ __forceinline__ bool own(int j) const { return j < classes; }  // of class vectors
  __device__ __forceinline__ bool has(int k) const { return lane + 32 * k < vectors; }
  // Of this lane's first vector, from the row's first element.
  __device__ __forceinline__ int first() const { return first_class + lane * V; }
};

// What is of a row alone, for the rows of a turn, in shared memory: a row is one lane's, which reads
// and finishes it; all lanes read what it has read.
template <class T>
class Turn {
 public:
  using A = Accumulate<T>;
  enum Value {
    kClass,    // the target, an int
    kC,        // confidence after the sigmoid
    kWeight,   // of the target's class
    kFactor,   // sample weight; backward: times the upstream gradient over the denominator
    kTargetZ,  // z_t, 0 where that is -inf
    kTargetLogit,
    kTargetSlope,
    kMaximum,  // the following are PositionSums
    kRest,
    kRestSlope,
    kSmooth,
    kSmoothSlope,
    kValues
  };
  static constexpr int kBytes = kValues * 32 * static_cast<int>(sizeof(A));

  __device__ __forceinline__ explicit Turn(unsigned char* memory)
      : memory_(reinterpret_cast<A*>(memory)) {}

  __device__ __forceinline__ A& at(Value value, int row) const { return memory_[value * 32 + row]; }
  __device__ __forceinline__ int& target(int row) const {
    return reinterpret_cast<int*>(memory_ + kClass * 32)[row];
  }

  // Row i of the logits, as row `row` of the turn. Other lanes see it after a __syncwarp.
  __device__ __forceinline__ void read(const RowArgs& args, int64_t i, int row, A inverse) const {
    const int t = i < args.outer ? target_of(args, i) : kNoTarget;
    target(row) = t;
    if (!is_valid(t)) return;
    const A c = confidence_of<A>(args, i);
    A factor = vector_entry<A>(args.sample_weight, i, A(1));
    if (args.backward)
      factor = inverse == A(0) ? A(0)
                               : vector_entry<A>(args.upstream, i * args.upstream_stride, A(1)) *
                                     factor * inverse;
    const T* from = static_cast<const T*>(args.logits) + i * args.outer_stride;
    const A z = to_accumulate(load_one(from + t));
    at(kC, row) = c;
    at(kWeight, row) = vector_entry<A>(args.weight, t, A(1));
    at(kFactor, row) = factor;
    at(kTargetZ, row) = z == negative_infinity<A>() ? A(0) : z;
    at(kTargetLogit, row) = target_logit_of(args, t, z, c);
    at(kTargetSlope, row) = finite_or_zero(vector_entry<A>(args.scale, t, A(0)) * z +
                                           vector_entry<A>(args.bias, t, A(0)));
  }

  // By the row's lane.
  __device__ __forceinline__ void keep(int row, const PositionSums<A>& sums, bool slopes,
                                       bool smoothing) const {
    at(kMaximum, row) = sums.maximum, at(kRest, row) = sums.rest;
    if (slopes) at(kRestSlope, row) = sums.rest_slope;
    if (smoothing) at(kSmooth, row) = sums.smooth;
    if (slopes && smoothing) at(kSmoothSlope, row) = sums.smooth_slope;
  }
  __device__ __forceinline__ PositionSums<A> kept(int row, bool slopes, bool smoothing,
                                                  A weights) const {
    PositionSums<A> sums;
    sums.maximum = at(kMaximum, row), sums.rest = at(kRest, row);
    sums.target_logit = at(kTargetLogit, row), sums.target_slope = at(kTargetSlope, row);
    if (slopes) sums.rest_slope = at(kRestSlope, row);
    if (smoothing) sums.smooth = at(kSmooth, row);
    if (slopes && smoothing) sums.smooth_slope = at(kSmoothSlope, row);
    sums.weight = weights;
    return sums;
  }

 private:
  A* memory_;
};

// Of a warp: its vectors, then its turn. At the end its class sums, two floats an element.
constexpr int kWarpBytes = 32 * kWarpStaged * kVectorBytes + Turn<float>::kBytes;

// Entries of class j at a row's edge, in registers: it is the same class in all rows.
template <class A>
struct EdgeVectors {
  A scale, bias, weight, prior;

  __device__ __forceinline__ EdgeVectors(const LossArgs& args, int j)
      : scale(of(args.scale, j, A(0))),
        bias(of(args.bias, j, A(0))),
        weight(of(args.weight, j, A(1))),
        prior(of(args.prior, j, A(0))) {}

 private:
  static __device__ __forceinline__ A of(const void* vector, int j, A absent) {
    return j < 0 ? A(0) : vector_entry<A>(vector, j, absent);
  }
};

// Where a row's target is.
template <class T, int K>
struct TargetPlace {
  int k, v;      // vector of a lane, element of a vector; -1 where it is at an edge
  bool holds;    // whether it is among this lane's vectors
  bool at_edge;  // whether it is this lane's edge

  __device__ __forceinline__ TargetPlace(const WarpTile<T, K>& tile, int target) {
    constexpr int V = kVector<T>;
    const unsigned element = static_cast<unsigned>(target - tile.first_class);  // large below 0
    const bool inside = element < static_cast<unsigned>(tile.vectors * V);
    k = inside ? static_cast<int>(element / V / 32) : -1;
    v = element % V;
    holds = inside && element / V % 32 == static_cast<unsigned>(tile.lane);
    at_edge = target == tile.edge;
  }
  // Whether it is element p of this lane's vectors.
  __device__ __forceinline__ bool is(int p) const {
    return holds && k == p / kVector<T> && v == p % kVector<T>;
  }
};

template <int Count, class A>
__device__ __forceinline__ A sum_of(const A (&values)[Count]) {
  A sum = 0;
#pragma unroll
  for (int p = 0; p < Count; p += 2) sum += p + 1 < Count ? values[p] + values[p + 1] : values[p];
  return sum;
}

// A block's class sums, those of its warps added in their order. `memory` has kWarpBytes a warp.
template <class T, int K>
__device__ __forceinline__ void write_warp_sums(const RowArgs& args, const WarpTile<T, K>& tile,
                                                const Accumulate<T> (&scale)[K * kVector<T> + 1],
                                                const Accumulate<T> (&bias)[K * kVector<T> + 1],
                                                unsigned char* memory) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, E = K * V + 1, kPlane = 32 * E;
  static_assert(2 * kPlane * sizeof(A) <= kWarpBytes, "the sums are larger than the vectors");
  const auto of_warp = [=](int warp) { return reinterpret_cast<A*>(memory + warp * kWarpBytes); };
  A* own = of_warp(threadIdx.x / 32);
  __syncwarp();
#pragma unroll
  for (int p = 0; p < E; ++p) {
    own[p * 32 + tile.lane] = scale[p];
    own[kPlane + p * 32 + tile.lane] = bias[p];
  }
  __syncthreads();
  A* to = static_cast<A*>(args.class_sums) + int64_t{2} * blockIdx.x * tile.classes;
  const int warps = blockDim.x / 32, end = tile.first_class + tile.vectors * V;
  for (int j = threadIdx.x; j < tile.classes; j += blockDim.x) {
    const int element = j - tile.first_class, vector = element / V;
    const int at = j < tile.first_class ? K * V * 32 + j
                   : j >= end           ? K * V * 32 + 32 - (tile.classes - j)
                                        : (vector / 32 * V + element % V) * 32 + vector % 32;
    A scales = 0, biases = 0;
    for (int warp = 0; warp < warps; ++warp) {
      scales += of_warp(warp)[at];
      biases += of_warp(warp)[kPlane + at];
    }
    to[j] = scales;
    to[tile.classes + j] = biases;
  }
}

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
}

// Sums: the class sums are wanted.
template <class T, int K, bool Calibrated, bool Sums>
__global__ void __launch_bounds__(Sums ? kWarpSumsThreads : kWarpRowThreads,
                                  Sums                  ? 1
                                  : K * kVector<T> > 40 ? 2
                                                        : 3) row_warp_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>, P = K * V;
  constexpr int kStages = kWarpStages<K>;
  DISALIGN_SHARED_MEMORY(memory);
  unsigned char* areas = memory + kWarpScratchBytes;
  unsigned char* staged = areas + threadIdx.x / 32 * kWarpBytes;
  A* class_memory = reinterpret_cast<A*>(areas + blockDim.x / 32 * kWarpBytes);

  const WarpTile<T, K> tile(args);
  const int lane = tile.lane;
  const ClassVectors<T> classes(args, tile, class_memory);
  const EdgeVectors<A> edge(args, tile.edge);
  const bool smoothing = args.label_smoothing > 0;
  const bool slopes = Calibrated && args.grad_confidence;
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, tile.classes, reinterpret_cast<A*>(memory));
    __syncthreads();
  }
  BlockSums block_sums(reinterpret_cast<double*>(memory), blockDim.x / 32);
  const A inverse = args.backward      ? inverse_denominator<A>(args)
                    : args.grad_logits ? inverse_of<A>(forward_denominator(args))
                                       : A(1);
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  if (args.backward && !writes_logits && !args.grad_confidence && !Sums) return;

  const auto vector_at = [&](int round, int k) {
    return staged + ((round % kStages * K + k) * 32 + lane) * kVectorBytes;
  };
  Raw nothing;
#pragma unroll
  for (int v = 0; v < V; ++v) set_element(nothing, v, from_accumulate<T>(negative_infinity<A>()));
  for (int at = 0; at < kWarpStaged; ++at)  // what is no vector, for good
    if (!tile.has(at % K)) write_shared(staged + (at * 32 + lane) * kVectorBytes, nothing);

  const T* logits = static_cast<const T*>(args.logits);
  int ahead = kNoTarget;  // of this lane's row around the one that is asked for
  const auto ask_for = [&](int round, int64_t i) {
    if (round < tile.rounds) {
      if (round % 32 == 0) {
        const int64_t own = i + lane * tile.row_step;
        ahead = own < args.outer ? target_of(args, own) : kNoTarget;
      }
      if (is_valid(__shfl_sync(kFullWarp, ahead, round % 32))) {
        const T* from = logits + i * args.outer_stride + tile.first();
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (tile.has(k)) copy_vector(vector_at(round, k), from + 32 * k * V);
      }
    }
    commit_copies();
  };
  const auto edge_of = [&](int round, int64_t i) {
    return tile.edge >= 0 && round < tile.rounds
               ? to_accumulate(load_one(logits + i * args.outer_stride + tile.edge))
               : negative_infinity<A>();
  };
#pragma unroll
  for (int round = 0; round < kStages - 1; ++round)
    ask_for(round, tile.row + round * tile.row_step);
  A next_edge = edge_of(0, tile.row);

  const Turn<T> turn(staged + 32 * kWarpStaged * kVectorBytes);
  A grad_scale[Sums ? P + 1 : 1] = {}, grad_bias[Sums ? P + 1 : 1] = {};  // the last: the edge's
  int64_t i = tile.row;
  for (int round = 0; round < tile.rounds; ++round, i += tile.row_step) {
    const int at_turn = round % 32;
    if (at_turn == 0) {
      __syncwarp();
      turn.read(args, i + lane * tile.row_step, lane, inverse);
      __syncwarp();
    }
    ask_for(round + kStages - 1, i + (kStages - 1) * tile.row_step);
    const A z_edge = next_edge;
    next_edge = edge_of(round + 1, i + tile.row_step);
    const int target = turn.target(at_turn);
    const auto of_row = [&](auto value) { return turn.at(value, at_turn); };
    T* grad = static_cast<T*>(args.grad_logits) + i * args.grad_outer_stride;
    const auto write_vector = [&](int k, const Raw& raw) {
      if (!tile.has(k)) return;
      T* to = grad + tile.first() + 32 * k * V;
      if (reinterpret_cast<uintptr_t>(grad + tile.first_class) % kVectorBytes == 0)
        return store_vector(to, raw);
#pragma unroll
      for (int v = 0; v < V; ++v) store_one(to + v, element<T>(raw, v));
    };
    wait_for_copies<kStages - 1>();

    if (!is_valid(target)) {
      if (writes_logits) {
#pragma unroll
        for (int k = 0; k < K; ++k) write_vector(k, Raw{});
        if (tile.edge >= 0) store_one(grad + tile.edge, from_accumulate<T>(A(0)));
      }
    } else {
      const A c = Calibrated ? of_row(Turn<T>::kC) : A(0);
      const TargetPlace<T, K> place(tile, target);
      if (place.holds)
        *reinterpret_cast<T*>(vector_at(round, place.k) + place.v * sizeof(T)) =
            from_accumulate<T>(negative_infinity<A>());

      PositionSums<A> sums;
      sums.target_logit = of_row(Turn<T>::kTargetLogit);
      sums.weight = weights;
      A e[P + 1];  // u, then exp(u - maximum); the last is the edge's
      e[P] = place.at_edge ? negative_infinity<A>()
                           : calibrated(z_edge, edge.scale, edge.bias, c) + edge.prior;
      sums.maximum = larger(larger(sums.maximum, sums.target_logit), e[P]);
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A z[Q], u[Q];
        unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
        classes.template affine<Calibrated>(lane + 32 * (part / N), part % N, z, c, u);
        A most = u[0];
#pragma unroll
        for (int q = 0; q < Q; ++q) e[part * Q + q] = u[q], most = larger(most, u[q]);
        sums.maximum = larger(sums.maximum, most);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sums.maximum = larger(sums.maximum, __shfl_xor_sync(kFullWarp, sums.maximum, distance));

      if (smoothing) {
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A w[Q];
          classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            // What is not the row's own is -inf, and would add 0 * -inf.
            const bool own = tile.has(part / N) && !place.is(part * Q + q);
            sums.smooth += own ? w[q] * (e[part * Q + q] - sums.maximum) : A(0);
          }
        }
        if (tile.edge >= 0 && !place.at_edge) sums.smooth += edge.weight * (e[P] - sums.maximum);
        const A w_t = of_row(Turn<T>::kWeight);
        sums.smooth = warp_sum(sums.smooth) + w_t * (sums.target_logit - sums.maximum);
      }
      const Exponentials<A> exponentials(sums.maximum);
      exponentials.apply(e);
      sums.rest = warp_sum(sum_of(e)) * exponentials.correction;
      if (Calibrated && slopes) {
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A z[Q], d[Q], w[Q] = {};
          unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
          classes.slope(lane + 32 * (part / N), part % N, z, d);  // 0 of the target
          if (smoothing) classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            sums.rest_slope += e[part * Q + q] * d[q];
            if (smoothing) sums.smooth_slope += w[q] * d[q];
          }
        }
        const A d = finite_or_zero(edge.scale * z_edge + edge.bias);
        sums.rest_slope = warp_sum(sums.rest_slope + e[P] * d) * exponentials.correction;
        if (smoothing) {
          if (!place.at_edge) sums.smooth_slope += edge.weight * d;
          const A w_t = of_row(Turn<T>::kWeight), d_t = of_row(Turn<T>::kTargetSlope);
          sums.smooth_slope = warp_sum(sums.smooth_slope) + w_t * d_t;
        }
      }
      if (lane == at_turn) turn.keep(at_turn, sums, slopes, smoothing);

      if (writes_logits || Sums) {
        const A w_t = of_row(Turn<T>::kWeight), v_i = of_row(Turn<T>::kFactor);
        const PositionResult<A> result = position_result(args, sums, w_t, false);
        const A of_e = result.softmax * exponentials.correction;
        if (writes_logits) {
          const A factor = args.backward ? v_i : v_i * inverse;
          const A softmax = factor * of_e, smooth = factor * result.smooth;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            Raw out = {};
#pragma unroll
            for (int part = 0; part < N; ++part) {
              A g[Q];
#pragma unroll
              for (int q = 0; q < Q; ++q) g[q] = softmax * e[k * V + part * Q + q];
              if (smoothing) {
                A w[Q];
                classes.load(classes.weight, lane + 32 * k, part, w);
#pragma unroll
                for (int q = 0; q < Q; ++q) g[q] -= smooth * w[q];
              }
              if constexpr (Calibrated) {
                A a[Q];
                classes.load(classes.scale, lane + 32 * k, part, a);
#pragma unroll
                for (int q = 0; q < Q; ++q) g[q] *= a[q] * c + A(1);
              }
              pack<T>(g, part, out);
            }
            write_vector(k, out);
          }
          if (tile.edge >= 0) {
            const A g = (softmax * e[P] - smooth * edge.weight) * (edge.scale * c + A(1));
            store_one(grad + tile.edge, from_accumulate<T>(g));
          }
          if (place.holds || place.at_edge) {  // over what it has written of the marked one
            const A a = vector_entry<A>(args.scale, target, A(0));
            store_one(grad + target,
                      from_accumulate<T>(factor * result.at_target * (a * c + A(1))));
          }
        }
        if constexpr (Sums) {
          const A softmax = v_i * c * of_e, smooth = v_i * c * result.smooth;
#pragma unroll
          for (int part = 0; part < K * N; ++part) {
            A z[Q];
            unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
              const int p = part * Q + q;
              const A g = softmax * e[p];
              // A masked class, of which g is 0, adds 0 and not 0 * -inf.
              grad_scale[p] += g * larger(z[q], kLowest<A>);
              grad_bias[p] += g;
            }
          }
          A g = softmax * e[P];
          grad_scale[P] += g * larger(z_edge, kLowest<A>);
          grad_bias[P] += g;
          if (smoothing) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A z[Q], w[Q];
              unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
              classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
              for (int q = 0; q < Q; ++q) {
                const int p = part * Q + q;
                g = place.is(p) ? A(0) : -smooth * w[q];
                grad_scale[p] += g * (z[q] == negative_infinity<A>() ? A(0) : z[q]);
                grad_bias[p] += g;
              }
            }
            g = place.at_edge ? A(0) : -smooth * edge.weight;
            grad_scale[P] += g * (z_edge == negative_infinity<A>() ? A(0) : z_edge);
            grad_bias[P] += g;
          }
          g = v_i * c * result.at_target;
          const A g_z = g * of_row(Turn<T>::kTargetZ);
          // A branch on k, the same for all lanes; selects on what differs, which must not index
          // registers.
#pragma unroll
          for (int k = 0; k < K; ++k) {
            if (k != place.k) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const bool here = place.holds && v == place.v;
              grad_scale[k * V + v] += here ? g_z : A(0);
              grad_bias[k * V + v] += here ? g : A(0);
            }
          }
          grad_scale[P] += place.at_edge ? g_z : A(0);
          grad_bias[P] += place.at_edge ? g : A(0);
        }
      }
    }

    if (at_turn < 31 && round + 1 < tile.rounds) continue;
    double loss = 0, divisor = 0;
    if (lane <= at_turn) {
      const int64_t own = i + (lane - at_turn) * tile.row_step;
      const int t = turn.target(lane);
      const bool valid = is_valid(t);
      const PositionSums<A> sums = turn.kept(lane, slopes, smoothing, weights);
      const A w_t = turn.at(Turn<T>::kWeight, lane), v_i = turn.at(Turn<T>::kFactor, lane);
      const A c = turn.at(Turn<T>::kC, lane);
      const PositionResult<A> result = position_result(args, sums, w_t, !args.backward);
      if (!args.backward) {
        write_position(args, own, t, sums, result, v_i, c);
        if (valid) {
          loss = static_cast<double>(result.loss * v_i);
          divisor = divisor_share(args, w_t, v_i);
        }
      } else if (args.grad_confidence) {
        static_cast<A*>(args.grad_confidence)[own] =
            valid ? v_i * c * (A(1) - c) * result.confidence : A(0);
      }
    }
    if (!args.block_sums) continue;
    loss = warp_sum(loss), divisor = warp_sum(divisor);
    if (lane == 0) block_sums.add(threadIdx.x / 32, loss, divisor);
  }
  if (args.block_sums) block_sums.write(args.block_sums);
  if constexpr (Sums) write_warp_sums<T, K>(args, tile, grad_scale, grad_bias, areas);
}

// The shares of the denominator of 'mean', of forward where the gradient needs it: `forward_denominator`
// adds them up.
template <class A>
__global__ void __launch_bounds__(kDivisorThreads, 1) row_divisor_kernel(const RowArgs args) {
  DISALIGN_SHARED_MEMORY(memory);
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.outer;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int t = target_of(args, i);
    if (is_valid(t))
      sum += divisor_share(args, vector_entry<A>(args.weight, t, A(1)),
                           vector_entry<A>(args.sample_weight, i, A(1)));
  }
  sum = block_sum(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) args.divisors[blockIdx.x] = sum;
}

}  // namespace disalign::cuda
