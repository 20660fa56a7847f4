// What is asked of a position beside its loss: its most probable class, and the entropy of its softmax,
// without the margin, which only training knows.
//
// - They are made of u while it is in registers, or of planes in shared memory, by its maximum; in a
//   branch that other calls do not take.
// - A class is found by its rank, so that one reduction of a maximum finds the first of several.
#pragma once

#include "cuda/kernels/arguments.h"
#include "cuda/kernels/group.cuh"
#include "cuda/kernels/position.cuh"

namespace disalign::cuda {

// More than a row's classes, and more than twice as much.
constexpr int kRank = 1 << 28, kNanRank = 3 << 28;

// Of some of a row's classes.
template <class A>
struct RowDetails {
  A maximum = kLowest<A>;  // of u; finite or infinity
  bool has_nan = false;    // of which the first is the most probable class, as torch.argmax has it
  int at = -1;             // the first class of `maximum`; -1: there is none
  // Of x_j = exp(u_j - maximum): sum_j x_j and sum_j x_j log x_j.
  A sum = 0, times_log = 0;

  __device__ __forceinline__ void add(A u) {
    const A x = exponential(u - maximum);
    sum += x;
    times_log = std::fma(x, larger(u - maximum, kLowest<A>), times_log);  // not 0 * -inf
  }

  // By the maximum so far, which u of class j may be above; classes ascending.
  __device__ __forceinline__ void add(A u, int j, bool entropy) {
    if (u != u) {
      at = has_nan ? at : j;
      has_nan = true;
    } else if (u > maximum || (at < 0 && u == maximum)) {
      at = has_nan ? at : j;
      // Not lower, as `sum` of it is finite: 0 * -inf.
      const A below = larger(maximum - u, kLowest<A> / kRank), factor = exponential(below);
      times_log = factor * std::fma(below, sum, times_log);
      sum *= factor;
      maximum = u;
    }
    if (entropy) add(u);
  }

  // The same of other classes.
  __device__ __forceinline__ void add(const RowDetails& other) {
    const bool before = other.at >= 0 && (at < 0 || other.at < at);
    const bool takes = other.has_nan != has_nan ? other.has_nan
                       : has_nan ? before
                                 : other.maximum > maximum || (other.maximum == maximum && before);
    if (takes) at = other.at;
    has_nan |= other.has_nan;
    const A top = larger(maximum, other.maximum);
    const auto lowered = [top](const RowDetails& some) {
      const A below = some.maximum - top, factor = exponential(below);
      return factor == A(0) ? RowDetails{top}
                            : RowDetails{top, false, -1, factor * some.sum,
                                         factor * std::fma(below, some.sum, some.times_log)};
    };
    const RowDetails own = lowered(*this), others = lowered(other);
    maximum = top, sum = own.sum + others.sum, times_log = own.times_log + others.times_log;
  }

  // Those of the lane that is `distance` away by its bits.
  __device__ __forceinline__ RowDetails of_lane(int distance) const {
    const auto from = [distance](auto v) { return __shfl_xor_sync(kFullWarp, v, distance); };
    return {from(maximum), from(static_cast<int>(has_nan)) != 0, from(at), from(sum),
            from(times_log)};
  }

  // From and to memory, entries `stride` apart.
  static constexpr int kValues = 4;
  __device__ __forceinline__ void write(A* to, int64_t stride) const {
    to[0] = maximum, to[stride] = sum, to[2 * stride] = times_log;
    *reinterpret_cast<int*>(to + 3 * stride) = has_nan ? -2 - at : at;
  }
  static __device__ __forceinline__ RowDetails read(const A* from, int64_t stride) {
    const int at = *reinterpret_cast<const int*>(from + 3 * stride);
    const bool has_nan = at < -1;
    return {from[0], has_nan, has_nan ? -2 - at : at, from[stride], from[2 * stride]};
  }

