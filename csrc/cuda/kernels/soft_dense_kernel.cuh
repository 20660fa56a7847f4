// Dense kernel whose targets are class probabilities: forward, forward with gradients, and backward are
// one kernel.
//
// - Maps: dense_tile.cuh. A thread has a vector of positions, 16 bytes of a plane of the logits, and
//   every `slices`-th class of both inputs. It copies them into shared memory, waits for its own copies
//   alone, and reads them there for the maximum, the sums and the gradients. Other blocks of the
//   multiprocessor compute meanwhile.
// - Forward: a thread's sums by its own maximum (soft_position.cuh); then a thread a position adds up the
//   slices, and makes the loss and the factors of its gradient. Backward has these from forward.
// - Memory: a tile that fits into shared memory is read once, in either direction; else once a pass.
//   grad_logits may be the logits: a thread has read what it writes over.
#pragma once

#include "cuda/kernels/dense_tile.cuh"
#include "cuda/kernels/row_details.cuh"
#include "cuda/kernels/soft_position.cuh"

namespace disalign::cuda {

// What the threads of a position share.
enum SoftEntry { kSoftC, kSoftShift, kSoftSoftmax, kSoftSmooth, kSoftEntries };

// Whether there is anything in the class vectors that exponentials, b_j or gradients need.
static DISALIGN_METHOD bool needs_soft_entries(const LossArgs& args) {
  return args.scale || args.prior || args.weight;
}

// Bytes that a vector of positions has of the probabilities, in vectors of 16.
template <class T>
DISALIGN_METHOD int soft_vectors(const LossArgs& args) {
  return sizeof(T) == 2 && args.probabilities_of_a ? 2 : 1;
}

// Shared memory of a block, in this order.
template <class T>
struct SoftDenseMemory {
  using A = Accumulate<T>;
  static constexpr int kScratch = 32;
  static constexpr int kValues = 4;  // of the first pass: maximum, rest, smooth, weight
  static_assert(kValues == RowDetails<A>::kValues);  // which lie there before them

  unsigned char* logits;         // [rounds][threads][16]
  unsigned char* probabilities;  // [rounds][soft_vectors][threads][16]
  double* scratch;               // [kScratch], of the sums over the block
  ClassEntry<A>* table;          // [classes], where args.table
  A* exchange;                   // [kValues][slices][positions]
  A* positions;                  // [kSoftEntries][positions]
  ClassSum<A>* class_sums;       // [classes of a thread][threads], where args.shared_sums

  static int64_t round_bytes(const DenseArgs& args) {
    return int64_t{1 + soft_vectors<T>(args)} * kDenseRoundBytes;
  }
  // Sets the offsets. Returns the bytes of all.
  static int64_t divide(DenseArgs& args) {
    args.probabilities_at = args.rounds * kDenseRoundBytes;
    int64_t bytes = args.rounds * round_bytes(args);
    const auto take = [&](int64_t entries, size_t size) {
      const int64_t begin = bytes;
      bytes += entries * static_cast<int64_t>(size);
      return static_cast<int32_t>(begin);
    };
    args.scratch_at = take(kScratch, sizeof(double));
    args.table_at = take(args.table ? args.classes : 0, sizeof(ClassEntry<A>));
    const int64_t exchanged = !args.backward ? kValues : args.grad_confidence ? 1 : 0;
    args.exchange_at = take(exchanged * kDenseThreads * kVector<T>, sizeof(A));
    args.positions_at = take(int64_t{kSoftEntries} * kVector<T> << args.lane_bits, sizeof(A));
    args.class_sums_at =
        take(args.shared_sums ? DenseMemory<T>::sum_entries(args) : 0, sizeof(ClassSum<A>));
    return bytes;
  }

  __device__ __forceinline__ SoftDenseMemory(const DenseArgs& args, unsigned char* memory)
      : logits(memory),
        probabilities(memory + args.probabilities_at),
        scratch(reinterpret_cast<double*>(memory + args.scratch_at)),
        table(reinterpret_cast<ClassEntry<A>*>(memory + args.table_at)),
        exchange(reinterpret_cast<A*>(memory + args.exchange_at)),
        positions(reinterpret_cast<A*>(memory + args.positions_at)),
        class_sums(reinterpret_cast<ClassSum<A>*>(memory + args.class_sums_at)) {}
};

// The rounds of a tile that are in shared memory: this thread's vectors, which it alone reads.
template <class T, bool Whole>
class SoftStage {
 public:
  using A = Accumulate<T>;
  using Vector = DenseVector<T, Whole>;
  static constexpr int V = kVector<T>;

