// iir_scan: tensors -> raw pointers and strides, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/iir_scan.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::copy_;
using torch::stable::empty_like;
using torch::stable::new_empty;

constexpr int64_t kSerialSamples = 32768;           // less work than this is not worth a second thread
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // results of this size or more are written past the caches

constexpr int kChannels = 1, kTime = 2;

bool has_unit_stride(const Tensor& x, int axis) { return x.stride(axis) == 1 || x.size(axis) == 1; }

// How the kernels walk a call: along the axis of stride 1 of results laid out like x, or, where neither time
// nor channels is such an axis, along time in temporary (B, C, T) arrays.
struct Layout {
  bool direct;
  int axis;

  explicit Layout(const Tensor& result)
      : direct(has_unit_stride(result, kTime) || has_unit_stride(result, kChannels)),
        axis(direct && !has_unit_stride(result, kTime) ? kChannels : kTime) {}

  Tensor temporary(const Tensor& result) const {
    return direct ? empty_like(result) : new_empty(result, {result.size(0), result.size(1), result.size(2)});
  }
  // x itself where it can be read along the axis, else a copy.
  Tensor readable(const Tensor& x, const Tensor& result) const {
    if (has_unit_stride(x, axis)) return x;
    Tensor copy = temporary(result);
    copy_(copy, x);
    return copy;
  }
  Tensor writable(const Tensor& result) const { return direct ? result : temporary(result); }
  void finish(Tensor& result, const Tensor& written) const {
    if (!direct) copy_(result, written);
  }
};

template <class U, class T>
Signal<U> signal(T* data, const Tensor& x) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
Signal<const T> input(const Tensor& x) {
  return signal<const T>(static_cast<const T*>(x.data_ptr()), x);
}

template <class T>
Signal<T> output(const Tensor& x) {
  return signal<T>(static_cast<T*>(x.data_ptr()), x);
}

template <class T>
Coefficients<T> coefficients(const Tensor& c) {
  return {static_cast<const T*>(c.data_ptr()), c.size(0) == 1 ? 0 : c.stride(0), c.size(1) == 1 ? 0 : c.stride(1),
          c.stride(2), c.stride(3)};
}

void check_coefficients(const char* name, const Tensor& c, const Tensor& x, int64_t chunks, int64_t taps) {
  FASTKIT_CHECK(c.is_cpu() && c.scalar_type() == x.scalar_type(), "iir_scan: ", name,
                " must be on the CPU and have x's dtype");
  FASTKIT_CHECK(c.dim() == 4 && (c.size(0) == 1 || c.size(0) == x.size(0)) &&
                    (c.size(1) == 1 || c.size(1) == x.size(1)) && c.size(2) == chunks && c.size(3) == taps,
                "iir_scan: ", name, " must have shape (B|1, C|1, ", chunks, ", ", taps, ")");
}

void check_like(const char* name, const Tensor& g, const Tensor& x) {
  FASTKIT_CHECK(g.is_cpu() && g.scalar_type() == x.scalar_type() && g.dim() == 3 && g.size(0) == x.size(0) &&
                    g.size(1) == x.size(1) && g.size(2) == x.size(2),
                "iir_scan: ", name, " must be on the CPU and have x's shape and dtype");
}

void check_call(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, int64_t chunk) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 3 && x.size(2) > 0,
                "iir_scan: x must be on the CPU and have shape (B, C, T) with T >= 1");
  FASTKIT_CHECK(chunk >= 1, "iir_scan: chunk must be >= 1, got ", chunk);
  const int64_t chunks = (x.size(2) - 1) / chunk + 1;
  check_coefficients("a", a, x, chunks, 2);
  if (b) check_coefficients("b", *b, x, chunks, 3);
}

// The call's shape and coefficients.
template <class T>
void describe(IirScan<T>& p, const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, int64_t chunk,
              bool carry, const Layout& layout) {
  p.batch = x.size(0), p.channels = x.size(1), p.time = x.size(2);
  p.chunk = chunk, p.chunks = a.size(2);
  p.carry = carry;
  p.channels_last = layout.axis == kChannels;
  p.stream = x.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  // Blocks of channels, narrower where there would be fewer than threads, in whole cache lines.
  const int64_t threads = torch::stable::get_num_threads(), line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t wanted = p.channels * std::max<int64_t>(p.batch, 1) / std::max<int64_t>(threads, 1);
  p.block = std::clamp<int64_t>((wanted + line - 1) / line * line, line, kIirScanBlock<T>);
  p.a = coefficients<T>(a);
  if (b) p.b = coefficients<T>(*b);
}

template <class T>
int64_t count_units(const IirScan<T>& p) {
  return iir_scan_kernels().of<T>().units(p);
}

template <class Problem>
void run(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& p) {
  const int64_t samples = p.batch * p.channels * p.time;
  if (samples == 0) return;
  const int64_t units = count_units(p);
  const int64_t grain = kSerialSamples * units / samples + 1;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor iir_scan_fwd(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, int64_t chunk, bool carry) {
  check_call(x, a, b, chunk);
  Tensor y = empty_like(x);
  const Layout layout(y);
  const Tensor in = layout.readable(x, y), out = layout.writable(y);
  dispatch_floating("iir_scan", x, [&](auto zero) {
    using T = decltype(zero);
    IirScanForward<T> p;
    describe(p, x, a, b, chunk, carry, layout);
    p.x = input<T>(in);
    p.y = output<T>(out);
    run(iir_scan_kernels().of<T>().forward, p);
  });
  layout.finish(y, out);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> iir_scan_bwd(const Tensor& gy, const Tensor& x, const Tensor& y, const Tensor& a,
                                                const std::optional<Tensor>& b, int64_t chunk, bool carry,
                                                bool needs_x, bool needs_coefficients) {
  check_call(x, a, b, chunk);
  check_like("gy", gy, x);
  check_like("y", y, x);
  Tensor gx = needs_x ? empty_like(x) : new_empty(x, {0});
  const auto gradient = [&](bool needed, int64_t taps) {
    return needed ? new_empty(a, {x.size(0), x.size(1), a.size(2), taps}) : new_empty(a, {0});
  };
  Tensor ga = gradient(needs_coefficients, 2), gb = gradient(needs_coefficients && b, 3);

  const Tensor& like = needs_x ? gx : y;
  const Layout layout(like);
  const Tensor out = needs_x ? layout.writable(gx) : gx;
  const Tensor gy_in = layout.readable(gy, like), x_in = layout.readable(x, like), y_in = layout.readable(y, like);
  dispatch_floating("iir_scan", x, [&](auto zero) {
    using T = decltype(zero);
    IirScanBackward<T> p;
    describe(p, x, a, b, chunk, carry, layout);
    p.gy = input<T>(gy_in);
    p.x = input<T>(x_in);
    p.y = input<T>(y_in);
    if (needs_x) p.gx = output<T>(out);
    if (needs_coefficients) {
      p.ga = static_cast<T*>(ga.data_ptr());
      if (b) p.gb = static_cast<T*>(gb.data_ptr());
    }
    if (needs_x || needs_coefficients) run(iir_scan_kernels().of<T>().backward, p);
  });
  if (needs_x) layout.finish(gx, out);
  return {gx, ga, gb};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("iir_scan_fwd", TORCH_BOX(&fastkit::iir_scan_fwd));
  m.impl("iir_scan_bwd", TORCH_BOX(&fastkit::iir_scan_bwd));
}
