// Class sums of the rows that warps keep: out of registers, over the block or a team of blocks.
#pragma once

#include "cuda/kernels/row_warp_tile.cuh"

namespace disalign::cuda {

constexpr int kSumsPitch = 33;  // of a lane's elements in shared memory, for the banks

// A block's class sums. Those of warps with a row each are added in their order; of a wide row a
// class is one warp's. `memory` has so many bytes a warp, where neighbouring classes are brought to
// neighbouring lanes. The blocks of a team then add up what lies there, in their order, each for some
// of the classes.
template <class T, int K, int By, int Bytes = kWarpBytes<true>, class TeamOfBlocks = Team<true, By>>
__device__ __forceinline__ void write_warp_sums(const RowArgs& args, const WarpTile<T, K, By>& tile,
                                                const Accumulate<T> (&scale)[K * kVector<T> + 1],
                                                const Accumulate<T> (&bias)[K * kVector<T> + 1],
                                                unsigned char* memory,
                                                const TeamOfBlocks& team = {}) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, P = K * V, kPitch = kSumsPitch, kPlane = kPitch * (P + 1);
  static_assert(
      2 * kPlane * sizeof(A) <=
          (Bytes == kWarpBytes<true> ? kWarpStagedBytes + Turn<A, true>::kBytesBeforeShares
                                     : Bytes),
      "the first warp may still read the shares of a wide row");
  const auto of_warp = [=](int warp) { return reinterpret_cast<A*>(memory + warp * Bytes); };
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
  // Elements of a plane to class j: of this block, or of all blocks of the team.
  const bool by_team = team.size() > 1;
  const auto write = [&](const A* from, int j) {
    A scales = from[0], biases = from[kPlane];
    if (by_team) {
      scales = biases = 0;
#pragma unroll 4
      for (int block = 0; block < team.size(); ++block) {
        const A* of_block = Cluster::of_block(from, block);
        scales += of_block[0];
        biases += of_block[kPlane];
      }
    }
    to[j] = scales;
    to[tile.classes + j] = biases;
  };
  const int warps = blockDim.x / 32;
  if constexpr (By == kByWarp) {
    __syncthreads();
    const auto add_up = [&](int at) {
      A scales = 0, biases = 0;
      for (int warp = 0; warp < warps; ++warp) {
        scales += of_warp(warp)[at];
        biases += of_warp(warp)[kPlane + at];
      }
      of_warp(0)[at] = scales;
      of_warp(0)[kPlane + at] = biases;
    };
    for (int i = tile.warp; 32 * i < tile.vectors * V; i += warps) add_up(place(i));
    if (tile.warp == 0 && tile.edge >= 0) add_up(P * kPitch + tile.lane);
  }
  if (by_team)
    Cluster::barrier();
  else
    __syncwarp();  // a lane reads what it has added up, of a wide row what its warp has
  if constexpr (By == kByWarp) {
    for (int i = team.member() * warps + tile.warp; 32 * i < tile.vectors * V;
         i += team.size() * warps) {
      const int element = 32 * i + tile.lane;
      if (element < tile.vectors * V) write(of_warp(0) + place(i), tile.first_class + element);
    }
  } else {
    const int elements = tile.staged_vectors() * V - tile.lane;
#pragma unroll
    for (int i = 0; i < P; ++i)
      if (elements > 32 * i && (!by_team || (i & (team.size() - 1)) == team.member()))
        write(own + place(i), tile.base_class + tile.lane + 32 * i);
  }
  if (tile.edge >= 0 && tile.warp == 0 && team.member() == 0)
    write(of_warp(0) + P * kPitch + tile.lane, tile.edge);
  if (by_team) Cluster::barrier();  // until then its memory is read
}

}  // namespace disalign::cuda
