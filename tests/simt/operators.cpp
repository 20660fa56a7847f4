// The part of the operators' library that operators.py calls directly.
#include "simt.h"

extern "C" __attribute__((visibility("default"))) void simt_shuffle(uint64_t seed) {
  simt::options().shuffle = true;
  simt::options().seed = seed;
}
