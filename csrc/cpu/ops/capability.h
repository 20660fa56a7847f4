// Which of the compiled instruction sets this process uses.
#pragma once

#include "cpu/kernels/chunk.h"
#include "ops/arguments.h"

namespace disalign {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best one that the processor has, unless DISALIGN_OPS_CPU_CAPABILITY names a lesser one.
// Throws std::runtime_error for a name that is unknown, not compiled or not supported here.
Capability capability();
const char* name(Capability capability);

// table(...) of the chosen instruction set, for tables declared in three namespaces.
#if defined(DISALIGN_HAVE_X86_KERNELS)
#define DISALIGN_CHOOSE(table)                                                   \
  (::disalign::capability() == Capability::kAvx512 ? ::disalign::avx512::table() \
   : ::disalign::capability() == Capability::kAvx2 ? ::disalign::avx2::table()   \
                                                   : ::disalign::baseline::table())
#else
#define DISALIGN_CHOOSE(table) (::disalign::baseline::table())
#endif

// The entry of a KernelTable for logits of `dtype`.
template <class Kernels>
const Kernels& kernels_for(const KernelTable<Kernels>& table, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return table.float64;
    case ScalarType::BFloat16:
      return table.bfloat16;
    case ScalarType::Half:
      return table.float16;
    default:
      return table.float32;
  }
}

}  // namespace disalign
