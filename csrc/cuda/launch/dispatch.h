// From what is known when an operator is called to the kernels' template arguments.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/launch.h"

namespace disalign::cuda {

template <class T>
struct Type {
  using type = T;
};

template <Dtype dtype>
struct StorageOf;
template <>
struct StorageOf<Dtype::kFloat64> : Type<double> {};
template <>
struct StorageOf<Dtype::kFloat32> : Type<float> {};
template <>
struct StorageOf<Dtype::kBFloat16> : Type<__nv_bfloat16> {};
template <>
struct StorageOf<Dtype::kFloat16> : Type<__half> {};

// Calls body with a Type of the storage type of `dtype`.
template <class Body>
void for_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(StorageOf<Dtype::kFloat64>{});
    case Dtype::kFloat32:
      return body(StorageOf<Dtype::kFloat32>{});
    case Dtype::kBFloat16:
      return body(StorageOf<Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return body(StorageOf<Dtype::kFloat16>{});
  }
}

template <bool Value>
struct Constant {
  static constexpr bool value = Value;
};

template <class Body>
void for_bool(bool value, Body body) {
  if (value)
    body(Constant<true>{});
  else
    body(Constant<false>{});
}

// Calls body(Type<T>{}, Constant<Calibrated>{}).
template <class Body>
void for_kernel(Dtype dtype, const LossArgs& args, Body body) {
  for_dtype(dtype, [&](auto type) {
    for_bool(args.scale != nullptr, [&](auto calibrated) { body(type, calibrated); });
  });
}

}  // namespace disalign::cuda
