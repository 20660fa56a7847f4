// Launcher of the row kernels on the CPU: checks, buffers, denominator, threads, registration.
// Schemas: disalign_ops/_ops.py.
#include <algorithm>
#include <tuple>

#include "../common/arguments.h"
#include "capability.h"
#include "gradients.h"
#include "partition.h"
#include "row_kernel.h"

namespace disalign {
namespace {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };
enum Normalizer : int64_t { kWeights = 0, kValid = 1, kCount = 2, kGiven = 3 };

double read(const void* p, ScalarType dtype, int64_t i) {
  return dtype == ScalarType::Double ? static_cast<const double*>(p)[i]
                                     : static_cast<const float*>(p)[i];
}

void write(const Tensor& out, double value) {
  if (out.scalar_type() == ScalarType::Double)
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
}

void fill_ones(const Tensor& out, int64_t count) {
  if (out.scalar_type() == ScalarType::Double)
    std::fill_n(static_cast<double*>(out.mutable_data_ptr()), count, 1.0);
  else
    std::fill_n(static_cast<float*>(out.mutable_data_ptr()), count, 1.0f);
}

IndexType index_type(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Byte:
      return IndexType::kUInt8;
    case ScalarType::Short:
      return IndexType::kInt16;
    case ScalarType::Int:
      return IndexType::kInt32;
    case ScalarType::Long:
      return IndexType::kInt64;
    default:
      throw std::runtime_error("disalign_ops: target is not uint8, int16, int32 or int64");
  }
}

// The arguments that forward and backward share, checked. `ones` stands in for absent
// weights where smoothing sums over them, and must outlive the kernels.
struct Call {
  RowArgs args;
  ScalarType dtype;
  Tensor ones;

  Call(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
       const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& confidence,
       const OptionalTensor& prior, const OptionalTensor& margin,
       const OptionalTensor& sample_weight, int64_t ignore_index, double label_smoothing,
       double focal_gamma)
      : ones(logits) {
    check_rows(logits, "logits");
    dtype = accumulate_dtype(logits.scalar_type());
    const int64_t rows = logits.size(0), classes = logits.size(1);
    require(
        target.dim() == 1 && target.size(0) == rows && target.is_contiguous() && target.is_cpu(),
        "target is not a contiguous vector with an entry a row");
    require(
        scale.has_value() == confidence.has_value() && bias.has_value() == confidence.has_value(),
        "scale, bias and confidence are given together or not at all");
    args.logits = logits.const_data_ptr();
    args.row_stride = logits.stride(0);
    args.rows = rows;
    args.classes = classes;
    args.target = target.const_data_ptr();
    args.target_type = index_type(target);
    args.ignore_index = ignore_index;
    args.weight = vector_data(weight, "weight", classes, dtype, logits);
    args.scale = vector_data(scale, "scale", classes, dtype, logits);
    args.bias = vector_data(bias, "bias", classes, dtype, logits);
    args.prior = vector_data(prior, "prior", classes, dtype, logits);
    args.margin = vector_data(margin, "margin", classes, dtype, logits);
    args.confidence = vector_data(confidence, "confidence", rows, dtype, logits);
    args.sample_weight = vector_data(sample_weight, "sample_weight", rows, dtype, logits);
    args.label_smoothing = label_smoothing;
    args.focal_gamma = focal_gamma;
    args.weight_sum = static_cast<double>(classes);
    if (label_smoothing > 0) {
      if (args.weight == nullptr) {
        ones = new_tensor({classes}, dtype);
        fill_ones(ones, classes);
        args.weight = ones.const_data_ptr();
      } else {
        args.weight_sum = 0;
        for (int64_t j = 0; j < classes; ++j) args.weight_sum += read(args.weight, dtype, j);
      }
    }
    check_target();
  }

  void check_target() const {
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index || (t >= 0 && t < args.classes)) continue;
      // _ops.py turns this prefix into Python's IndexError, which the stable ABI cannot throw.
      throw std::runtime_error("IndexError: Target " + std::to_string(t) +
                               " is out of bounds: target[" + std::to_string(i) +
                               "], the logits have " + std::to_string(args.classes) +
                               " classes and ignore_index is " + std::to_string(args.ignore_index));
    }
  }

  double denominator(int64_t normalizer, const OptionalTensor& given) const {
    if (normalizer == kGiven) {
      require(given.has_value() && given->numel() == 1 && given->is_cpu() &&
                  given->scalar_type() == ScalarType::Double,
              "denominator is not one float64 on the CPU");
      return *static_cast<const double*>(given->const_data_ptr());
    }
    if (normalizer == kCount) return static_cast<double>(args.rows);
    double sum = 0;
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t t = read_index(args.target, args.target_type, i);
      if (t == args.ignore_index) continue;
      if (normalizer == kValid) {
        sum += 1;
        continue;
      }
      const double w = args.weight ? read(args.weight, dtype, t) : 1.0;
      sum += args.sample_weight ? w * read(args.sample_weight, dtype, i) : w;
    }
    return sum;
  }
};

void require_calibration(const RowArgs& args, Wanted wanted) {
  require(args.scale != nullptr || !(wanted.classes() || wanted.confidence),
          "gradients are wanted of a calibration that is not given");
}