  // Of all classes, as those of row i.
  __device__ __forceinline__ void write(const LossArgs& args, int64_t i, bool valid) const {
    if (args.prediction) args.prediction[i] = at < 0 ? 0 : at;  // all classes are masked
    if (!args.entropy) return;
    // Of masked classes alone there is no sum.
    A entropy = sum == A(0) ? A(0) : std::log(sum) - times_log / sum;
    if (has_nan) entropy = static_cast<A>(NAN);
    static_cast<A*>(args.entropy)[i] = valid ? entropy : A(0);
  }
  // The same, or, where a row has several tiles, as those of its tile.
  __device__ __forceinline__ void write(const RowArgs& args, int64_t i, bool valid, unsigned tile,
                                        bool tiled) const {
    if (tiled)
      write(static_cast<A*>(args.tile_details) + tile * args.outer + i, args.tiles * args.outer);
    else
      write(args, i, valid);
  }
};

// The rank of a class, an integer above 0, in order and exactly: a float's bits have as many as there
// may be classes.
template <class A>
__device__ __forceinline__ A rank_of(bool is_nan, int place) {
  const int rank = (is_nan ? kNanRank : kRank) - place;
  if constexpr (sizeof(A) == sizeof(float))
    return __int_as_float(rank);
  else
    return static_cast<A>(rank);
}
// And back. 0: of no class.
template <class A>
__device__ __forceinline__ void set_class_of(A rank, RowDetails<A>& found) {
  if (rank <= A(0)) return;
  int number;
  if constexpr (sizeof(A) == sizeof(float))
    number = __float_as_int(rank);
  else
    number = static_cast<int>(rank);
  found.has_nan = number > 2 * kRank;  // what is no class has a place of -1
  found.at = (found.has_nan ? kNanRank : kRank) - number;
}

// Of a thread's u.
template <class A, int Count>
__device__ __forceinline__ A maximum_of(const A (&u)[Count]) {
  A maximum = kLowest<A>;
#pragma unroll
  for (int p = 0; p < Count; ++p) maximum = larger(maximum, u[p]);
  return maximum;
}

// Of u in the registers of a group's threads, classes ascending; u of what is no class is -inf. All
// threads get it. place_of(p): of element p among the group's classes, in their order: `at`
// is of these places. Last: the last element lies elsewhere than the others.
template <bool Last, class A, int Count, class PlaceOf, class GroupOfRow>
__device__ __forceinline__ RowDetails<A> row_details(const A (&u)[Count], PlaceOf place_of,
                                                     bool entropy, GroupOfRow& group) {
  constexpr int kAscending = Last ? Count - 1 : Count;
  RowDetails<A> found;
  found.maximum = group.max(maximum_of(u));
  const auto rank = [&](A v, int place) {
    return v == found.maximum || v != v ? rank_of<A>(v != v, place) : A(0);
  };
  int first = -1, first_nan = -1;
#pragma unroll
  for (int p = kAscending - 1; p >= 0; --p) {
    first = u[p] == found.maximum ? p : first;
    first_nan = u[p] != u[p] ? p : first_nan;
  }
  A highest = Last ? rank(u[Count - 1], place_of(Count - 1)) : A(0);
  if (first >= 0) highest = larger(highest, rank_of<A>(false, place_of(first)));
  if (first_nan >= 0) highest = larger(highest, rank_of<A>(true, place_of(first_nan)));
  set_class_of(group.max(highest), found);
  if (entropy) {
#pragma unroll
    for (int p = 0; p < Count; ++p) found.add(u[p]);
    // By two reductions, which makes four: the group's areas are known to the compiler after an even
    // number.
    A sum[1] = {found.sum}, times_log[1] = {found.times_log};
    group.sum(sum);
    group.sum(times_log);
    found.sum = sum[0], found.times_log = times_log[0];
  }
  return found;
}

// The same of class probabilities, of which no class lies apart; what is no class is not above `low`. By
// one thread: those of row i, or of its tile, where there are several.
template <bool Last, int Count, class A, class PlaceOf, class GroupOfRow>
__device__ __forceinline__ void write_soft_details(const RowArgs& args, const A (&u)[Count], A low,
                                                   PlaceOf place_of, GroupOfRow& group, int64_t i,
                                                   int tile, bool tiled, bool writes) {
  auto found = row_details<Last>(u, place_of, args.entropy != nullptr, group);
  if (!writes) return;
  if (found.maximum <= low && !found.has_nan) found = {};
  found.write(args, i, true, tile, tiled);
}

// Of a position of class planes, whose classes are divided into so many parts; they lie `positions`
// apart.
template <class A>
__device__ __forceinline__ RowDetails<A> all_details(const A* of_part, int parts, int positions) {
  RowDetails<A> found;
#pragma unroll 1
  for (int part = 0; part < parts; ++part)
    found.add(RowDetails<A>::read(of_part + part * positions, parts * positions));
  return found;
}

// Those of row i's tiles, by a warp.
template <class A>
__device__ __forceinline__ void combine_details(const RowArgs& args, int64_t i, int lane,
                                                bool valid) {
  RowDetails<A> found;
  for (int tile = lane; tile < args.tiles; tile += 32)
    found.add(RowDetails<A>::read(static_cast<const A*>(args.tile_details) + tile * args.outer + i,
                                  args.tiles * args.outer));
  for (int distance = 16; distance > 0; distance /= 2) found.add(found.of_lane(distance));
  if (lane == 0) found.write(args, i, valid);
}

}  // namespace disalign::cuda
