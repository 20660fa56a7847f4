// Scalar formulas of the loss, shared by every native backend (docs/math.md, section "Per row").
//
// A row of logits is summarised by the maximum M of its calibrated logits u and by
// s = sum_j exp(u_j - M). M and log s are kept apart: their sum would lose the digits of a
// small loss behind a large offset.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DISALIGN_METHOD __host__ __device__ __forceinline__
#define DISALIGN_HD DISALIGN_METHOD
#else
#define DISALIGN_METHOD inline
#define DISALIGN_HD static inline
#endif

namespace disalign {

// Real: double on the CPU; the arithmetic of the logits on a GPU, where doubles are slow.
template <class Real>
struct RowTerms {
  Real loss;     // this row's loss, its sample weight not included
  Real softmax;  // dloss/du_j = softmax * p_j - smooth * w_j - target * [j = t]
  Real target;
  Real smooth;
};

template <class Real>
DISALIGN_HD Real sigmoid(Real x) {
  // The branch keeps exp from overflowing and c near 0 exact.
  if (x >= 0) return Real(1) / (Real(1) + std::exp(-x));
  const Real e = std::exp(x);
  return e / (Real(1) + e);
}

// Derivative of (1 - p)^gamma * nll by the target logit, divided by (p - 1), for nll > 0 or NaN.
template <class Real>
DISALIGN_HD Real focal_slope(Real nll, Real gamma) {
  const Real p = std::exp(-nll);
  const Real rest = -std::expm1(-nll);
  const Real p_nll = p == 0 ? Real(0) : p * nll;  // p log p -> 0, not 0 * inf
  return std::pow(rest, gamma) + gamma * std::pow(rest, gamma - Real(1)) * p_nll;
}

template <class Real>
struct FocalTerms {
  Real value;  // (1 - p)^gamma * nll
  Real slope;  // its derivative by the target logit, divided by (p - 1)
};

template <class Real>
DISALIGN_HD FocalTerms<Real> focal_terms(Real nll, Real gamma) {
  if (nll <= 0) return {Real(0), Real(0)};  // the limits at p = 1, for every gamma > 0
  return {std::pow(-std::expm1(-nll), gamma) * nll, focal_slope(nll, gamma)};
}

// nll: (M - u_t) + log s.  smooth_sum: sum_j w_j u_j - M sum_j w_j (used when smoothing > 0).
template <class Real>
DISALIGN_HD RowTerms<Real> row_terms(Real nll, Real log_sum, Real target_weight, Real smoothing,
                                     Real weight_sum, Real smooth_sum, Real classes, Real gamma) {
  RowTerms<Real> out;
  const FocalTerms<Real> focal = gamma > 0 ? focal_terms(nll, gamma) : FocalTerms<Real>{nll, 1};
  out.loss = (1 - smoothing) * target_weight * focal.value;
  out.target = (1 - smoothing) * target_weight * focal.slope;
  out.softmax = out.target;
  out.smooth = 0;
  if (smoothing > 0) {
    const Real share = smoothing / classes;
    out.loss += share * (weight_sum * log_sum - smooth_sum);
    out.softmax += share * weight_sum;
    out.smooth = share;
  }
  return out;
}

// With class probabilities. total: sum_j b_j.  smooth_sum: sum_j b_j (u_j - M).
template <class Real>
DISALIGN_HD RowTerms<Real> soft_row_terms(Real log_sum, Real total, Real smooth_sum) {
  return {total * log_sum - smooth_sum, total, Real(0), Real(1)};
}

}  // namespace disalign