Partition partition_of(const Tensor& logits, const RowArgs& args, ScalarType dtype) {
  const int64_t size = dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
  return Partition(logits, scratch_bytes(args.classes, size), args.class_gradients);
}

// Nothing left to divide by: 'weights' is 0 / 0 = NaN as in PyTorch, a count is 0.
double reduce_loss(double sum, int64_t reduction, int64_t normalizer, double denominator) {
  if (reduction == kSum) return sum;
  if (denominator == 0 && normalizer != kWeights) return 0;
  return sum / denominator;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult row_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                          const OptionalTensor& scale, const OptionalTensor& bias,
                          const OptionalTensor& confidence, const OptionalTensor& prior,
                          const OptionalTensor& margin, const OptionalTensor& sample_weight,
                          const OptionalTensor& given_denominator, int64_t ignore_index,
                          double label_smoothing, double focal_gamma, int64_t reduction,
                          int64_t normalizer, bool want_logits, bool want_scale, bool want_bias,
                          bool want_confidence) {
  Call call(logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
            ignore_index, label_smoothing, focal_gamma);
  RowArgs& args = call.args;
  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require(reduction != kNone || !wanted.any(),
          "reduction 'none' has no gradients before its upstream gradient is known");
  const double denominator =
      reduction == kMean ? call.denominator(normalizer, given_denominator) : 1.0;
  args.inverse_denominator = denominator == 0 ? 0.0 : 1.0 / denominator;

  require_calibration(args, wanted);
  const Gradients gradients(logits, wanted, wanted.logits);
  gradients.attach(wanted, args);
  args.grad_row_stride = args.classes;
  const Tensor row_max = new_tensor({args.rows}, call.dtype);
  const Tensor row_sum = new_tensor({args.rows}, call.dtype);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
  const bool each = reduction == kNone;
  const Tensor loss = each ? new_tensor({args.rows}, call.dtype) : new_tensor({}, call.dtype);
  const Tensor divisor = new_tensor({}, ScalarType::Double);
  write(divisor, denominator);
  if (each) args.loss = loss.mutable_data_ptr();
  Partition partition = partition_of(logits, args, call.dtype);
  const RowKernels& kernel = kernels_for(DISALIGN_CHOOSE(row_kernels), logits.scalar_type());
  partition.run([&](Chunk& chunk) { kernel.forward(args, chunk); });
  gradients.reduce_classes(partition);
  if (!each) write(loss, reduce_loss(partition.loss_sum(), reduction, normalizer, denominator));
  return {loss,
          row_max,
          row_sum,
          divisor,
          gradients.logits,
          gradients.scale,
          gradients.bias,
          gradients.confidence};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <bool InPlace>
BackwardResult row_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                            const OptionalTensor& weight, const OptionalTensor& scale,
                            const OptionalTensor& bias, const OptionalTensor& confidence,
                            const OptionalTensor& prior, const OptionalTensor& margin,
                            const OptionalTensor& sample_weight, const Tensor& row_max,
                            const Tensor& row_sum, const Tensor& denominator, int64_t ignore_index,
                            double label_smoothing, double focal_gamma, bool want_logits,
                            bool want_scale, bool want_bias, bool want_confidence) {
  Call call(logits, target, weight, scale, bias, confidence, prior, margin, sample_weight,
            ignore_index, label_smoothing, focal_gamma);
  RowArgs& args = call.args;
  const ScalarType dtype = call.dtype;
  const bool one_upstream = grad_loss.dim() == 0;
  args.upstream = vector_data(grad_loss, "grad_loss", one_upstream ? 1 : args.rows, dtype, logits);
  args.upstream_stride = one_upstream ? 0 : 1;
  vector_data(row_max, "row_max", args.rows, dtype, logits);
  vector_data(row_sum, "row_sum", args.rows, dtype, logits);
  args.row_max = row_max.mutable_data_ptr();
  args.row_sum = row_sum.mutable_data_ptr();
  const double divisor = *static_cast<const double*>(
      vector_data(denominator, "denominator", 1, ScalarType::Double, logits));
  args.inverse_denominator = divisor == 0 ? 0.0 : 1.0 / divisor;

  const Wanted wanted{want_logits, want_scale, want_bias, want_confidence};
  require_calibration(args, wanted);
  const Gradients gradients(logits, wanted, wanted.logits && !InPlace);
  gradients.attach(wanted, args);
  args.grad_row_stride = args.classes;
  if (InPlace && wanted.logits) {
    require(args.rows <= 1 || args.row_stride >= args.classes,
            "the logits' rows overlap: a gradient cannot be written over them");
    args.grad_logits = logits.mutable_data_ptr();
    args.grad_row_stride = args.row_stride;
  }
  Partition partition = partition_of(logits, args, dtype);
  const RowKernels& kernel = kernels_for(DISALIGN_CHOOSE(row_kernels), logits.scalar_type());
  partition.run([&](Chunk& chunk) { kernel.backward(args, chunk); });
  gradients.reduce_classes(partition);
  return {gradients.logits, gradients.scale, gradients.bias, gradients.confidence};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(disalign_ops, CPU, m) {
  m.impl("row_forward", TORCH_BOX(&row_forward));
  m.impl("row_backward", TORCH_BOX(&row_backward<false>));
  m.impl("row_backward_", TORCH_BOX(&row_backward<true>));
}

}  // namespace disalign
