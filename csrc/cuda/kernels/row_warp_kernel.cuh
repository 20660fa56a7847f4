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
    256;                          // with class sums: 255 registers, and one block a multiprocessor
constexpr int kWarpVectors = 10;  // of a lane: with class sums about all that registers hold
// Vectors in shared memory, of a lane: a row's and the next one's; of short rows, the next three's.
constexpr int kWarpStaged = 2 * kWarpVectors;
template <int K>
constexpr int kWarpStages = kWarpStaged / K;
constexpr int kWarpSumsBytes = BlockSums::entries(32) * static_cast<int>(sizeof(double));
template <class A, bool Wide>
constexpr int kWarpScratchBytes =
    kWarpSumsBytes + Group<A, Wide>::kScratchEntries * static_cast<int>(sizeof(A));

template <class T, int K, bool Wide>
struct WarpTile : GroupRows {
  static constexpr int V = kVector<T>;

  int warp, lane;
  int first_class;  // of the row's first whole vector
  int vectors;      // whole ones of the row
  int base_class;   // of this warp's first
  int left;         // from this lane's first on, other warps' included
  int edge;         // this lane's class at the row's edges, or -1
  int classes;

  __device__ __forceinline__ explicit WarpTile(const RowArgs& args)
      // Neighbouring rows are those of different blocks: no block has a round more than another.
      : GroupRows(args, static_cast<const T*>(args.logits), group(args),
                  Wide ? blocks(args) : blocks(args) * (blockDim.x / 32), group(args)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        first_class((V - phase) % V),
        vectors((static_cast<int>(args.classes) - first_class) / V),
        classes(static_cast<int>(args.classes)) {
    // Of numbers whose upper bits it knows the compiler makes `lane | 32 k` and the like, in a
    // register for each k and not in an address's offset.
    asm("" : "+r"(first_class));
    asm("" : "+r"(lane));
    asm("" : "+r"(warp));  // and these it would make anew wherever they are used
    asm("" : "+l"(row));
    const int before = Wide ? warp * 32 * K : 0;
    base_class = first_class + before * V;
    left = vectors - before - lane;
    const int after = classes - first_class - vectors * V;
    edge = Wide && warp > 0     ? -1
           : lane < first_class ? lane
           : lane >= 32 - after ? classes - 32 + lane
                                : -1;
  }

  __device__ __forceinline__ bool has(int k) const { return left > 32 * k; }
  // Of this lane's first vector, from the row's first element.
  __device__ __forceinline__ int first() const { return base_class + lane * V; }

  // Of the class vectors in shared memory, of which each warp of a wide row has its own.
  static __device__ __forceinline__ int capacity() { return 32 * K; }
  static __device__ __forceinline__ bool own(int) { return true; }
  __device__ __forceinline__ int staged_class() const { return base_class; }
  __device__ __forceinline__ int staged_vectors() const { return left + lane; }
  __device__ __forceinline__ int stager() const { return Wide ? lane : threadIdx.x; }
  static __device__ __forceinline__ int stagers() { return Wide ? 32 : blockDim.x; }

 private:
  static __device__ __forceinline__ int64_t group(const RowArgs& args) {
    return block(args) + (Wide ? 0 : blocks(args) * (threadIdx.x / 32));
  }
};

// What is of a row alone, for the rows of a turn, in shared memory: a row is one lane's, which reads
// and finishes it; all lanes read what it has read.
template <class T>
class Turn {
 public:
  using A = Accumulate<T>;
  enum Value {
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
  // Row i of the logits and its target, as row `row` of the turn. Other lanes see it after a
  // __syncwarp.
  __device__ __forceinline__ void read(const RowArgs& args, int64_t i, int t, int row,
                                       A inverse) const {
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

// Class vectors of a lane's class at the rows' edges, in shared memory: it is the same in all rows.
template <class A>
class EdgeVectors {
 public:
  static constexpr int kBytes = 4 * 32 * static_cast<int>(sizeof(A));

  // j: the lane's class, or -1.
  __device__ __forceinline__ EdgeVectors(const LossArgs& args, int j, int lane,
                                         unsigned char* memory)
      : own_(reinterpret_cast<A*>(memory) + lane) {
    own_[0] = of(args.scale, j, A(0));
    own_[32] = of(args.bias, j, A(0));
    own_[64] = of(args.weight, j, A(1));
    own_[96] = of(args.prior, j, A(0));
  }
  __device__ __forceinline__ A scale() const { return own_[0]; }
  __device__ __forceinline__ A bias() const { return own_[32]; }
  __device__ __forceinline__ A weight() const { return own_[64]; }
  __device__ __forceinline__ A prior() const { return own_[96]; }

 private:
  static __device__ __forceinline__ A of(const void* vector, int j, A absent) {
    return j < 0 ? A(0) : vector_entry<A>(vector, j, absent);
  }
  A* own_;
};

// Of a warp: its vectors, then its turn and its edges. At the end its class sums, two floats an
// element.
constexpr int kWarpBytes =
    32 * kWarpStaged * kVectorBytes + Turn<float>::kBytes + EdgeVectors<float>::kBytes;

// Where a row's target is.
template <class T, int K>
struct TargetPlace {
  int k, v;      // vector of a lane, the same for all of a warp, and element of the vector; k is -1
                 // where it is not among the warp's
  bool holds;    // whether it is among this lane's vectors
  bool at_edge;  // whether it is this lane's edge

  template <bool Wide>
  __device__ __forceinline__ TargetPlace(const WarpTile<T, K, Wide>& tile, int target) {
    constexpr int V = kVector<T>;
    const unsigned element = static_cast<unsigned>(target - tile.base_class);  // large below 0
    const int vectors = Wide ? min(tile.staged_vectors(), 32 * K) : tile.vectors;
    const bool inside = vectors > 0 && element < static_cast<unsigned>(vectors * V);
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

// body(k) with k known to the compiler, by a few branches that all lanes take alike.
template <int Begin, int End, class Body>
__device__ __forceinline__ void at_index(int k, const Body& body) {
  if constexpr (End - Begin == 1) {
    body(std::integral_constant<int, Begin>{});
  } else {
    constexpr int kMiddle = (Begin + End) / 2;
    if (k < kMiddle)
      at_index<Begin, kMiddle>(k, body);
    else
      at_index<kMiddle, End>(k, body);
  }
}

template <int Count, class A>
__device__ __forceinline__ A sum_of(const A (&values)[Count]) {
  A sum = 0;
#pragma unroll
  for (int p = 0; p < Count; p += 2) sum += p + 1 < Count ? values[p] + values[p + 1] : values[p];
  return sum;
}

// A block's class sums. Those of warps with a row each are added in their order; of a wide row a
// class is one warp's. `memory` has kWarpBytes a warp, where neighbouring classes are brought to
// neighbouring lanes.
template <class T, int K, bool Wide>
__device__ __forceinline__ void write_warp_sums(const RowArgs& args,
                                                const WarpTile<T, K, Wide>& tile,
                                                const Accumulate<T> (&scale)[K * kVector<T> + 1],
                                                const Accumulate<T> (&bias)[K * kVector<T> + 1],
                                                unsigned char* memory) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, P = K * V, kPitch = 33, kPlane = kPitch * (P + 1);
  static_assert(2 * kPlane * sizeof(A) <= kWarpBytes, "the sums are larger than the vectors");
  const auto of_warp = [=](int warp) { return reinterpret_cast<A*>(memory + warp * kWarpBytes); };
  A* own = of_warp(tile.warp);
  __syncwarp();
#pragma unroll
  for (int p = 0; p <= P; ++p) {
    own[p * kPitch + tile.lane] = scale[p];
    own[kPlane + p * kPitch + tile.lane] = bias[p];
  }
  A* to = static_cast<A*>(args.class_sums) + int64_t{2} * blockIdx.x * tile.classes;
  // The i-th 32 neighbours: element `lane % V` of so many vectors.
  const int of_lane = tile.lane % V * kPitch + tile.lane / V;
  const auto place = [=](int i) { return i / V * V * kPitch + i % V * (32 / V) + of_lane; };
  if constexpr (Wide) {
    __syncwarp();
    A* first = to + tile.base_class + tile.lane;
    const int elements = tile.staged_vectors() * V - tile.lane;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (elements <= 32 * i) continue;
      first[32 * i] = own[place(i)];
      first[tile.classes + 32 * i] = own[kPlane + place(i)];
    }
    if (tile.edge < 0) return;
    to[tile.edge] = scale[P];
    to[tile.classes + tile.edge] = bias[P];
  } else {
    __syncthreads();
    const int warps = blockDim.x / 32;
    const auto add_up = [&](int at, int j) {
      A scales = 0, biases = 0;
      for (int warp = 0; warp < warps; ++warp) {
        scales += of_warp(warp)[at];
        biases += of_warp(warp)[kPlane + at];
      }
      to[j] = scales;
      to[tile.classes + j] = biases;
    };
    for (int i = tile.warp; 32 * i < tile.vectors * V; i += warps) {
      const int element = 32 * i + tile.lane;
      if (element < tile.vectors * V) add_up(place(i), tile.first_class + element);
    }
    if (tile.warp == 0 && tile.edge >= 0) add_up(P * kPitch + tile.lane, tile.edge);
  }
}

// A vector of V elements.
template <class T>
__device__ __forceinline__ Raw packed(const Accumulate<T>* values) {
  Raw raw = {};
#pragma unroll
  for (int part = 0; part < kPartsOfVector<T>; ++part) pack<T>(values + part * kPart<T>, part, raw);
  return raw;
}

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
}

// Sums: the class sums are wanted. Wide: a row is a block's, and each warp has its part of it.
template <class T, int K, bool Calibrated, bool Sums, bool Wide>
__global__ void __launch_bounds__(Sums || Wide ? kWarpSumsThreads : kWarpRowThreads,
                                  Sums || Wide                        ? 1
                                  : Calibrated || K * kVector<T> > 40 ? 2
                                                                      : 3)
    row_warp_kernel(const RowArgs args) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, Q = kPart<T>, N = kPartsOfVector<T>, P = K * V;
  constexpr int kStages = kWarpStages<K>;
  DISALIGN_SHARED_MEMORY(memory);
  const WarpTile<T, K, Wide> tile(args);
  const int lane = tile.lane;
  unsigned char* areas = memory + kWarpScratchBytes<A, Wide>;
  unsigned char* staged = areas + tile.warp * kWarpBytes;
  A* class_memory = reinterpret_cast<A*>(areas + blockDim.x / 32 * kWarpBytes) +
                    (Wide ? tile.warp * ClassVectors<T>::count(args) * 32 * P : 0);

