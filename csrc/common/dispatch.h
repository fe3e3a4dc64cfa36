// From tensors to typed pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/check.h"
#include "fastkit/element.h"

namespace fastkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body(E{}) with the element type of a float32, float64, bfloat16 or float16 tensor.
template <class Body>
auto dispatch_floating(const char* op, const Tensor& x, Body&& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default:
      FASTKIT_CHECK(x.scalar_type() == ScalarType::Half, op, ": x must be float32, float64, bfloat16 or float16");
      return body(Half{});
  }
}

// The type of arithmetic on x: float32 for half precision.
inline ScalarType arithmetic(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::BFloat16 || type == ScalarType::Half ? ScalarType::Float : type;
}

// A matrix whose columns have stride 1: itself where it is one, else a copy.
inline Tensor readable_rows(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

}  // namespace fastkit
