// Scalar formulas of the loss, shared by every native backend (docs/math.md, section "Per row").
//
// A row of logits is summarised by the maximum M of its calibrated logits u and by
// s = sum_j exp(u_j - M). M and log s are kept apart: their sum would lose the digits of a
// small loss behind a large offset.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DISALIGN_HD __host__ __device__ __forceinline__
#else
#define DISALIGN_HD static inline
#endif

namespace disalign {

struct RowTerms {
  double loss;     // this row's loss, its sample weight not included
  double softmax;  // dloss/du_j = softmax * p_j - smooth * w_j - target * [j = t]
  double target;
  double smooth;
};

DISALIGN_HD double sigmoid(double x) {
  // The branch keeps exp from overflowing and c near 0 exact.
  if (x >= 0) return 1.0 / (1.0 + exp(-x));
  const double e = exp(x);
  return e / (1.0 + e);
}

// Derivative of (1 - p)^gamma * nll by the target logit, divided by (p - 1), for nll > 0 or NaN.
DISALIGN_HD double focal_slope(double nll, double gamma) {
  const double p = exp(-nll);
  const double rest = -expm1(-nll);
  const double p_nll = p == 0 ? 0.0 : p * nll;  // p log p -> 0, not 0 * inf
  return pow(rest, gamma) + gamma * pow(rest, gamma - 1.0) * p_nll;
}

struct FocalTerms {
  double value;  // (1 - p)^gamma * nll
  double slope;  // its derivative by the target logit, divided by (p - 1)
};

DISALIGN_HD FocalTerms focal_terms(double nll, double gamma) {
  if (nll <= 0) return {0.0, 0.0};  // the limits at p = 1, for every gamma > 0
  return {pow(-expm1(-nll), gamma) * nll, focal_slope(nll, gamma)};
}

// nll: (M - u_t) + log s.  smooth_sum: sum_j w_j u_j - M sum_j w_j (used when smoothing > 0).
DISALIGN_HD RowTerms row_terms(double nll, double log_sum, double target_weight, double smoothing,
                               double weight_sum, double smooth_sum, double classes, double gamma) {
  RowTerms out;
  const FocalTerms focal = gamma > 0 ? focal_terms(nll, gamma) : FocalTerms{nll, 1.0};
  out.loss = (1.0 - smoothing) * target_weight * focal.value;
  out.target = (1.0 - smoothing) * target_weight * focal.slope;
  out.softmax = out.target;
  out.smooth = 0.0;
  if (smoothing > 0) {
    const double share = smoothing / classes;
    out.loss += share * (weight_sum * log_sum - smooth_sum);
    out.softmax += share * weight_sum;
    out.smooth = share;
  }
  return out;
}

}  // namespace disalign