  const ClassVectors<T> classes(args, tile, class_memory);
  const EdgeVectors<A> edge(args, tile.edge, lane,
                            staged + 32 * kWarpStaged * kVectorBytes + Turn<T>::kBytes);
  const RowOptions<A> options(args);
  const bool smoothing = options.label_smoothing > 0;
  const bool slopes = Calibrated && args.grad_confidence;
  A weights = 0;
  if (smoothing) {
    weights = weight_sum<A>(args, 0, tile.classes, reinterpret_cast<A*>(memory));
    __syncthreads();
  }
  BlockSums block_sums(reinterpret_cast<double*>(memory), Wide ? 1 : blockDim.x / 32);
  Group<A, Wide> group(32, reinterpret_cast<A*>(memory + kWarpSumsBytes));
  const A inverse = args.backward      ? inverse_denominator<A>(args)
                    : args.grad_logits ? inverse_of<A>(forward_denominator(args))
                                       : A(1);
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  if (args.backward && !writes_logits && !args.grad_confidence && !Sums) return;

  const auto vector_at = [&](int round, int k) {
    return staged + ((round % kStages * K + k) * 32 + lane) * kVectorBytes;
  };
  if (!tile.has(K - 1)) {  // what is no vector is -inf, for good
    Raw nothing;
#pragma unroll
    for (int v = 0; v < V; ++v) set_element(nothing, v, from_accumulate<T>(negative_infinity<A>()));
    for (int k = max(tile.left + 31, 0) / 32; k < K; ++k) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) write_shared(vector_at(stage, k), nothing);
    }
  }

