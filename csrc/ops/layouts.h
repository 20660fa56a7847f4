// How logits lie in memory: a check, and what the kernels' arguments say of it. For every device.
#pragma once

#include "ops/arguments.h"

namespace disalign {

// Rows (N, C), classes next to each other, or class planes (N, C, S), positions next to each other.
template <bool Planes>
struct FlatLayout {
  static constexpr bool kPredicts = false;  // whether its details are more than the losses

  template <class Args>
  static void set(const Tensor& logits, const Tensor&, Args& args) {
    set(logits, args);
  }

  template <class Args>
  static void set(const Tensor& logits, Args& args) {
    check(logits);
    args.logits = logits.const_data_ptr();
    args.outer = logits.size(0);
    args.classes = logits.size(1);
    args.outer_stride = logits.stride(0);
    args.grad_outer_stride = args.classes;
    if constexpr (Planes) {
      args.inner = logits.size(2);
      args.class_stride = logits.stride(1);
      args.grad_class_stride = args.inner;
      args.grad_outer_stride = args.classes * args.inner;
    }
  }

  // Memory for a gradient of the logits, and where it lies. That of rows begins at the logits'
  // addresses modulo 16 bytes, so that a kernel stores the vectors that it loads: a slice of a padded
  // head, `padded[:, :1203]`, has a gradient of the padded rows' stride. Such a stride costs at most
  // an eighth more memory, or of few classes that of 8. _ops/new_gradient.py has the same rule.
  template <class Args>
  static Tensor new_gradient(const Tensor& logits, Args& args) {
    if constexpr (Planes) {
      return new_like(logits);
    } else {
      const int64_t in_vector = 16 / logits.element_size();
      const int64_t padding = args.outer_stride - args.classes;
      const bool alike = padding % in_vector == 0;  // without the padding, too
      const bool little = padding > 0 && 8 * padding <= std::max<int64_t>(args.classes, 64);
      const int64_t offset = alike || little ? logits.storage_offset() % in_vector : 0;
      if (!alike && little) args.grad_outer_stride = args.outer_stride;
      if (args.grad_outer_stride == args.classes && offset == 0) return new_like(logits);
      return new_rows(args.outer, args.classes, args.grad_outer_stride, offset,
                      logits.scalar_type(), place_of(logits));
    }
  }

  // Where a gradient lies that is there.
  template <class Args>
  static void set_gradient(const Tensor& gradient, Args& args) {
    if constexpr (Planes) {
      require(gradient.is_contiguous(), "grad_logits is not contiguous");
    } else if (args.outer > 1 && args.classes > 0) {
      args.grad_outer_stride = gradient.stride(0);
      require(args.classes == 1 || gradient.stride(1) == 1,
              "grad_logits's classes are not next to each other");
      require(gradient.stride(0) >= args.classes, "grad_logits's rows overlap in memory");
    }
  }

  template <class Args>
  static void set_over_logits(Args& args) {
    args.grad_outer_stride = args.outer_stride;
    if constexpr (Planes) args.grad_class_stride = args.class_stride;
  }

  template <class Args>
  static int64_t confidences(const Args& args) {
    return args.positions();
  }

 private:
  static void check(const Tensor& logits) {
    constexpr int kDims = Planes ? 3 : 2, kLast = kDims - 1;
    require(logits.dim() == kDims, "logits has ", logits.dim(), " dimensions, ", kDims,
            Planes ? " (images, classes, positions)" : " (rows, classes)", " are needed");
    require(is_logits_dtype(logits.scalar_type()),
            "logits is not float64, float32, bfloat16 or float16");
    // PyTorch calls a tensor without elements contiguous, whatever its strides.
    require(logits.size(kLast) <= 1 || logits.stride(kLast) == 1 || logits.numel() == 0,
            "logits's ", Planes ? "positions" : "classes", " are not next to each other");
  }
};
using RowLayout = FlatLayout<false>;
using DenseLayout = FlatLayout<true>;

// (N, C, h, w) of any strides, under a target (N, H, W).
struct UpsampleLayout {
  static constexpr bool kPredicts = true;

  template <class Args>
  static void set(const Tensor& logits, const Tensor& target, Args& args, bool align_corners) {
    // With class probabilities (images, classes, height, width).
    const int64_t rows = is_logits_dtype(target.scalar_type()) ? 2 : 1;
    require(target.dim() == rows + 2, "target is not (images, height, width)");
    set_size(logits, target.size(rows), target.size(rows + 1), args, align_corners);
    require(target.size(0) == args.outer, "target is not (images, height, width)");
  }

  template <class Args>
  static void set_size(const Tensor& logits, int64_t height, int64_t width, Args& args,
                       bool align_corners) {
    require(logits.dim() == 4, "logits have ", logits.dim(),
            " dimensions, 4 (images, classes, height, width) are needed");
    require(is_logits_dtype(logits.scalar_type()),
            "logits are not float64, float32, bfloat16 or float16");
    const int64_t most = std::max({height, width, logits.size(2), logits.size(3)});
    require(height >= 0 && width >= 0 && most < int64_t{1} << 31, "a size that is no image's");
    args.logits = logits.const_data_ptr();
    args.outer = logits.size(0);
    args.classes = logits.size(1);
    args.inner = height * width;
    args.y.in = logits.size(2);
    args.x.in = logits.size(3);
    args.y.out = height;
    args.x.out = width;
    require((args.y.in > 0 && args.x.in > 0) || args.positions() == 0,
            "logits have no positions to interpolate between");
    args.outer_stride = logits.stride(0);
    args.class_stride = logits.stride(1);
    args.y_stride = logits.stride(2);
    args.x_stride = logits.stride(3);
    args.grad_x_stride = 1;
    args.grad_y_stride = args.x.in;
    args.grad_class_stride = int64_t{args.y.in} * args.x.in;
    args.grad_outer_stride = args.classes * args.grad_class_stride;
    args.align_corners = align_corners;
  }

  template <class Args>
  static Tensor new_gradient(const Tensor& logits, Args&) {
    return new_like(logits);
  }

  template <class Args>
  static void set_over_logits(Args& args) {
    args.grad_outer_stride = args.outer_stride;
    args.grad_class_stride = args.class_stride;
    args.grad_y_stride = args.y_stride;
    args.grad_x_stride = args.x_stride;
  }

  template <class Args>
  static int64_t confidences(const Args& args) {
    return args.outer * args.y.in * args.x.in;
  }
};

}  // namespace disalign
