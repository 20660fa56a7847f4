// Backstops for the operators' arguments and dtype names. functional.py has validated what a user
// gave; these keep a direct torch.ops call from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name in the headers of torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace disalign {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The message's parts (text and integers) are put together only where the condition does not hold.
template <class... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message.imbue(std::locale::classic());  // no digit groups, whatever the locale of the process
  message << "disalign_ops: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline bool is_logits_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 ||
         t == ScalarType::Half;
}

inline ScalarType accumulate_dtype(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The data of a vector of `count` entries of the accumulation dtype, or null where it is absent.
inline const void* vector_data(const OptionalTensor& vector, const char* name, int64_t count,
                               ScalarType dtype, const Tensor& logits) {
  if (!vector.has_value()) return nullptr;
  require(vector->scalar_type() == dtype, name,
          " has another dtype than the accumulation dtype of the logits");
  require(vector->numel() == count, name, " has ", vector->numel(), " entries, ", count,
          " are needed");
  require(vector->is_contiguous(), name, " is not contiguous");
  require(vector->device() == logits.device(), name, " is on another device");
  return vector->const_data_ptr();
}

inline int64_t size_of(ScalarType accumulate) {
  return accumulate == ScalarType::Double ? sizeof(double) : sizeof(float);
}

// Whether two elements of a tensor may share memory: sorted by stride, every dimension must step over
// all that lies below it.
inline bool overlaps(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride < reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// Where a tensor lies, as the C shim numbers it.
struct Place {
  int32_t type = aoti_torch_device_type_cpu();
  int32_t index = 0;
};

inline Place place_of(const Tensor& tensor) {
  Place place;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
  return place;
}

// DISALIGN_OPS_POISON (set by the tests) fills new memory with NaN, so that an entry never written
// shows.
inline bool poisons() {
  static const bool poison = std::getenv("DISALIGN_OPS_POISON") != nullptr;
  return poison;
}

// A new contiguous tensor, not initialised. Through the C shim: torch::stable::empty looks its
// operator up by name on every call, which costs more than a small batch's arithmetic.
inline Tensor new_tensor(const int64_t* size, int64_t dim, int32_t dtype, Place place = {}) {
  require(dim <= 4, "a tensor of more than 4 dimensions");
  int64_t strides[4];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= size[d];
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, size, strides, dtype, place.type, place.index, &handle));
  Tensor tensor(handle);
  if (poisons() && place.type == aoti_torch_device_type_cpu() && tensor.numel() > 0)
    std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}
inline Tensor new_tensor(std::initializer_list<int64_t> size, ScalarType dtype, Place place = {}) {
  return new_tensor(size.begin(), static_cast<int64_t>(size.size()), shim_dtype(dtype), place);
}

// A new tensor of z's shape, dtype and device, contiguous whatever z's strides are.
inline Tensor new_like(const Tensor& z) {
  int64_t size[4];
  require(z.dim() <= 4, "a tensor of more than 4 dimensions");
  for (int64_t d = 0; d < z.dim(); ++d) size[d] = z.size(d);
  return new_tensor(size, z.dim(), shim_dtype(z.scalar_type()), place_of(z));
}

// A new tensor of rows that are `stride` elements apart, the first of them `offset` elements from
// where its memory begins. Neither the rows nor what lies between them is initialised.
inline Tensor new_rows(int64_t rows, int64_t classes, int64_t stride, int64_t offset,
                       ScalarType dtype, Place place) {
  const Tensor memory = new_tensor({offset + rows * stride}, dtype, place);
  const int64_t size[2] = {rows, classes}, strides[2] = {stride, 1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(memory.get(), 2, size, strides, offset, &handle));
  return Tensor(handle);
}

inline void require_like(const Tensor& gradient, const Tensor& logits) {
  bool alike = gradient.dim() == logits.dim() && gradient.scalar_type() == logits.scalar_type() &&
               gradient.device() == logits.device();
  for (int64_t d = 0; alike && d < logits.dim(); ++d) alike = gradient.size(d) == logits.size(d);
  require(alike, "grad_logits is not a tensor of the logits' shape, dtype and device");
}

}  // namespace disalign