  __device__ __forceinline__ SoftStage(const DenseArgs& args, const DensePlace& place,
                                       const SoftDenseMemory<T>& memory)
      : args_(args),
        place_(place),
        z_(memory.logits + threadIdx.x * kVectorBytes),
        y_(memory.probabilities + threadIdx.x * kVectorBytes),
        wide_(sizeof(T) == 2 && args.probabilities_of_a) {}

  // Of the tile that begins at a position of an image and has so many: a chunk of its rounds. Returns
  // when it is there.
  __device__ __forceinline__ void fetch(int image, int64_t at, int count, int chunk) const {
    const int first = chunk * args_.rounds, rounds = min(args_.rounds, place_.mine - first);
    const int64_t j = place_.slice + int64_t{first} * place_.slices;
    const T* logits = static_cast<const T*>(args_.logits) + image * args_.outer_stride + at;
    Vector::copy(place_, z_, logits + j * args_.class_stride, place_.slices * args_.class_stride,
                 rounds, count);
    const int64_t begin =
        image * args_.probability_outer_stride + at + j * args_.probability_class_stride;
    const int64_t step = place_.slices * args_.probability_class_stride;
    if (wide_)
      copy_wide(static_cast<const A*>(args_.probabilities) + begin, step, rounds, count);
    else
      Vector::copy(place_, y_, static_cast<const T*>(args_.probabilities) + begin, step, rounds,
                   count);
    commit_copies();
    wait_for_copies<0>();
  }

  __device__ __forceinline__ void logits(int round, A (&z)[V]) const {
    unpack_vector<T>(read_shared(z_ + round * kDenseRoundBytes), z);
  }
  __device__ __forceinline__ A logit(int round, int v) const {
    return to_accumulate(reinterpret_cast<const T*>(z_ + round * kDenseRoundBytes)[v]);
  }
  __device__ __forceinline__ void probabilities(int round, A (&y)[V]) const {
    if (!wide_) {
      unpack_vector<T>(read_shared(y_ + round * kDenseRoundBytes), y);
      return;
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        A half[V / 2];
        load_shared(reinterpret_cast<const A*>(y_ + (2 * round + part) * kDenseRoundBytes), half);
#pragma unroll
        for (int v = 0; v < V / 2; ++v) y[part * (V / 2) + v] = half[v];
      }
    }
  }

 private:
  // Probabilities of the arithmetic, of logits of half of its size.
  __device__ __forceinline__ void copy_wide(const A* from, int64_t step, int rounds,
                                            int count) const {
    constexpr int W = kVector<A>;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round, from += step) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        unsigned char* to = y_ + (2 * round + part) * kDenseRoundBytes;
        if (Whole && place_.lane * V < count) {
          copy_vector(to, from + place_.lane * V + part * W);
          continue;
        }
        Raw raw = {};
        if constexpr (!Whole && sizeof(T) == 2) {
#pragma unroll
          for (int w = 0; w < W; ++w) {
            const int p = Vector::position(place_, part * W + w);
            if (p < count) set_element(raw, w, load_one(from + p));
          }
        }
        write_shared(to, raw);
      }
    }
  }

  const DenseArgs& args_;
  const DensePlace& place_;
  unsigned char *z_, *y_;
  bool wide_;
};

// Blocks that shall fit on a multiprocessor.
template <class T, bool Calibrated, bool Whole>
constexpr int kSoftDenseBlocks = sizeof(T) == 8 || (Calibrated && !Whole) ? 1 : 2;

