// The GPU's iir_scan on the host, for tests: the same functors, a warp that is a loop (host/warp.h).
#include "fastkit/iir_scan_warps_calls.h"
#include "fastkit/iir_scan_warps_packed.h"

#include <optional>
#include <stdexcept>
#include <string>

#include "host/arrays.h"
#include "host/warp.h"

namespace {

using namespace fastkit;

template <class U>
using Maybe = std::optional<Array<U>>;

// A (B, C, T) array, of which packed sequences are the parts of one batch entry.
template <class To, class U>
Signal<To> signal(U* data, const py::array& a, bool packed) {
  return {reinterpret_cast<To*>(data), packed ? 0 : stride(a, 0), stride(a, 1), stride(a, 2)};
}

template <class T>
Coefficients<T> coefficients(const Array<T>& c) {
  const auto shared = [&](int axis) { return c.shape(axis) == 1 ? 0 : stride(c, axis); };
  return {c.data(), shared(0), shared(1), shared(2), shared(3), stride(c, 4)};
}

template <class T>
const T* values(const Maybe<T>& a) {
  return a ? a->data() : nullptr;
}
template <class T>
T* results(Maybe<T>& a) {
  return a ? a->mutable_data() : nullptr;
}

// What both directions are given; where sequences are packed, their offsets are unpacked as on the GPU.
template <class E>
struct Call {
  using T = Arithmetic<E>;
  HostStream stream;

  explicit Call(int64_t warps) : stream(warps) {}

  void describe(IirScan<E>& p, const Array<Stored<E>>& x, const Array<T>& a, const Maybe<T>& b, const Maybe<T>& state_y,
                const Maybe<T>& state_x, const Maybe<int64_t>& cu_seqlens, int64_t chunk, bool carry) {
    p.channels = x.shape(1), p.time = x.shape(2), p.filters = a.shape(3);
    p.batch = cu_seqlens ? cu_seqlens->size() - 1 : x.shape(0);
    p.chunk = chunk, p.carry = carry;
    const bool one_chunk = chunk == int64_t{1} << 62;
    p.chunks = cu_seqlens && one_chunk ? p.batch : a.shape(2);
    p.channels_last = stride(x, 1) == 1 && (stride(x, 2) != 1 || x.shape(2) == 1);
    p.x = signal<const E>(x.data(), x, cu_seqlens.has_value());
    p.a = coefficients(a);
    if (b) p.b = coefficients(*b);
    p.state_y = values(state_y), p.state_x = values(state_x);
    if (!cu_seqlens) return;
    auto* offsets = stream.allocate<int64_t>(p.batch + 1);
    auto* first_chunks = stream.allocate<int64_t>(p.batch + 1);
    using Unpack = iir_scan_warps::Unpack<int64_t>;
    stream.run(Unpack{cu_seqlens->data(), p.batch, p.time, chunk, one_chunk, offsets, first_chunks}, 1);
    p.offsets = offsets, p.first_chunks = first_chunks;
  }
};

template <class E>
void forward(int64_t warps, const Array<Stored<E>>& x, const Array<Arithmetic<E>>& a, const Maybe<Arithmetic<E>>& b,
             const Maybe<Arithmetic<E>>& state_y, const Maybe<Arithmetic<E>>& state_x, const Maybe<int64_t>& cu_seqlens,
             int64_t chunk, bool carry, Array<Stored<E>>& y, Maybe<Arithmetic<E>> end_y, Maybe<Arithmetic<E>> end_x) {
  Call<E> call(warps);
  IirScanForward<E> p;
  call.describe(p, x, a, b, state_y, state_x, cu_seqlens, chunk, carry);
  p.y = signal<E>(y.mutable_data(), y, cu_seqlens.has_value());
  p.end_y = results(end_y), p.end_x = results(end_x);
  iir_scan_warps::forward<E>(p, call.stream);
}

template <class E>
void backward(int64_t warps, const Array<Stored<E>>& gy, const Maybe<Arithmetic<E>>& gend_y,
              const Maybe<Arithmetic<E>>& gend_x, const Array<Stored<E>>& x, const Maybe<Stored<E>>& y,
              const Array<Arithmetic<E>>& a, const Maybe<Arithmetic<E>>& b, const Maybe<Arithmetic<E>>& state_y,
              const Maybe<Arithmetic<E>>& state_x, const Maybe<int64_t>& cu_seqlens, int64_t chunk, bool carry,
              Maybe<Stored<E>> gx, Maybe<Arithmetic<E>> ga, Maybe<Arithmetic<E>> gb, Maybe<Arithmetic<E>> gstate_y,
              Maybe<Arithmetic<E>> gstate_x) {
  Call<E> call(warps);
  IirScanBackward<E> p;
  const bool packed = cu_seqlens.has_value();
  call.describe(p, x, a, b, state_y, state_x, cu_seqlens, chunk, carry);
  p.gy = signal<const E>(gy.data(), gy, packed);
  if (y) p.y = signal<const E>(y->data(), *y, packed);
  if (gx) p.gx = signal<E>(gx->mutable_data(), *gx, packed);
  p.gend_y = values(gend_y), p.gend_x = values(gend_x);
  p.ga = results(ga), p.gb = results(gb), p.gstate_y = results(gstate_y), p.gstate_x = results(gstate_x);
  iir_scan_warps::backward<E>(p, call.stream);
}

template <class E>
void bind(py::module_& m, const char* suffix) {
  const auto name = [&](const char* direction) { return std::string("iir_scan_warps_") + direction + suffix; };
  m.def(name("forward_").c_str(), &forward<E>);
  m.def(name("backward_").c_str(), &backward<E>);
}

}  // namespace

void bind_iir_scan_warps(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<Half>(m, "float16");
  bind<BFloat16>(m, "bfloat16");
}
