// simt::launch: all blocks of a grid, on a few OS threads; a cluster of blocks on one.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "basics.h"
#include "block.h"
#include "sanitizers.h"
#include "scheduler.h"
#include "timelines.h"

namespace simt {

// Blocks outlive a launch, so that tests of many small launches do not map stacks over and over.
class IdleBlocks {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }
  void put_back(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
};
inline IdleBlocks idle_blocks;

inline bool has_failed(const Launch& launch) {
  return __atomic_load_n(&launch.failed, __ATOMIC_RELAXED);
}

// order: of the clusters.
inline void run_on_threads(Launch& launch, const std::vector<uint32_t>& order) {
  uint64_t next = 0;
  const auto work = [&] {
    std::unique_ptr<Block> blocks[kMostClusterBlocks];
    Cluster cluster(launch);
    for (uint32_t rank = 0; rank < cluster.size; rank++) {
      blocks[rank] = idle_blocks.take();
      prepare(*blocks[rank], launch);
      cluster.blocks[rank] = blocks[rank].get();
    }
    while (!has_failed(launch)) {
      const uint64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= order.size()) break;
      run_cluster(cluster, order[i]);
    }
    for (uint32_t rank = 0; rank < cluster.size; rank++) {
      add_traffic(blocks[rank]->traffic);
      idle_blocks.put_back(std::move(blocks[rank]));
    }
  };
  // A thread is worth its start from a few blocks on.
  uint64_t thread_count = launch.options.shuffle ? 1 : launch.options.os_threads;
  thread_count = std::max<uint64_t>(1, std::min<uint64_t>(thread_count, order.size() / 4));
  std::vector<std::thread> threads;
  for (uint64_t i = 1; i < thread_count; i++) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// For the thread sanitizer: every cluster on an OS thread of its own, with memory of its own, one
// after another, but nothing that the sanitizer knows of orders them. So it sees races between
// blocks, and does not take the reuse of a stack or of shared memory for one.
SIMT_UNSEEN inline void run_unordered(Launch& launch, const std::vector<uint32_t>& order) {
  constexpr size_t kMostThreads = 1024;  // at a time; the sanitizer has a limit
  std::vector<std::thread> threads;
  const auto join = [&] {
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  };
  const uint32_t thread_count = launch.block.x * launch.block.y * launch.block.z;
  for (uint64_t i = 0; i < order.size(); i++) {
    if (threads.size() == kMostThreads) join();
    std::array<void**, kMostClusterBlocks> of_rank{};
    const uint32_t size = Cluster(launch).size;
    for (uint32_t rank = 0; rank < size; rank++)
      of_rank[rank] = timelines.of_block(i * size + rank, thread_count);
    bool done = false;
    threads.emplace_back([&launch, &done, of_rank, number = order[i]] {
      {
        Block blocks[kMostClusterBlocks];
        Cluster cluster(launch);
        for (uint32_t rank = 0; rank < cluster.size; rank++) {
          blocks[rank].timelines = of_rank[rank];
          prepare(blocks[rank], launch);
          cluster.blocks[rank] = &blocks[rank];
        }
        run_cluster(cluster, number);
        for (uint32_t rank = 0; rank < cluster.size; rank++) add_traffic(blocks[rank].traffic);
      }
      __atomic_store_n(&done, true, __ATOMIC_RELAXED);
    });
    while (!__atomic_load_n(&done, __ATOMIC_RELAXED)) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    if (has_failed(launch)) {
      timelines.discard();
      break;
    }
  }
  join();
}

inline void check_limits(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  const uint64_t clustered = uint64_t{cluster.x} * cluster.y * cluster.z;
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw Error("simt: " + what);
  };
  require(grid.x && grid.y && grid.z && block.x && block.y && block.z, "an empty grid or block");
  require(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "a grid beyond the limits");
  require(block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
              uint64_t{block.x} * block.y * block.z <= 1024,
          "a block of more than 1024 threads");
  require(launch.shared_bytes <= 227 << 10, "more than 227 KiB of shared memory");
  require(clustered > 0 && clustered <= kMostClusterBlocks, "a cluster of more than 8 blocks");
  require(grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0,
          "a grid that is no multiple of its clusters");
  require(!kThreadSanitizer || clustered <= Timelines::number_of_sets(block.x * block.y * block.z),
          "a cluster whose blocks the thread sanitizer would take for one another");
  require(!this_block, "a launch from inside a kernel");
}

// Runs body() once for each thread of each block, the blocks of a cluster in turn; throws Error
// when it fails, and the next launch works all the same. Not to be called from two OS threads at
// once.
template <class F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, F&& body, dim3 cluster = dim3(1)) {
  using Body = std::remove_reference_t<F>;
  Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.cluster = cluster;
  launch.shared_bytes = shared_bytes;
  launch.body = [](void* argument) { (*static_cast<Body*>(argument))(); };
  launch.argument = const_cast<void*>(static_cast<const void*>(std::addressof(body)));
  launch.options = options();
  check_limits(launch);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint32_t> order(blocks / (cluster.x * cluster.y * cluster.z));
  std::iota(order.begin(), order.end(), 0);
  if (launch.options.shuffle) {
    Random(launch.options.seed).shuffle(order.data(), order.size());
  }
  if (kThreadSanitizer) {
    run_unordered(launch, order);
  } else {
    run_on_threads(launch, order);
  }
  if (launch.failed) throw Error(launch.message);
}

}  // namespace simt
