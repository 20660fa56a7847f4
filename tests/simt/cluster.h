// What threads of a cluster's blocks do together: their barrier, and each other's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "basics.h"
#include "block.h"
#include "sanitizers.h"
#include "timelines.h"

namespace simt {

SIMT_UNSEEN inline void cluster_arrive(Place place) {
  Cluster& cluster = *this_block->cluster;
  Fiber& fiber = *this_fiber;
  if (fiber.arrived_at_cluster) fail_at(place, "a second arrival at the cluster's barrier");
  fiber.arrived_at_cluster = true;
  fiber.cluster_generation = cluster.generation;
  release(&cluster.tags[cluster.generation & 1]);
  if (++cluster.arrived == cluster.live) open_cluster_barrier(cluster);
}

SIMT_UNSEEN inline void cluster_wait(Place place) {
  Cluster& cluster = *this_block->cluster;
  Fiber& fiber = *this_fiber;
  if (!fiber.arrived_at_cluster) fail_at(place, "a wait at the cluster's barrier, not arrived");
  if (cluster.generation == fiber.cluster_generation)
    wait_while(cluster.generation, fiber.cluster_generation, place);
  acquire(&cluster.tags[fiber.cluster_generation & 1]);
  fiber.arrived_at_cluster = false;
}

// The place in the dynamic shared memory of the cluster's block `rank` that `pointer` is in this
// block's.
SIMT_UNSEEN inline void* map_shared(const void* pointer, uint32_t rank, Place place) {
  const Block& block = *this_block;
  const Cluster& cluster = *block.cluster;
  if (rank >= cluster.size)
    fail_at(place, "block %u of a cluster of %u blocks", rank, cluster.size);
  const auto* byte = static_cast<const unsigned char*>(pointer);
  if (byte < block.shared.data() || byte >= block.shared.data() + block.shared.bytes())
    fail_at(place, "a pointer outside dynamic shared memory is mapped to another block");
  const Block& other = *cluster.blocks[rank];
  if (other.live == 0) fail_at(place, "shared memory of block %u, which has exited", rank);
  return other.shared.data() + (byte - block.shared.data());
}

}  // namespace simt