  const T* logits = static_cast<const T*>(args.logits);
  int ahead = kNoTarget;  // of this lane's row in the turn of the row that is asked for
  const int64_t step = tile.row_step * args.outer_stride;
  // Of the row that is asked for next: its first vector of this lane; of the one after this: its edge.
  const T* from = logits + tile.row * args.outer_stride + tile.first();
  const T* edge_from = from + (tile.edge - tile.first());
  const auto ask_for = [&](int round) {
    if (round < tile.rounds) {
      if (round % 32 == 0) {
        const int64_t own = tile.row_at(round + lane);
        ahead = own < args.outer ? target_of(args, own) : kNoTarget;
      }
      if (is_valid(__shfl_sync(kFullWarp, ahead, round % 32)))
        copy_vectors(vector_at(round, 0), from, tile.left, std::make_integer_sequence<int, K>{});
      from += step;
    }
    commit_copies();
  };
  const auto edge_of = [&](int round) {
    A z = negative_infinity<A>();
    if (tile.edge >= 0 && round < tile.rounds) z = to_accumulate(load_one(edge_from));
    edge_from += step;
    return z;
  };
#pragma unroll
  for (int round = 0; round < kStages - 1; ++round) ask_for(round);
  A next_edge = edge_of(0);
  int own_target = kNoTarget;  // of this lane's row of the turn
  const Turn<T> turn(staged + 32 * kWarpStaged * kVectorBytes);
  A grad_scale[Sums ? P + 1 : 1] = {}, grad_bias[Sums ? P + 1 : 1] = {};  // the last: the edge's
  for (int round = 0; round < tile.rounds; ++round) {
    const int at_turn = round % 32;
    if (at_turn == 0) {
      __syncwarp();
      own_target = ahead;  // whose row is of this turn by now
      turn.read(args, tile.row_at(round + lane), own_target, lane, inverse);
      __syncwarp();
    }
    ask_for(round + kStages - 1);
    const A z_edge = next_edge;
    next_edge = edge_of(round + 1);
    const int target = __shfl_sync(kFullWarp, own_target, at_turn);
    const auto of_row = [&](auto value) { return turn.at(value, at_turn); };
    const auto grad_row = [&] {
      return static_cast<T*>(args.grad_logits) + tile.row_at(round) * args.grad_outer_stride;
    };
    const auto write = [&](T* grad, const A(&g)[P + 1]) {
      T* to = grad + tile.first();
      if (reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (tile.has(k)) store_vector(to + 32 * k * V, packed<T>(&g[k * V]));
      } else {
#pragma unroll
        for (int p = 0; p < P; ++p)
          if (tile.has(p / V)) store_one(to + p / V * 32 * V + p % V, from_accumulate<T>(g[p]));
      }
      if (tile.edge >= 0) store_one(grad + tile.edge, from_accumulate<T>(g[P]));
    };
    wait_for_copies<kStages - 1>();

    if (!is_valid(target)) {
      if (writes_logits) write(grad_row(), {});
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
                           : calibrated(z_edge, edge.scale(), edge.bias(), c) + edge.prior();
      sums.maximum = larger(larger(sums.maximum, sums.target_logit), e[P]);
#pragma unroll
      for (int part = 0; part < K * N; ++part) {
        A z[Q], u[Q];
        unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
        classes.template calibrate<Calibrated>(lane + 32 * (part / N), part % N, z, c, u);
#pragma unroll
        for (int q = 0; q < Q; ++q) e[part * Q + q] = u[q];
      }
      if (classes.prior) {
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A o[Q];
          classes.load(classes.prior, lane + 32 * (part / N), part % N, o);
#pragma unroll
          for (int q = 0; q < Q; ++q) e[part * Q + q] += o[q];
        }
      }
#pragma unroll
      for (int p = 0; p < P; p += 2) sums.maximum = larger(sums.maximum, larger(e[p], e[p + 1]));
      sums.maximum = group.max(sums.maximum);

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
        if (tile.edge >= 0 && !place.at_edge) sums.smooth += edge.weight() * (e[P] - sums.maximum);
      }
      const A correction = make_exponentials(e, sums.maximum);
      sums.rest = sum_of(e);
      // exp(u - maximum) z of some vectors, as many as registers hold: it is used twice. 0 of the
      // target and of a masked class, and not 0 * -inf.
      constexpr int kProducts = Sums && sizeof(T) == 4 ? 4 : 0;
      A products[kProducts + 1];
      const auto product = [&](int p, A z) { return e[p] * larger(z, kLowest<A>); };
      if constexpr (Sums) {
        forget_loads();
#pragma unroll
        for (int part = 0; part < kProducts / Q; ++part) {
          A z[Q];
          unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
#pragma unroll
          for (int q = 0; q < Q; ++q) products[part * Q + q] = product(part * Q + q, z[q]);
        }
      }
      if (Calibrated && slopes) {
        forget_loads();
#pragma unroll
        for (int part = 0; part < K * N; ++part) {
          A z[Q], a[Q], b[Q];
          unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
          classes.load(classes.scale, lane + 32 * (part / N), part % N, a);
          classes.load(classes.bias, lane + 32 * (part / N), part % N, b);
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            const int p = part * Q + q;
            const A weighted = p < kProducts ? products[p < kProducts ? p : 0] : product(p, z[q]);
            sums.rest_slope = std::fma(a[q], weighted, std::fma(b[q], e[p], sums.rest_slope));
          }
        }
        const A weighted = product(P, z_edge);
        sums.rest_slope += edge.scale() * weighted + edge.bias() * e[P];
        if (smoothing) {
          forget_loads();
#pragma unroll
          for (int part = 0; part < K * N; ++part) {
            A z[Q], d[Q], w[Q];
            unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
            classes.slope(lane + 32 * (part / N), part % N, z, d);  // 0 of the target
            classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
            for (int q = 0; q < Q; ++q) sums.smooth_slope += w[q] * d[q];
          }
          const A d = finite_or_zero(edge.scale() * z_edge + edge.bias());
          if (!place.at_edge) sums.smooth_slope += edge.weight() * d;
        }
      }
      A values[4] = {sums.rest, sums.rest_slope, sums.smooth, sums.smooth_slope};
      if (smoothing) {
        group.sum(values);
        const A w_t = of_row(Turn<T>::kWeight);
        values[2] += w_t * (sums.target_logit - sums.maximum);
        if (slopes) values[3] += w_t * of_row(Turn<T>::kTargetSlope);
      } else if (slopes) {
        sum_first<2>(group, values);
      } else {
        sum_first<1>(group, values);
      }
      sums.rest = values[0] * correction;
      sums.rest_slope = values[1] * correction;
      sums.smooth = values[2], sums.smooth_slope = values[3];
      if (lane == at_turn) turn.keep(at_turn, sums, slopes, smoothing);

      if (writes_logits || Sums) {
        forget_loads();
        const A w_t = of_row(Turn<T>::kWeight), v_i = of_row(Turn<T>::kFactor);
        const PositionResult<A> result = position_result(options, sums, w_t, false);
        const A of_e = result.softmax * correction;
        if (writes_logits) {
          const A factor = args.backward ? v_i : v_i * inverse;
          const A softmax = factor * of_e, smooth = factor * result.smooth;
          A g[P + 1];
#pragma unroll
          for (int p = 0; p <= P; ++p) g[p] = softmax * e[p];
          if (smoothing) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A w[Q];
              classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
              for (int q = 0; q < Q; ++q) g[part * Q + q] -= smooth * w[q];
            }
            g[P] -= smooth * edge.weight();
          }
          if constexpr (Calibrated) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A a[Q];
              classes.load(classes.scale, lane + 32 * (part / N), part % N, a);
