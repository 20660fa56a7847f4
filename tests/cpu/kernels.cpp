// The CPU kernels of one instruction set without torch: rows and class planes in every dtype, with
// class weights, smoothing and a calibration, against the formulas in double. For processors that
// only an emulator has here (test_aarch64.py). Prints what is wrong; the number of it is the result.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels/dense_kernel.h"
#include "cpu/kernels/row_kernel.h"

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

// T: the logits' dtype; A: the arithmetic.
template <class T, class A>
static void run(const char* dtype, const LossKernels& kernels, bool rows, double most) {
  const int64_t outer = rows ? 9 : 2, classes = rows ? 1203 : 37, inner = rows ? 1 : 23;
  const int64_t positions = outer * inner;
  LossArgs args;
  args.outer = outer, args.classes = classes, args.inner = inner;
  args.outer_stride = args.grad_outer_stride = classes * inner;
  args.class_stride = args.grad_class_stride = inner;
  const auto logits = random<T>(positions * classes, 4);
  const auto weight = random<A>(classes, 0.5, 1), scale = random<A>(classes, 0.5);
  const auto bias = random<A>(classes, 0.5), confidence = random<A>(positions, 2);
  std::vector<int64_t> target;
  for (int64_t i = 0; i < positions; ++i) target.push_back(i * 7 % classes);
  target[3] = args.ignore_index;
  args.logits = logits.data(), args.target = target.data();
  args.weight = weight.data(), args.scale = scale.data(), args.bias = bias.data();
  args.confidence = confidence.data();
  args.label_smoothing = 0.1;
  for (const A w : weight) args.weight_sum += w;

  std::vector<A> shift(positions), sum(positions), loss(positions), grad_confidence(positions);
  std::vector<T> grad(positions * classes);
  args.row_shift = shift.data(), args.row_sum = sum.data(), args.loss = loss.data();
  Chunk chunk;
  chunk.end = rows ? outer : outer * dense_tiles(args, sizeof(A));
  const int64_t bytes =
      rows ? row_scratch_bytes(classes, sizeof(A)) : dense_scratch_bytes(args, sizeof(A));
  std::vector<double> scratch(bytes / 8 + 16);
  std::vector<double> grad_scale(padded_classes(classes)), grad_bias(padded_classes(classes));
  chunk.scratch = scratch.data();
  kernels.forward(args, chunk);
  args.grad_logits = grad.data(), args.grad_confidence = grad_confidence.data();
  args.class_gradients = true;
  chunk.grad_scale = grad_scale.data(), chunk.grad_bias = grad_bias.data();
  kernels.backward(args, chunk);

  std::vector<double> expected_scale(classes), u(classes);
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t t = target[i];
    const int64_t first = i / inner * classes * inner + i % inner;
    const double c = 1 / (1 + std::exp(-static_cast<double>(confidence[i])));
    const auto z = [&](int64_t j) { return static_cast<double>(logits[first + j * inner]); };
    double largest = -INFINITY, total = 0, smoothed = 0, grad_c = 0;
    for (int64_t j = 0; j < classes; ++j) {
      u[j] = z(j) + c * (scale[j] * z(j) + bias[j]);
      largest = std::fmax(largest, u[j]);
    }
    for (int64_t j = 0; j < classes; ++j) total += std::exp(u[j] - largest);
    const double norm = largest + std::log(total);
    const bool valid = t != args.ignore_index;
    const double smooth = args.label_smoothing / classes;
    const double on_target = valid ? (1 - args.label_smoothing) * weight[t] : 0;
    for (int64_t j = 0; j < classes; ++j) smoothed += weight[j] * (norm - u[j]);
    check("loss", dtype, loss[i], valid ? on_target * (norm - u[t]) + smooth * smoothed : 0, most);
    for (int64_t j = 0; j < classes; ++j) {
      const double all = on_target + smooth * args.weight_sum;
      const double q =
          valid ? all * std::exp(u[j] - norm) - (j == t) * on_target - smooth * weight[j] : 0;
      check("grad_logits", dtype, static_cast<double>(grad[first + j * inner]),
            q * (1 + c * scale[j]), most);
      grad_c += q * (scale[j] * z(j) + bias[j]);
      expected_scale[j] += q * c * z(j);
    }
    check("grad_confidence", dtype, grad_confidence[i], grad_c * c * (1 - c), 4 * most);
  }
  for (int64_t j = 0; j < classes; ++j)
    check("grad_scale", dtype, grad_scale[j], expected_scale[j], most);
}

int main() {
  for (const bool rows : {true, false}) {
    const LossKernelTable& table = rows ? baseline::row_kernels() : baseline::dense_kernels();
    run<double, double>("float64", table.float64, rows, 1e-12);
    run<float, float>("float32", table.float32, rows, 1e-5);
    run<BFloat16, float>("bfloat16", table.bfloat16, rows, 1e-2);
    run<Float16, float>("float16", table.float16, rows, 1e-3);
  }
  if (wrong == 0) std::puts("all as the formulas have it");
  return wrong != 0;
}
