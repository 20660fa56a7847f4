// The scalars of loss_math.h for many positions at a time, once their sums over classes are known:
// the loss, the factors of the gradients, the gradient of the confidence. A register of doubles at
// a time.
#pragma once

#include "common/loss_math.h"
#include "cpu/kernels/lanes.h"

namespace disalign::DISALIGN_CAPABILITY {

// Sums of row_passes.h. kTotal: with class probabilities; backward takes it from forward.
enum Sum { kExponential, kSmooth, kSoftmaxSlope, kSmoothSlope, kTotal, kSums };

DISALIGN_INLINE void store_wide(double* p, Vec<double> v) { store(p, v); }
DISALIGN_INLINE void store_wide(float* p, Vec<double> v) {
  const auto half = __builtin_convertvector(v, Lanes<float>::HalfV);
  std::memcpy(p, &half, sizeof(half));
}

// Vectors of one entry a position, `size` long, a multiple of 16.
template <class A>
struct Positions {
  static constexpr int kVectors = 11;  // of A; besides them kSums + 1 of 8 bytes
  static constexpr int64_t bytes(int64_t size) {
    return size * (kVectors * static_cast<int64_t>(sizeof(A)) + (kSums + 1) * 8);
  }

  int64_t size;
  // Known before the logits are read. Ignored positions have target -1, and 0 in the others; with
  // class probabilities every target is 0, of weight 0.
  int64_t* target;
  A *c, *target_weight, *sample_weight, *g;  // g: the upstream gradient, everything included
  // From the logits. Backward takes maximum and total[kExponential] from forward.
  A *maximum, *target_logit;
  double* total[kSums];
  // Made by finish. q_j = softmax * e_j - smooth * w_j, after `patch` is taken off e_t.
  A *loss, *softmax, *smooth, *patch, *slope;  // slope: the confidence's gradient

  Positions(void* memory, int64_t size) : size(size) {
    auto* wide = static_cast<double*>(memory);
    for (int k = 0; k < kSums; ++k) total[k] = wide + k * size;
    target = reinterpret_cast<int64_t*>(wide + kSums * size);
    A* next = reinterpret_cast<A*>(wide + (kSums + 1) * size);
    A** const vectors[kVectors] = {&c,       &target_weight, &sample_weight, &g,
                                   &maximum, &target_logit,  &loss,          &softmax,
                                   &smooth,  &patch,         &slope};
    for (A** vector : vectors) {
      *vector = next;
      next += size;
    }
  }

  // Of `count` positions from `first` on; the rest of `size` is as if ignored. Returns how many
  // count.
  int64_t prepare(const LossArgs& args, int64_t first, int64_t count) const {
    int64_t valid = 0;
    for (int64_t p = 0; p < size; ++p) {
      const int64_t i = first + p;
      const int64_t t = p >= count    ? -1
                        : args.target ? read_index(args.target, args.target_type, i)
                                      : 0;
      const bool is_valid = p < count && (args.probabilities || t != args.ignore_index);
      const double v = is_valid ? read_or<A>(args.sample_weight, i, 1.0) : 0.0;
      target[p] = is_valid ? t : -1;
      target_weight[p] =
          is_valid && args.target ? static_cast<A>(read_or<A>(args.weight, t, 1.0)) : A(0);
      sample_weight[p] = static_cast<A>(v);
      // A denominator of 0 means that nothing is left: every gradient is 0, whatever stands above.
      g[p] = is_valid && args.inverse_denominator != 0
                 ? static_cast<A>(read_or<A>(args.upstream, i * args.upstream_stride, 1.0) * v *
                                  args.inverse_denominator)
                 : A(0);
      valid += is_valid;
    }
    return valid;
  }

  void take_statistics(const LossArgs& args, int64_t first, int64_t count) const {
    for (int64_t p = 0; p < size; ++p) {
      total[kExponential][p] =
          p < count ? static_cast<double>(static_cast<const A*>(args.row_sum)[first + p]) : 1.0;
      if (args.probabilities)
        total[kTotal][p] =
            p < count ? static_cast<double>(static_cast<const A*>(args.row_total)[first + p]) : 0.0;
    }
  }

  void finish(const LossArgs& args) const {
    using V = Vec<double>;
    const double smoothing = args.label_smoothing, gamma = args.focal_gamma;
    const double share = args.probabilities ? 1.0 : smoothing / static_cast<double>(args.classes);
    for (int64_t p = 0; p < size; p += Lanes<double>::N) {
      const V sum = load(total[kExponential] + p);
      const V log_sum = log_positive(sum);
      const V nll = (load_wide(maximum + p) - load_wide(target_logit + p)) + log_sum;
      V value = nll,
        ratio = splat<double>(1.0);  // ratio: of the target term's slope to plain nll's
      if (gamma > 0) {
        for (int k = 0; k < Lanes<double>::N; ++k) {
          const FocalTerms<double> focal = focal_terms(nll[k], gamma);
          value[k] = focal.value;
          ratio[k] = focal.slope;
        }
      }
      const V w = load_wide(target_weight + p) * (1.0 - smoothing);
      V target_factor = w * ratio;
      V position_loss = w * value, softmax_factor = target_factor;
      if (args.probabilities) {
        softmax_factor = load(total[kTotal] + p);
        position_loss = softmax_factor * log_sum - load(total[kSmooth] + p);
        target_factor = V{};
      } else if (smoothing > 0) {
        position_loss += (log_sum * args.weight_sum - load(total[kSmooth] + p)) * share;
        softmax_factor += share * args.weight_sum;
      }
      const V upstream = load_wide(g + p);
      store_wide(loss + p, position_loss * load_wide(sample_weight + p));
      store_wide(softmax + p, upstream * softmax_factor / sum);
      store_wide(smooth + p, upstream * share);
      store_wide(patch + p, softmax_factor == 0.0 ? V{} : sum * target_factor / softmax_factor);
      if (args.grad_confidence) {
        const V confidence = load_wide(c + p);
        const V slopes = softmax_factor * load(total[kSoftmaxSlope] + p) / sum -
                         load(total[kSmoothSlope] + p) * share;
        store_wide(slope + p, upstream * confidence * (1.0 - confidence) * slopes);
      }
    }
  }

  // Statistics and losses of `count` positions to where the caller wants them; their summed loss.
  double write(const LossArgs& args, int64_t first, int64_t count) const {
    double sum = 0;
    for (int64_t p = 0; p < count; ++p) {
      const bool is_valid = target[p] >= 0;
      const int64_t i = first + p;
      sum += static_cast<double>(loss[p]);
      if (args.loss) static_cast<A*>(args.loss)[i] = is_valid ? loss[p] : A(0);
      if (!args.row_shift) continue;
      static_cast<A*>(args.row_shift)[i] = is_valid ? maximum[p] : A(0);
      static_cast<A*>(args.row_sum)[i] = is_valid ? static_cast<A>(total[kExponential][p]) : A(1);
      if (args.row_total) static_cast<A*>(args.row_total)[i] = static_cast<A>(total[kTotal][p]);
    }
    return sum;
  }

  // As write, of positions that are all ignored and were not looked at.
  static void write_ignored(const LossArgs& args, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      if (args.loss) static_cast<A*>(args.loss)[i] = A(0);
      if (!args.row_shift) continue;
      static_cast<A*>(args.row_shift)[i] = A(0);
      static_cast<A*>(args.row_sum)[i] = A(1);
    }
  }
};

}  // namespace disalign::DISALIGN_CAPABILITY
