// fastkit._host, in editable installs only: the torch-free kernels of every ISA on NumPy arrays, for unit tests
// and micro-benchmarks. Never imported by the package.
#include <stdexcept>
#include <string>
#include <vector>

#include "fastkit/iir_scan.h"
#include "host/arrays.h"

namespace {

using namespace fastkit;

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (isa_usable(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

template <class T>
Signal<const T> input(const Array<T>& x) {
  return {x.data(), stride(x, 0), stride(x, 1), stride(x, 2)};
}

template <class T>
Signal<T> output(Array<T>& x) {
  return {x.mutable_data(), stride(x, 0), stride(x, 1), stride(x, 2)};
}

template <class T>
Coefficients<T> coefficients(const Array<T>& c) {
  const auto shared = [&](int axis) { return c.shape(axis) == 1 ? 0 : stride(c, axis); };
  return {c.data(), shared(0), shared(1), stride(c, 2), 0, stride(c, 3)};
}

template <class T>
void describe(IirScan<T>& p, const Array<T>& x, const Array<T>& a, const Array<T>& b, int64_t chunk,
              bool carry, bool stream) {
  p.batch = x.shape(0), p.channels = x.shape(1), p.time = x.shape(2);
  p.chunk = chunk, p.chunks = (p.time - 1) / chunk + 1;
  p.carry = carry, p.stream = stream;
  p.x = input(x);
  p.channels_last = p.x.time != 1;
  p.block = kIirScanBlock<T>;
  if (a.shape(2) != p.chunks || b.shape(2) != p.chunks || (p.channels_last && p.x.channel != 1)) {
    throw std::invalid_argument("iir_scan: a and b must have ceil(T / chunk) chunks, x a unit stride");
  }
  p.a = coefficients(a), p.b = coefficients(b);
}

template <class T>
void forward(const std::string& isa, const Array<T>& x, Array<T>& y, const Array<T>& a, const Array<T>& b,
             int64_t chunk, bool carry, bool stream) {
  const auto& kernels = iir_scan_kernels(isa_of(isa)).of<T>();
  IirScanForward<T> p;
  describe<T>(p, x, a, b, chunk, carry, stream);
  p.y = output(y);
  kernels.forward(p, 0, kernels.units(p));
}

template <class T>
void backward(const std::string& isa, const Array<T>& gy, const Array<T>& x, const Array<T>& y, Array<T>& gx,
              Array<T>& ga, Array<T>& gb, const Array<T>& a, const Array<T>& b, int64_t chunk, bool carry,
              bool stream) {
  const auto& kernels = iir_scan_kernels(isa_of(isa)).of<T>();
  IirScanBackward<T> p;
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
