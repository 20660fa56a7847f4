#include "cpu/ops/capability.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(DISALIGN_HAVE_X86_KERNELS)
#include <cpuid.h>
#endif

namespace disalign {
namespace {

constexpr Capability kAll[] = {Capability::kBaseline, Capability::kAvx2, Capability::kAvx512};

#if defined(DISALIGN_HAVE_X86_KERNELS)
// __builtin_cpu_supports does not know this one in clang 14.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool supported(Capability capability) {
#if defined(DISALIGN_HAVE_X86_KERNELS)
  switch (capability) {
    case Capability::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             supported(Capability::kAvx2);
    case Capability::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Capability::kBaseline:
      return true;
  }
#endif
  return capability == Capability::kBaseline;
}

Capability detect() {
  const char* wanted = std::getenv("DISALIGN_OPS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    Capability best = Capability::kBaseline;
    for (Capability c : kAll)
      if (supported(c)) best = c;
    return best;
  }
  for (Capability c : kAll)
    if (std::string(wanted) == name(c) && supported(c)) return c;
  std::string usable;
  for (Capability c : kAll)
    if (supported(c)) usable += std::string(usable.empty() ? "" : ", ") + name(c);
  throw std::runtime_error("DISALIGN_OPS_CPU_CAPABILITY is '" + std::string(wanted) +
                           "', this build and processor can use: " + usable);
}

// "used=avx512;compiled=baseline,avx2,avx512;compiler=...;torch_target=2.10"
std::string build_info() {
  std::string compiled;
#if defined(DISALIGN_HAVE_X86_KERNELS)
  compiled = "baseline,avx2,avx512";
#else
  compiled = "baseline";
#endif
  const auto target = static_cast<unsigned long long>(TORCH_FEATURE_VERSION);
  return std::string("used=") + name(capability()) + ";compiled=" + compiled +
         ";compiler=" DISALIGN_COMPILER ";torch_target=" + std::to_string(target >> 56) + "." +
         std::to_string((target >> 48) & 0xff);
}

}  // namespace

const char* name(Capability capability) {
  switch (capability) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    case Capability::kBaseline:
      break;
  }
  return "baseline";
}

Capability capability() {
  static const Capability chosen = detect();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace disalign
