// Runs CUDA C++ device code on the host: each CUDA thread is a fiber that runs to its next
// synchronisation point, where the next fiber takes over.
//
// To be included before kernel code; needs the CUDA headers, no GPU and no CUDA library.
// Flags: tests/simt/CMakeLists.txt. What a kernel may use: builtins.h.
//
// Faults that simt sees by itself become simt::Error, thrown by simt::launch:
//   - threads that do not all reach the same barrier or warp collective, bad lane masks
//   - shared memory of another block that is not of the cluster, or has exited
//   - accesses that note_load and note_store refuse (memory.h)
//   - asynchronous copies of a wrong size, place or alignment, not waited for, or with a store to
//     their memory or source while they are under way (async_copy.h)
//   - writes just behind dynamic shared memory; shared memory never written reads as NaN
// The sanitizers see the rest: -fsanitize=address plain accesses outside a buffer, =alignment
// misaligned vectors, =thread accesses that no barrier orders (timelines.h).
#pragma once

#define DISALIGN_SIMT 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "basics.h"
#include "block.h"
#include "builtins.h"
#include "cluster.h"
#include "fiber.h"
#include "launch.h"
#include "memory.h"
#include "sanitizers.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "timelines.h"
#include "warp.h"
#include "watch.h"
