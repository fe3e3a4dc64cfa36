// NumPy arrays as what kernels take.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/isa.h"
#include "fastkit/element.h"

namespace py = pybind11;

namespace fastkit {

template <class U>
using Array = py::array_t<U>;

// Half precision comes as its bits.
template <class E>
using Stored = std::conditional_t<sizeof(E) == 2, uint16_t, E>;

// In elements.
inline int64_t stride(const py::array& a, int axis) { return static_cast<int64_t>(a.strides(axis) / a.itemsize()); }

inline Isa isa_of(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa) && isa_usable(isa)) return isa;
  }
  throw std::invalid_argument("isa must be one of isas(), got " + name);
}

}  // namespace fastkit
