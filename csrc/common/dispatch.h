// From tensors to typed pointers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/check.h"

namespace fastkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body(T{}) with the element type of a float32 or float64 tensor.
template <class Body>
auto dispatch_floating(const char* op, const Tensor& x, Body&& body) {
  FASTKIT_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op,
                ": x must be float32 or float64");
  return x.scalar_type() == ScalarType::Float ? body(float{}) : body(double{});
}

}  // namespace fastkit
