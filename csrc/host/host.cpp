// fastkit._host, in editable installs only: the torch-free kernels of every ISA on NumPy arrays, for unit tests
// and micro-benchmarks. Never imported by the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "fastkit/iir_scan.h"

namespace py = pybind11;

namespace {

using fastkit::Isa;

Isa isa_of(const std::string& name) {
  for (Isa isa : fastkit::kIsas) {
    if (name == fastkit::isa_name(isa) && fastkit::isa_usable(isa)) return isa;
  }
  throw std::invalid_argument("isa must be one of isas(), got " + name);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : fastkit::kIsas) {
    if (fastkit::isa_usable(isa)) names.push_back(fastkit::isa_name(isa));
  }
  return names;
}

template <class T>
using Array = py::array_t<T>;

constexpr int64_t step(py::ssize_t bytes, std::size_t size) { return bytes / static_cast<int64_t>(size); }

template <class T>
fastkit::Signal<const T> input(const Array<T>& x) {
  return {x.data(), step(x.strides(0), sizeof(T)), step(x.strides(1), sizeof(T)), step(x.strides(2), sizeof(T))};
}

template <class T>
fastkit::Signal<T> output(Array<T>& x) {
  return {x.mutable_data(), step(x.strides(0), sizeof(T)), step(x.strides(1), sizeof(T)),
          step(x.strides(2), sizeof(T))};
}

template <class T>
fastkit::Coefficients<T> coefficients(const Array<T>& c) {
  return {c.data(), c.shape(0) == 1 ? 0 : step(c.strides(0), sizeof(T)),
          c.shape(1) == 1 ? 0 : step(c.strides(1), sizeof(T)), step(c.strides(2), sizeof(T)), 0,
          step(c.strides(3), sizeof(T))};
}

template <class T>
void describe(fastkit::IirScan<T>& p, const Array<T>& x, const Array<T>& a, const Array<T>& b, int64_t chunk,
              bool carry, bool stream) {
  p.batch = x.shape(0), p.channels = x.shape(1), p.time = x.shape(2);
  p.chunk = chunk, p.chunks = (p.time - 1) / chunk + 1;
  p.carry = carry, p.stream = stream;
  p.x = input(x);
  p.channels_last = p.x.time != 1;
  p.block = fastkit::kIirScanBlock<T>;
  if (a.shape(2) != p.chunks || b.shape(2) != p.chunks || (p.channels_last && p.x.channel != 1)) {
    throw std::invalid_argument("iir_scan: a and b must have ceil(T / chunk) chunks, x a unit stride");
  }
  p.a = coefficients(a), p.b = coefficients(b);
}

template <class T>
void forward(const std::string& isa, const Array<T>& x, Array<T>& y, const Array<T>& a, const Array<T>& b,
             int64_t chunk, bool carry, bool stream) {
  const auto& kernels = fastkit::iir_scan_kernels(isa_of(isa)).of<T>();
  fastkit::IirScanForward<T> p;
  describe<T>(p, x, a, b, chunk, carry, stream);
  p.y = output(y);
  kernels.forward(p, 0, kernels.units(p));
}

template <class T>
void backward(const std::string& isa, const Array<T>& gy, const Array<T>& x, const Array<T>& y, Array<T>& gx,
              Array<T>& ga, Array<T>& gb, const Array<T>& a, const Array<T>& b, int64_t chunk, bool carry,
              bool stream) {
  const auto& kernels = fastkit::iir_scan_kernels(isa_of(isa)).of<T>();
  fastkit::IirScanBackward<T> p;
  describe<T>(p, x, a, b, chunk, carry, stream);
  p.gy = input(gy), p.y = input(y), p.gx = output(gx);
  p.ga = ga.mutable_data(), p.gb = gb.mutable_data();
  kernels.backward(p, 0, kernels.units(p));
}

}  // namespace

void bind_icp(py::module_& m);
void bind_iir_scan_warps(py::module_& m);
void bind_lora_linear_prune(py::module_& m);
void bind_mtadam(py::module_& m);

PYBIND11_MODULE(_host, m) {
  bind_icp(m);
  bind_iir_scan_warps(m);
  bind_lora_linear_prune(m);
  bind_mtadam(m);
  m.def("isas", &isas);
  // noconvert: results are written in place, so no argument may be a converted copy.
  const auto exact = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("iir_scan_forward", &forward<float>, py::arg("isa"), exact("x"), exact("y"), exact("a"), exact("b"),
        py::arg("chunk"), py::arg("carry"), py::arg("stream"));
  m.def("iir_scan_forward", &forward<double>, py::arg("isa"), exact("x"), exact("y"), exact("a"), exact("b"),
        py::arg("chunk"), py::arg("carry"), py::arg("stream"));
  m.def("iir_scan_backward", &backward<float>, py::arg("isa"), exact("gy"), exact("x"), exact("y"), exact("gx"),
        exact("ga"), exact("gb"), exact("a"), exact("b"), py::arg("chunk"), py::arg("carry"), py::arg("stream"));
  m.def("iir_scan_backward", &backward<double>, py::arg("isa"), exact("gy"), exact("x"), exact("y"), exact("gx"),
        exact("ga"), exact("gb"), exact("a"), exact("b"), py::arg("chunk"), py::arg("carry"), py::arg("stream"));
}
