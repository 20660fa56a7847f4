// The loss operators, once for every layout and device: arguments, results and their order.
//
// An Operator is a layout on a device (cpu/ops/row.cpp, cuda/ops/row.cu): it has the Layout
// (layouts.h), the kernels' Args, the bits of a WantedCode that its forward makes, of rows also those
// that forward of a shard makes, and a Device whose `forward` and `backward` run the kernels.
// Schemas: _ops/schemas.py.
#pragma once

#include <string>

#include "ops/inputs.h"
#include "ops/layouts.h"

namespace disalign {

// Options: those of the layout, between the loss's and the reduction.
template <class Operator, class... Options>
struct LossOperator {
  using Layout = typename Operator::Layout;
  using Args = typename Operator::Args;
  using Device = typename Operator::Device;

  // {loss, if wanted statistics (2, positions; 3 with class probabilities) and denominator, gradients,
  // details}
  static Results forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& scale, const OptionalTensor& bias,
                         const OptionalTensor& confidence, const OptionalTensor& prior,
                         const OptionalTensor& margin, const OptionalTensor& sample_weight,
                         const OptionalTensor& denominator, int64_t ignore_index,
                         double label_smoothing, double focal_gamma, Options... options,
                         int64_t reduction, int64_t normalizer, int64_t wanted_bits) {
    Args args;
    Layout::set(logits, target, args, options...);
    const int64_t confidences = Layout::confidences(args), positions = args.positions();
    set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
                ignore_index, label_smoothing, focal_gamma},
               confidences, args);
    const Wanted wanted(wanted_bits);
    require((wanted_bits & ~(Operator::kWantedOfForward | kWantStatistics)) == 0,
            "a result is wanted that forward does not make on this device");
    const bool each = reduction == kReduceNone;
    require(!each || !wanted.any(),
            "reduction 'none' has no gradients before its upstream gradient is known");
    require(normalizer != kByGiven || denominator.has_value(), "denominator is not given");
    args.reduction = reduction;
    args.normalizer = normalizer;
    args.given_denominator = static_cast<const double*>(
        vector_data(denominator, "denominator", 1, ScalarType::Double, logits));

    Device device(logits);
    const Place place = place_of(logits);
    const ScalarType dtype = accumulate_dtype(logits.scalar_type());
    Results results;
    results.reserve(8);
    const auto add = [&](Tensor tensor) {
      results.push_back(tensor);
      return tensor.mutable_data_ptr();
    };
    void* loss = add(each ? new_tensor({positions}, dtype, place) : new_tensor({}, dtype, place));
    (each ? args.loss : args.reduced_loss) = loss;
    Results known;
    if (wanted.statistics || Device::kWritesStatistics) {
      known = {new_tensor({statistics_of(args), positions}, dtype, place),
               new_tensor({}, ScalarType::Double, place)};
      set_statistics(known[0].mutable_data_ptr(), dtype, args);
      args.denominator = static_cast<double*>(known[1].mutable_data_ptr());
      if (wanted.statistics) results.insert(results.end(), known.begin(), known.end());
    }
    add_gradients<Layout>(logits, confidences, wanted, nullptr, args, results);
    if constexpr ((Operator::kWantedOfForward & kWantDetails) != 0) {
      if (wanted.details && !each) args.loss = add(new_vector(logits, positions));
      if constexpr (Layout::kPredicts) {
        if (wanted.details) args.probability = add(new_vector(logits, positions));
      }
      const bool predicts = wanted.prediction || (Layout::kPredicts && wanted.details);
      add_details(logits, predicts, wanted.entropy, args, results);
    }
    device.template forward<Operator>(logits, args);
    return results;
  }

  // {gradients}; InPlace: that of the logits is written over them. Made: one Tensor, the gradient of
  // the logits that forward made, which is written over where the upstream gradient is not 1.
  template <bool InPlace, class... Made>
  static Results backward(const Tensor& grad_loss, const Made&... made, const Tensor& logits,
                          const Tensor& target, const OptionalTensor& weight,
                          const OptionalTensor& scale, const OptionalTensor& bias,
                          const OptionalTensor& confidence, const OptionalTensor& prior,
                          const OptionalTensor& margin, const OptionalTensor& sample_weight,
                          const Tensor& statistics, const Tensor& denominator, int64_t ignore_index,
                          double label_smoothing, double focal_gamma, Options... options,
                          int64_t wanted_bits) {
    Args args;
    Layout::set(logits, target, args, options...);
    const int64_t confidences = Layout::confidences(args), positions = args.positions();
    set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
                ignore_index, label_smoothing, focal_gamma},
               confidences, args);
    const ScalarType dtype = accumulate_dtype(logits.scalar_type());
    const bool one_upstream = grad_loss.dim() == 0;
    args.upstream =
        vector_data(grad_loss, "grad_loss", one_upstream ? 1 : positions, dtype, logits);
    args.upstream_stride = one_upstream ? 0 : 1;
    vector_data(statistics, "statistics", statistics_of(args) * positions, dtype, logits);
    set_statistics(statistics.mutable_data_ptr(), dtype, args);
    vector_data(denominator, "denominator", 1, ScalarType::Double, logits);
    args.denominator = static_cast<double*>(denominator.mutable_data_ptr());
    const Wanted wanted(wanted_bits);
    const Tensor* grad_logits = InPlace ? &logits : nullptr;
    if constexpr (sizeof...(Made) > 0) {
      require(one_upstream && wanted.logits,
              "a gradient of the logits that forward made has one upstream gradient");
      (require_like(made, logits), ...);
      (Layout::set_gradient(made, args), ...);
      grad_logits = (&made, ...);
      args.gradient_made = true;
    }
    Device device(logits);
    Results results;
    set_gradients(logits, grad_logits, wanted, args, results);
    device.template backward<Operator>(logits, args);
    return results;
  }

  // Rows of which the logits are some of the classes: {sums, details}; _sharded/shards.py combines
  // them.
  static Results shard_forward(const Tensor& logits, const Tensor& target,
                               const OptionalTensor& weight, const OptionalTensor& scale,
                               const OptionalTensor& bias, const OptionalTensor& confidence,
                               const OptionalTensor& prior, const OptionalTensor& margin,
                               double keep, double share, int64_t wanted_bits) {
    Args args =
        shard_args(logits, target, weight, scale, bias, confidence, prior, margin, keep, share);
    require((wanted_bits & ~Operator::kWantedOfShard) == 0,
            "a result is wanted that forward of a shard does not make on this device");
    const Wanted wanted(wanted_bits);
    Device device(logits);
    Results results;
    results.push_back(new_tensor({kShardValues, args.positions()},
                                 accumulate_dtype(logits.scalar_type()), place_of(logits)));
    args.shard_sums = results[0].mutable_data_ptr();
    add_details(logits, wanted.prediction, wanted.entropy, args, results);
    device.template forward<Operator>(logits, args);
    return results;
  }

  // {gradients} from factors made of all shards' sums.
  template <bool InPlace>
  static Results shard_backward(const Tensor& factors, const Tensor& logits, const Tensor& target,
                                const OptionalTensor& weight, const OptionalTensor& scale,
                                const OptionalTensor& bias, const OptionalTensor& confidence,
                                const OptionalTensor& prior, const OptionalTensor& margin,
                                double keep, double share, int64_t wanted_bits) {
    Args args =
        shard_args(logits, target, weight, scale, bias, confidence, prior, margin, keep, share);
    args.shard_factors = vector_data(factors, "factors", kShardValues * args.positions(),
                                     accumulate_dtype(logits.scalar_type()), logits);
    args.row_shift = factors.mutable_data_ptr();
    Device device(logits);
    Results results;
    set_gradients(logits, InPlace ? &logits : nullptr, Wanted(wanted_bits), args, results);
    device.template backward<Operator>(logits, args);
    return results;
  }

 private:
  static int64_t statistics_of(const Args& args) { return args.probabilities ? 3 : 2; }

  static void add_details(const Tensor& logits, bool prediction, bool entropy, Args& args,
                          Results& results) {
    const int64_t positions = args.positions();
    if (prediction) {
      results.push_back(new_tensor(&positions, 1, aoti_torch_dtype_int64(), place_of(logits)));
      args.prediction = static_cast<int64_t*>(results.back().mutable_data_ptr());
    }
    if (entropy) {
      results.push_back(new_vector(logits, positions));
      args.entropy = results.back().mutable_data_ptr();
    }
  }

  static void set_statistics(void* memory, ScalarType dtype, Args& args) {
    const int64_t bytes = args.positions() * size_of(dtype);
    args.row_shift = memory;
    args.row_sum = static_cast<char*>(memory) + bytes;
    if (args.probabilities) args.row_total = static_cast<char*>(memory) + 2 * bytes;
  }

  static void set_gradients(const Tensor& logits, const Tensor* grad_logits, Wanted wanted,
                            Args& args, Results& results) {
    results.reserve(4);
    add_gradients<Layout>(logits, Layout::confidences(args), wanted, grad_logits, args, results);
    if (grad_logits != &logits || !wanted.logits) return;
    require(!overlaps(logits),
            "the logits overlap in memory: a gradient cannot be written over them");
    Layout::set_over_logits(args);
  }

  static Args shard_args(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& scale, const OptionalTensor& bias,
                         const OptionalTensor& confidence, const OptionalTensor& prior,
                         const OptionalTensor& margin, double keep, double share) {
    const OptionalTensor none;
    Args args;
    Layout::set(logits, args);
    set_inputs({logits, target, weight, scale, bias, confidence, prior, margin, none, kIgnored,
                share > 0 ? 1.0 : 0.0, 0.0},
               args.positions(), args);
    args.keep = keep;
    args.share = share;
    return args;
  }
};

