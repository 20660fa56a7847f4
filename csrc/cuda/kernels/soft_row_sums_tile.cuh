// What soft_row_sums_kernel.cuh is made of: sizes, teams, what stands for logits that a row has not, a
// lane's probabilities.
#pragma once

#include "cuda/kernels/row_warp_sums.cuh"
#include "cuda/kernels/soft_row_warp_kernel.cuh"

namespace disalign::cuda {

// Vectors of the logits that a lane keeps, with as many elements of the probabilities. Of several warps
// a row fewer, so that 8192 classes are eight warps'.
template <class T, int By>
constexpr int kSoftSumsVectors = (By == kByWarp ? 40 : 32) / kVector<T>;
constexpr int kSoftSumsThreads = 256;
constexpr int kSoftSumsWarps = kSoftSumsThreads / 32;
template <class A, int By>
using SoftSumsGroup = std::conditional_t<By == kByCluster, ClusterGroup<A, kSoftSumsWarps, 3>,
                                         Group<A, By != kByWarp, kSoftSumsWarps>>;
constexpr int kSoftGuessed = 8;  // elements of a lane whose maximum serves most rows
// Bytes of shared memory before the turns; the turn of a warp; the class sums of a warp, in place of the
// class vectors at the end.
template <class A, int By>
constexpr int kSoftSumsScratchBytes =
    kWarpSumsBytes +
    (SoftSumsGroup<A, By>::kScratchEntries + kClusterSlopes<By>)*static_cast<int>(sizeof(A));
constexpr int kSoftTurnBytes = Turn<float, true>::kBytes;
template <class T, int By>
constexpr int kSoftClassSumsBytes =
    2 * kSumsPitch * (kSoftSumsVectors<T, By> * kVector<T> + 1) * static_cast<int>(sizeof(float)) +
    8;  // so as to be aligned

// A logit so low that exp(u - shift) is 0 for shifts of a magnitude below kNear, to which exponents by
// one multiply-add are exact enough.
template <class T>
struct LowLogit {
  static constexpr float kLow = -1e30f, kNear = 1e6f;
};
template <>
struct LowLogit<__half> {
  static constexpr float kLow = -65504, kNear = 6e4f;
};

// Blocks that add up their class sums.
struct SoftTeam {
  int blocks;
  __device__ __forceinline__ int size() const { return blocks; }
  __device__ __forceinline__ int member() const { return blocks > 1 ? blockIdx.y : 0; }
};

// A lane's b_j of a row: in shared memory where a warp has a row, as registers are too few there.
template <class T, int By>
class OwnProbabilities {
 public:
  using A = Accumulate<T>;
  static constexpr bool kShared = By == kByWarp;
  static constexpr int P = kSoftSumsVectors<T, By> * kVector<T>, Q = kPart<T>;
  static constexpr int kBytes = kShared ? 32 * P * static_cast<int>(sizeof(A)) : 0;  // of a warp

  __device__ __forceinline__ OwnProbabilities(A* of_warp, int lane) : memory_(of_warp + lane * Q) {}
  // The last: the edge's.
  __device__ __forceinline__ void keep(const A (&b)[P + 1]) {
    edge = b[P];
#pragma unroll
    for (int p = 0; p < P; p += Q) {
      A values[Q];
#pragma unroll
      for (int q = 0; q < Q; ++q) values[q] = b[p + q];
      if constexpr (kShared) {
        store_shared(memory_ + 32 * p, values);
      } else {
#pragma unroll
        for (int q = 0; q < Q; ++q) registers_[p + q] = values[q];
      }
    }
  }
  __device__ __forceinline__ void load(int part, A (&out)[Q]) const {
    if constexpr (kShared) {
      load_shared(memory_ + 32 * part * Q, out);
    } else {
#pragma unroll
      for (int q = 0; q < Q; ++q) out[q] = registers_[part * Q + q];
    }
  }

  A edge = 0;

 private:
  A* memory_;
  A registers_[kShared ? 1 : P];
};

}  // namespace disalign::cuda