template <class T, bool Calibrated, bool Whole>
__global__ void __launch_bounds__(kDenseThreads, (kSoftDenseBlocks<T, Calibrated, Whole>))
    soft_dense_kernel(const DenseArgs args) {
  using A = Accumulate<T>;
  using Vector = DenseVector<T, Whole>;
  using Memory = SoftDenseMemory<T>;
  constexpr int V = kVector<T>;
  DISALIGN_SHARED_MEMORY(raw_memory);
  const Memory memory(args, raw_memory);
  const DensePlace place(args);
  const SoftOptions<A> options(args);
  const bool writes_logits = args.grad_logits && !is_made<A>(args);
  const bool slopes = Calibrated && args.grad_confidence;
  const bool sum_classes = Calibrated && args.class_gradients;
  const bool second_pass = writes_logits || slopes || sum_classes;
  if (args.backward && !second_pass) return;
  const A shared = args.backward ? shared_scale(args, inverse_denominator<A>(args)) : A(1);
  // Of the logits' gradient alone: finish_kernel divides the others.
  const A inverse =
      !args.backward && args.grad_logits ? inverse_of<A>(forward_denominator(args)) : A(1);
  const bool entries = needs_soft_entries(args);
  if (args.table) {
    for (int j = threadIdx.x; j < place.classes; j += kDenseThreads)
      memory.table[j] = ClassEntry<A>::of(args, j);
  }
  const auto entry_of = [&](int j) -> ClassEntry<A> {
    if (!entries) return {A(0), A(0), A(0), A(1)};
    return args.table ? memory.table[j] : ClassEntry<A>::of(args, j);
  };
  const auto u_of = [](const ClassEntry<A>& entry, A z, A c) {
    return (Calibrated ? calibrated(z, entry.a, entry.b, c) : z) + entry.o;
  };
  // This thread's of its first class; the next one's are kDenseThreads further on.
  ClassSum<A>* const class_sums =
      threadIdx.x + (args.shared_sums ? memory.class_sums
                                      : static_cast<ClassSum<A>*>(args.thread_sums) +
                                            blockIdx.x * DenseMemory<T>::sum_entries(args));
  if (sum_classes) {
    for (int k = 0; k < place.mine; ++k) class_sums[k * kDenseThreads] = {A(0), A(0)};
  }
  const int positions = place.lanes * V, of_slices = place.slices * positions;
  const auto entries_of = [&](int which) { return memory.positions + which * positions; };
  const auto write_factors = [&](int p, const SoftFactors<A>& factors) {
    entries_of(kSoftShift)[p] = factors.shift;
    entries_of(kSoftSoftmax)[p] = factors.softmax;
    entries_of(kSoftSmooth)[p] = factors.smooth;
  };
  const SoftStage<T, Whole> stage(args, place, memory);
  double loss = 0, divisor = 0;

  DenseTiles tiles(args);
  for (; tiles.image < args.outer; tiles.next(args)) {
    const int64_t at = int64_t{tiles.tile} * positions;
    const int count = tiles.tile == args.image_tiles - 1 ? args.last_positions : positions;
    const int64_t first_index = tiles.image * args.inner + at;
    const auto rounds_of = [&](int chunk) {
      return min(args.rounds, place.mine - chunk * args.rounds);
    };
    // The loops over positions, a thread each, are of barriers on both sides.
    if (Calibrated || args.backward) {
#pragma unroll 1
      for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
        const bool there = p < count;
        if constexpr (Calibrated)
          entries_of(kSoftC)[p] = there ? confidence_of<A>(args, first_index + p) : A(0);
        if (args.backward)
          write_factors(p, there ? soft_factors(args, first_index + p, shared) : SoftFactors<A>());
      }
    }
    stage.fetch(tiles.image, at, count, 0);
    __syncthreads();
    A of_c[V] = {};
    if constexpr (Calibrated) Vector::read(place, entries_of(kSoftC), of_c);

    if (!args.backward) {
      A maximum[V], rest[V] = {}, smooth[V] = {}, weight[V] = {};
#pragma unroll
      for (int v = 0; v < V; ++v) maximum[v] = kLowest<A>;
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
        if (chunk > 0) stage.fetch(tiles.image, at, count, chunk);
        const int rounds = rounds_of(chunk);
        const int first = place.slice + chunk * args.rounds * place.slices;
        A top[V];
#pragma unroll
        for (int v = 0; v < V; ++v) top[v] = maximum[v];
#pragma unroll 2
        for (int round = 0, j = first; round < rounds; ++round, j += place.slices) {
          A z[V];
          stage.logits(round, z);
          const ClassEntry<A> entry = entry_of(j);
#pragma unroll
          for (int v = 0; v < V; ++v) top[v] = larger(top[v], u_of(entry, z[v], of_c[v]));
        }
        if (chunk > 0) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A below = maximum[v] - top[v];
            rest[v] *= exponential(below);
            smooth[v] += soft_term(weight[v], below);
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) maximum[v] = top[v];
#pragma unroll 2
        for (int round = 0, j = first; round < rounds; ++round, j += place.slices) {
          A z[V], y[V];
          stage.logits(round, z);
          stage.probabilities(round, y);
          const ClassEntry<A> entry = entry_of(j);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A below = u_of(entry, z[v], of_c[v]) - maximum[v];
            const A b = entry.w * options.of(y[v]);
            rest[v] += exponential(below);
            smooth[v] += soft_term(b, below);
            weight[v] += b;
          }
        }
        if (args.details) {
          // A position at a time: most calls have no use for the registers.
#pragma unroll 1
          for (int v = 0; v < V; ++v) {
            const int p = Vector::position(place, v);
            const A c = Calibrated ? entries_of(kSoftC)[p] : A(0);
            A* const known = memory.exchange + place.slice * positions + p;
            RowDetails<A> found;
            if (chunk > 0) found = RowDetails<A>::read(known, of_slices);
#pragma unroll 1
            for (int round = 0, j = first; round < rounds; ++round, j += place.slices)
              found.add(u_of(entry_of(j), stage.logit(round, v), c), j, args.entropy != nullptr);
            found.write(known, of_slices);
          }
        }
      }
      if (args.details) {
        __syncthreads();
#pragma unroll 1
        for (int p = threadIdx.x; p < count; p += kDenseThreads)
          all_details(memory.exchange + p, place.slices, positions)
              .write(args, first_index + p, true);
        __syncthreads();
      }
      A* const exchange = memory.exchange + place.slice * positions;
      Vector::write(place, exchange, maximum);
      Vector::write(place, exchange + of_slices, rest);
      Vector::write(place, exchange + 2 * of_slices, smooth);
      Vector::write(place, exchange + 3 * of_slices, weight);
      __syncthreads();