#pragma unroll
              for (int q = 0; q < Q; ++q) g[part * Q + q] *= a[q] * c + A(1);
            }
            g[P] *= edge.scale() * c + A(1);
          }
          T* grad = grad_row();
          write(grad, g);
          if (place.holds || place.at_edge) {  // over what it has written of the marked one
            A g_t = factor * result.at_target;
            if constexpr (Calibrated) g_t *= static_cast<const A*>(args.scale)[target] * c + A(1);
            store_one(grad + target, from_accumulate<T>(g_t));
          }
        }
        if constexpr (Sums) {
          const A softmax = v_i * c * of_e, smooth = v_i * c * result.smooth;
          forget_loads();
#pragma unroll
          for (int part = 0; part < K * N; ++part) {
            A z[Q];
            unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
              const int p = part * Q + q;
              const A ez = p < kProducts ? products[p < kProducts ? p : 0] : product(p, z[q]);
              grad_scale[p] = std::fma(softmax, ez, grad_scale[p]);
              grad_bias[p] = std::fma(softmax, e[p], grad_bias[p]);
            }
          }
          grad_scale[P] = std::fma(softmax, product(P, z_edge), grad_scale[P]);
          grad_bias[P] = std::fma(softmax, e[P], grad_bias[P]);
          if (smoothing) {
#pragma unroll
            for (int part = 0; part < K * N; ++part) {
              A z[Q], w[Q];
              unpack<T>(read_shared(vector_at(round, part / N)), part % N, z);
              classes.load(classes.weight, lane + 32 * (part / N), part % N, w);
#pragma unroll
              for (int q = 0; q < Q; ++q) {
                const int p = part * Q + q;
                const A g = place.is(p) ? A(0) : -smooth * w[q];
                grad_scale[p] += g * (z[q] == negative_infinity<A>() ? A(0) : z[q]);
                grad_bias[p] += g;
              }
            }
            const A g = place.at_edge ? A(0) : -smooth * edge.weight();
            grad_scale[P] += g * (z_edge == negative_infinity<A>() ? A(0) : z_edge);
            grad_bias[P] += g;
          }
          const A g = v_i * c * result.at_target;
          const A g_z = g * of_row(Turn<T>::kTargetZ);
          // Selects on what differs between lanes, which must not index registers.
          if (place.k >= 0)
            at_index<0, K>(place.k, [&](auto index) {
              constexpr int k = decltype(index)::value;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const bool here = place.holds && v == place.v;
                grad_scale[k * V + v] += here ? g_z : A(0);
                grad_bias[k * V + v] += here ? g : A(0);
              }
            });
          grad_scale[P] += place.at_edge ? g_z : A(0);
          grad_bias[P] += place.at_edge ? g : A(0);
        }
      }
    }

    if (at_turn < 31 && round + 1 < tile.rounds) continue;
    if (Wide && tile.warp > 0) continue;
    double loss = 0, divisor = 0;
    if (lane <= at_turn) {
      const int64_t own = tile.row_at(round - at_turn + lane);
      const bool valid = is_valid(own_target);
      PositionSums<A> sums;
      A w_t = 1, v_i = 0, c = 0;
      if (valid) {  // of an ignored row there is nothing in the turn
        sums = turn.kept(lane, slopes, smoothing, weights);
        w_t = turn.at(Turn<T>::kWeight, lane), v_i = turn.at(Turn<T>::kFactor, lane);
        c = turn.at(Turn<T>::kC, lane);
      }
      const PositionResult<A> result = position_result(options, sums, w_t, !args.backward);
      if (!args.backward) {
        write_position(args, own, own_target, sums, result, v_i, c);
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
    if (lane == 0) block_sums.add(tile.warp, loss, divisor);
  }
  if (args.block_sums) block_sums.write_and_finish<A>(args);
  if constexpr (Sums) write_warp_sums<T, K, Wide>(args, tile, grad_scale, grad_bias, areas);
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
  if (args.ticket && blockIdx.x == 0 && threadIdx.x == 0) *args.ticket = 0;
}

}  // namespace disalign::cuda
