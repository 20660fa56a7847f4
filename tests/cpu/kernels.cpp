// The CPU kernels of one instruction set without torch: rows, class planes and upsampling in every
// dtype, with class weights, smoothing and a calibration, against the formulas in double. For
// processors that only an emulator has here (test_aarch64.py). Prints what is wrong; the result is 1
// if anything is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels/dense_kernel.h"
#include "cpu/kernels/row_kernel.h"
#include "cpu/kernels/upsample_kernel.h"

using namespace disalign;

static int wrong = 0;

static void check(const char* name, const char* dtype, double found, double expected, double most) {
  if (std::fabs(found - expected) <= most * (1 + std::fabs(expected))) return;
  if (wrong++ < 20) std::printf("%s, %s: %.9g, expected %.9g\n", dtype, name, found, expected);
}

struct BFloat16 {
  uint16_t bits = 0;
  BFloat16() = default;
  explicit BFloat16(double x) {
    const float value = static_cast<float>(x);
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  explicit operator double() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

#ifdef __aarch64__
using Float16 = __fp16;  // GCC 12 has _Float16 for C alone there
#else
using Float16 = _Float16;
#endif

static double uniform() {  // the same on every processor
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 40) / (1 << 23) - 1;
}

template <class T>
static std::vector<T> random(int64_t count, double scale, double offset = 0) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(T(scale * uniform() + offset));
  return values;
}

// The loss of one position's u, and in `grad` its gradient.
template <class A>
static double loss_of(const std::vector<double>& u, int64_t target, const LossArgs& args,
                      const std::vector<A>& weight, std::vector<double>& grad) {
  const int64_t classes = args.classes;
  const bool valid = target != args.ignore_index;
  const double largest = *std::max_element(u.begin(), u.end());
  double total = 0, smoothed = 0;
  for (int64_t j = 0; j < classes; ++j) total += std::exp(u[j] - largest);
  const double norm = largest + std::log(total);
  const double smooth = args.label_smoothing / classes;
  const double on_target = valid ? (1 - args.label_smoothing) * weight[target] : 0;
  const double all = on_target + smooth * args.weight_sum;
  for (int64_t j = 0; j < classes; ++j) {
    smoothed += weight[j] * (norm - u[j]);
    const double q = all * std::exp(u[j] - norm) - (j == target) * on_target - smooth * weight[j];
    grad[j] = valid ? q : 0;
  }
  return valid ? on_target * (norm - u[target]) + smooth * smoothed : 0;
}

// Random inputs of a loss with a calibration, class weights and smoothing. T: the logits' dtype; A: the
// arithmetic.
template <class T, class A>
struct Inputs {
  std::vector<T> logits;
  std::vector<A> weight, scale, bias, confidence;
  std::vector<int64_t> target;

  Inputs(int64_t entries, int64_t positions, int64_t confidences, LossArgs& args)
      : logits(random<T>(entries, 4)),
        weight(random<A>(args.classes, 0.5, 1)),
        scale(random<A>(args.classes, 0.5)),
        bias(random<A>(args.classes, 0.5)),
        confidence(random<A>(confidences, 2)) {
    for (int64_t i = 0; i < positions; ++i) target.push_back(i * 7 % args.classes);
    target[3] = args.ignore_index;
    args.logits = logits.data(), args.target = target.data();
    args.weight = weight.data(), args.scale = scale.data(), args.bias = bias.data();
    args.confidence = confidence.data();
    args.label_smoothing = 0.1;
    for (const A w : weight) args.weight_sum += w;
  }
};