#pragma unroll 1
      for (int p = threadIdx.x; p < positions; p += kDenseThreads) {
        SoftFactors<A> factors;
        if (p < count) {
          PositionSums<A> sums;
          const A* from = memory.exchange + p;
#pragma unroll 4
          for (int slice = 0; slice < place.slices; ++slice)
            sums.maximum = larger(sums.maximum, from[slice * positions]);
#pragma unroll 4
          for (int slice = 0; slice < place.slices; ++slice, from += positions) {
            const A below = *from - sums.maximum, b = from[3 * of_slices];
            sums.rest += from[of_slices] * exponential(below);
            sums.smooth += from[2 * of_slices] + soft_term(b, below);
            sums.weight += b;
          }
          const A v_i = vector_entry<A>(args.sample_weight, first_index + p, A(1));
          loss += static_cast<double>(write_soft_position(args, first_index + p, sums, v_i));
          divisor += divisor_share(args, A(1), v_i);
          factors = soft_factors(sums, v_i, true);
        }
        write_factors(p, factors);
      }
      if (second_pass) __syncthreads();
    }

    if (second_pass) {
      A shift[V], softmax[V], smooth[V], slope[V] = {};
      Vector::read(place, entries_of(kSoftShift), shift);
      Vector::read(place, entries_of(kSoftSoftmax), softmax);
      Vector::read(place, entries_of(kSoftSmooth), smooth);
      T* const grad = static_cast<T*>(args.grad_logits) + tiles.image * args.grad_outer_stride + at;
      for (int chunk = 0; chunk < args.chunks; ++chunk) {
        if (args.chunks > 1 && !(args.backward && chunk == 0))
          stage.fetch(tiles.image, at, count, chunk);
        const int rounds = rounds_of(chunk);
        int j = place.slice + chunk * args.rounds * place.slices;
        ClassSum<A>* sums = class_sums + chunk * args.rounds * kDenseThreads;
#pragma unroll 1
        for (int round = 0; round < rounds; ++round, j += place.slices, sums += kDenseThreads) {
          A z[V], y[V];
          stage.logits(round, z);
          stage.probabilities(round, y);
          const ClassEntry<A> entry = entry_of(j);
          ClassSum<A> sum = {A(0), A(0)};
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A b = entry.w * options.of(y[v]);
            A& g = y[v];
            g = softmax[v] * exponential(u_of(entry, z[v], of_c[v]) - shift[v]) - smooth[v] * b;
            if constexpr (Calibrated) {
              // A masked class adds 0, not 0 * -inf.
              if (slopes) slope[v] += g * finite_or_zero(entry.a * z[v] + entry.b);
              if (sum_classes) {
                const A gc = g * of_c[v];
                sum.scale += z[v] == negative_infinity<A>() ? A(0) : gc * z[v];
                sum.bias += gc;
              }
              g *= std::fma(entry.a, of_c[v], A(1));
            }
            g *= inverse;
          }
          if (writes_logits) Vector::store(place, grad + j * args.grad_class_stride, count, y);
          if (sum_classes) sums->scale += sum.scale, sums->bias += sum.bias;
        }
      }
      if (slopes) {
        Vector::write(place, memory.exchange + place.slice * positions, slope);
        __syncthreads();
#pragma unroll 1
        for (int p = threadIdx.x; p < count; p += kDenseThreads) {
          A sum = 0;
          for (int slice = 0; slice < place.slices; ++slice)
            sum += memory.exchange[slice * positions + p];
          const A c = entries_of(kSoftC)[p];
          static_cast<A*>(args.grad_confidence)[first_index + p] = c * (A(1) - c) * sum;
        }
      }
    }
    __syncthreads();  // the tile's shared memory is the next one's
  }
  if (args.block_sums) write_block_share<A>(args, loss, divisor, memory.scratch);
  if (sum_classes) write_dense_sums<T>(args, place, class_sums - threadIdx.x);
}

}  // namespace disalign::cuda
