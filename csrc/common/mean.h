// The summed loss over its denominator, of reduction 'mean'.
#pragma once

#include "common/loss_math.h"

namespace disalign {

// Nothing left to divide by: 'weights' is NaN whatever the sum, which smoothing or a masked target
// keeps from 0, as in PyTorch; a count or a given number is 0.
DISALIGN_HD double mean_of(double sum, double denominator, bool by_weights) {
  if (denominator == 0) return by_weights ? static_cast<double>(NAN) : 0.0;
  return sum / denominator;
}

}  // namespace disalign