template <class T, class A>
static void run(const char* dtype, const LossKernels& kernels, bool rows, double most) {
  const int64_t outer = rows ? 9 : 2, classes = rows ? 1203 : 37, inner = rows ? 1 : 23;
  const int64_t positions = outer * inner;
  LossArgs args;
  args.outer = outer, args.classes = classes, args.inner = inner;
  args.outer_stride = args.grad_outer_stride = classes * inner;
  args.class_stride = args.grad_class_stride = inner;
  const Inputs<T, A> inputs(positions * classes, positions, positions, args);
  const auto& [logits, weight, scale, bias, confidence, target] = inputs;

  std::vector<A> shift(positions), sum(positions), loss(positions), grad_confidence(positions);
  std::vector<T> grad(positions * classes);
  args.row_shift = shift.data(), args.row_sum = sum.data(), args.loss = loss.data();
  Chunk chunk;
  chunk.end = rows ? outer : outer * dense_tiles(args, sizeof(A));
  const int64_t bytes =
      rows ? row_scratch_bytes(args, sizeof(A)) : dense_scratch_bytes(args, sizeof(A));
  std::vector<double> scratch(bytes / 8 + 16);
  std::vector<double> grad_scale(padded_classes(classes)), grad_bias(padded_classes(classes));
  chunk.scratch = scratch.data();
  kernels.forward(args, chunk);
  args.grad_logits = grad.data(), args.grad_confidence = grad_confidence.data();
  args.class_gradients = true;
  chunk.grad_scale = grad_scale.data(), chunk.grad_bias = grad_bias.data();
  kernels.backward(args, chunk);

  std::vector<double> expected_scale(classes), u(classes), q(classes);
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t t = target[i];
    const int64_t first = i / inner * classes * inner + i % inner;
    const double c = 1 / (1 + std::exp(-static_cast<double>(confidence[i])));
    const auto z = [&](int64_t j) { return static_cast<double>(logits[first + j * inner]); };
    for (int64_t j = 0; j < classes; ++j) u[j] = z(j) + c * (scale[j] * z(j) + bias[j]);
    check("loss", dtype, loss[i], loss_of(u, t, args, weight, q), most);
    double grad_c = 0;
    for (int64_t j = 0; j < classes; ++j) {
      check("grad_logits", dtype, static_cast<double>(grad[first + j * inner]),
            q[j] * (1 + c * scale[j]), most);
      grad_c += q[j] * (scale[j] * z(j) + bias[j]);
      expected_scale[j] += q[j] * c * z(j);
    }
    check("grad_confidence", dtype, grad_confidence[i], grad_c * c * (1 - c), 4 * most);
  }
  for (int64_t j = 0; j < classes; ++j)
    check("grad_scale", dtype, grad_scale[j], expected_scale[j], most);
}

// Positions of F.interpolate(mode="bilinear") along an axis.
struct Positions {
  std::vector<int64_t> source;
  std::vector<double> weight;
  Axis axis;

  Positions(int64_t in, int64_t out) {
    for (int64_t i = 0; i < out; ++i) {
      const double at = std::max(0.0, (i + 0.5) * in / out - 0.5);
      source.push_back(static_cast<int64_t>(at));
      weight.push_back(source[i] == in - 1 ? 0 : at - source[i]);
    }
    axis.in = in, axis.out = out;
    axis.source = source.data(), axis.weight = weight.data();
  }
};