// Registers the operators of a layout, "row" and so on.
template <class Operator, class... Options>
void register_loss(torch::stable::detail::StableLibrary& library, const std::string& layout) {
  using Loss = LossOperator<Operator, Options...>;
  library.impl((layout + "_forward").c_str(), TORCH_BOX(&Loss::forward));
  library.impl((layout + "_backward").c_str(), TORCH_BOX(&Loss::template backward<false>));
  library.impl((layout + "_backward_").c_str(), TORCH_BOX(&Loss::template backward<true>));
}

// Backward where forward makes the gradient of the logits, too.
template <class Operator>
void register_made(torch::stable::detail::StableLibrary& library, const std::string& layout) {
  library.impl((layout + "_backward_made").c_str(),
               TORCH_BOX((&LossOperator<Operator>::template backward<false, Tensor>)));
}

template <class Operator>
void register_shard(torch::stable::detail::StableLibrary& library, const std::string& layout) {
  using Loss = LossOperator<Operator>;
  library.impl((layout + "_shard_forward").c_str(), TORCH_BOX(&Loss::shard_forward));
  library.impl((layout + "_shard_backward").c_str(),
               TORCH_BOX(&Loss::template shard_backward<false>));
  library.impl((layout + "_shard_backward_").c_str(),
               TORCH_BOX(&Loss::template shard_backward<true>));
}

}  // namespace disalign
