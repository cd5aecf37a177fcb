// What every binding needs: torch tensors as the core's views and pointers, and the checks that
// keep a direct call of torch.ops.dijiang.* inside its memory. The Python functions check first and
// in friendlier words; these are the last line.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "dijiang/core/types.h"

namespace dijiang::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// Raises a RuntimeError that holds the message alone: STD_TORCH_CHECK adds the path of the file
// that it was built from.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "dijiang: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ')';
  return text.str();
}

inline DType core_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      check(false, name, " must be float32, float64, bfloat16 or float16");
      return DType::kFloat32;
  }
}

// The type of state, parameters and accumulation.
inline ScalarType acc_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like(const Tensor& t, const char* name, const Tensor& like, ScalarType dtype,
                       const Shape& shape) {
  const auto sizes = t.sizes();
  check(sizes.size() == shape.size() && std::equal(sizes.begin(), sizes.end(), shape.begin()), name,
        " must have shape ", shape_text(shape), ", got ", shape_text(sizes));
  check(t.scalar_type() == dtype, name, " has the wrong dtype");
  check(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
        " must be on the device of the first tensor");
}

// Data of a contiguous tensor of the given type and shape; null when it is absent or empty.
inline const void* contiguous_data(const OptionalTensor& t, const char* name, const Tensor& like,
                                   ScalarType dtype, const Shape& shape) {
  if (!t) return nullptr;
  check_like(*t, name, like, dtype, shape);
  check(t->is_contiguous(), name, " must be contiguous");
  return t->numel() ? t->const_data_ptr() : nullptr;
}

inline void* mutable_contiguous_data(const OptionalTensor& t, const char* name, const Tensor& like,
                                     ScalarType dtype, const Shape& shape) {
  return const_cast<void*>(contiguous_data(t, name, like, dtype, shape));
}

inline ConstView view4(const Tensor& t, const char* name, const Tensor& like, const Shape& shape) {
  check_like(t, name, like, like.scalar_type(), shape);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Tensor new_tensor(const Tensor& like, const Shape& shape, ScalarType dtype,
                         bool zero = false) {
  return zero ? torch::stable::new_zeros(like, shape, dtype)
              : torch::stable::new_empty(like, shape, dtype);
}

inline Tensor no_tensor(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, Shape{0}, dtype);
}

// Null for an empty tensor, so that the core's "null: not wanted" covers it.
inline void* data_of(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

inline Tensor new_workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, Shape{static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace dijiang::binding