template <class T, class A>
static void run_upsampled(const char* dtype, const UpsampleKernels& kernels, double most) {
  const int64_t images = 2, classes = 37, height = 3, width = 4;
  const Positions y(height, 8), x(width, 19);
  const int64_t low = height * width, outputs = y.axis.out * x.axis.out;
  UpsampleArgs args;
  args.outer = images, args.classes = classes, args.inner = outputs;
  args.y = y.axis, args.x = x.axis;
  args.outer_stride = args.grad_outer_stride = classes * low;
  args.class_stride = args.grad_class_stride = low;
  args.y_stride = args.grad_y_stride = width;
  args.x_stride = args.grad_x_stride = 1;
  std::vector<int64_t> first_row;
  for (int64_t row = 0; row <= height; ++row)
    first_row.push_back(std::lower_bound(y.source.begin(), y.source.end(), row) - y.source.begin());
  args.first_row = first_row.data();
  const Inputs<T, A> inputs(images * classes * low, images * outputs, images * low, args);
  const auto& [logits, weight, scale, bias, confidence, target] = inputs;

  std::vector<A> shift(images * outputs), sum(images * outputs), loss(images * outputs);
  std::vector<A> grad_confidence(images * low);
  std::vector<T> grad(logits.size());
  args.row_shift = shift.data(), args.row_sum = sum.data(), args.loss = loss.data();
  const int64_t scratch_size = upsample_scratch_bytes(args, sizeof(A)) / 8 + 16;
  const int64_t padded = padded_classes(classes);
  std::vector<double> scratch(2 * scratch_size), grad_scale(2 * padded), grad_bias(2 * padded);
  Chunk chunks[2];  // that share a low-resolution row of the first image
  chunks[0].end = chunks[1].begin = height - 1;
  chunks[1].end = images * height;
  for (int i = 0; i < 2; ++i) {
    chunks[i].scratch = scratch.data() + i * scratch_size;
    chunks[i].grad_scale = grad_scale.data() + i * padded;
    chunks[i].grad_bias = grad_bias.data() + i * padded;
  }
  for (Chunk& chunk : chunks) kernels.forward(args, chunk);
  args.grad_logits = grad.data(), args.grad_confidence = grad_confidence.data();
  args.class_gradients = args.gradients = true;
  for (Chunk& chunk : chunks) kernels.backward(args, chunk);
  kernels.join(args, chunks[0], chunks[1]);

  std::vector<double> expected_scale(classes), u(classes), q(classes);
  for (int64_t image = 0; image < images; ++image) {
    const auto z = [&](int64_t j, int64_t at) {
      return static_cast<double>(logits[(image * classes + j) * low + at]);
    };
    const auto c = [&](int64_t at) {
      return 1 / (1 + std::exp(-static_cast<double>(confidence[image * low + at])));
    };
    std::vector<double> grad_u(classes * low);  // of the calibrated logits at low resolution
    for (int64_t i = 0; i < outputs; ++i) {
      // The four neighbours and their weights. One beyond the edge has the weight 0.
      int64_t at[4];
      double share[4];
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t row = i / x.axis.out, column = i % x.axis.out;
        const bool lower = corner / 2, right = corner % 2;
        at[corner] = std::min(y.source[row] + lower, height - 1) * width +
                     std::min(x.source[column] + right, width - 1);
        share[corner] = (lower ? y.weight[row] : 1 - y.weight[row]) *
                        (right ? x.weight[column] : 1 - x.weight[column]);
      }
      for (int64_t j = 0; j < classes; ++j) {
        u[j] = 0;
        for (int k = 0; k < 4; ++k)
          u[j] += share[k] * (z(j, at[k]) + c(at[k]) * (scale[j] * z(j, at[k]) + bias[j]));
      }
      const int64_t position = image * outputs + i;
      check("upsampled loss", dtype, loss[position], loss_of(u, target[position], args, weight, q),
            most);
      for (int64_t j = 0; j < classes; ++j)
        for (int k = 0; k < 4; ++k) grad_u[j * low + at[k]] += share[k] * q[j];
    }
    for (int64_t at = 0; at < low; ++at) {
      double grad_c = 0;
      for (int64_t j = 0; j < classes; ++j) {
        const double g = grad_u[j * low + at];
        check("upsampled grad_logits", dtype,
              static_cast<double>(grad[(image * classes + j) * low + at]),
              g * (1 + c(at) * scale[j]), most);
        grad_c += g * (scale[j] * z(j, at) + bias[j]);
        expected_scale[j] += g * c(at) * z(j, at);
      }
      check("upsampled grad_confidence", dtype, grad_confidence[image * low + at],
            grad_c * c(at) * (1 - c(at)), 4 * most);
    }
  }
  for (int64_t j = 0; j < classes; ++j)
    check("upsampled grad_scale", dtype, grad_scale[j] + grad_scale[padded + j], expected_scale[j],
          4 * most);
}

int main() {
  for (const bool rows : {true, false}) {
    const LossKernelTable& table = rows ? baseline::row_kernels() : baseline::dense_kernels();
    run<double, double>("float64", table.float64, rows, 1e-12);
    run<float, float>("float32", table.float32, rows, 1e-5);
    run<BFloat16, float>("bfloat16", table.bfloat16, rows, 1e-2);
    run<Float16, float>("float16", table.float16, rows, 1e-3);
  }
  const UpsampleKernelTable& table = baseline::upsample_kernels();
  run_upsampled<double, double>("float64", table.float64, 1e-12);
  run_upsampled<float, float>("float32", table.float32, 1e-5);
  run_upsampled<BFloat16, float>("bfloat16", table.bfloat16, 1e-2);
  run_upsampled<Float16, float>("float16", table.float16, 1e-3);
  if (wrong == 0) std::puts("all as the formulas have it");
  return wrong != 0;
}
