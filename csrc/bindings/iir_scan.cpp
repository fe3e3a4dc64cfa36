// iir_scan: tensors -> raw pointers and strides, for the CPU and CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/stream.h"
#include "fastkit/iir_scan.h"
#include "fastkit/iir_scan_cuda.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::copy_;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::zero_;

constexpr int64_t kSerialSamples = 32768;           // less work than this is not worth a second thread
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // results of this size or more are written past the caches

constexpr int64_t kOneChunk = int64_t{1} << 62;      // the chunk of one filter for all of a sequence
constexpr int64_t kLongestCuda = (int64_t{1} << 31) - 65536;  // its kernels count samples of a row in 32 bits

constexpr int kChannels = 1, kTime = 2;

bool has_unit_stride(const Tensor& x, int axis) { return x.stride(axis) == 1 || x.size(axis) == 1; }

// How the kernels walk a call: along the axis of stride 1 of results laid out like x, or, where neither time
// nor channels is such an axis, along time in temporary (B, C, T) arrays. Of one sample a row both may be: a GPU would
// have a warp for each sample along time.
struct Layout {
  bool direct;
  int axis;

  explicit Layout(const Tensor& result)
      : direct(has_unit_stride(result, kTime) || has_unit_stride(result, kChannels)),
        axis(prefers_channels(result) ? kChannels : kTime) {}

  static bool prefers_channels(const Tensor& result) {
    if (!has_unit_stride(result, kChannels)) return false;
    return !has_unit_stride(result, kTime) || (result.is_cuda() && result.size(kTime) == 1);
  }
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

// Where packed sequences begin, and their chunks. On the GPU the values are not looked at, but made to fit.
struct Packing {
  std::vector<int64_t> values;
  std::optional<Tensor> device_values;
  int64_t sequences;
  const int64_t *offsets, *first_chunks;

  Packing(const Tensor& cu_seqlens, const Tensor& x, int64_t chunk)
      : sequences(cu_seqlens.dim() == 1 ? cu_seqlens.size(0) - 1 : -1) {
    FASTKIT_CHECK(same_device(x, cu_seqlens) && sequences >= 0,
                  "iir_scan: cu_seqlens must be on the device of x and have shape (S + 1,)");
    const bool narrow = cu_seqlens.scalar_type() == ScalarType::Int;
    FASTKIT_CHECK(narrow || cu_seqlens.scalar_type() == ScalarType::Long,
                  "iir_scan: cu_seqlens must be int32 or int64");
    const Tensor dense = contiguous(cu_seqlens);
    if (x.is_cuda()) {
      device_values = new_empty(dense, {2 * (sequences + 1)}, ScalarType::Long);
      auto* data = static_cast<int64_t*>(device_values->data_ptr());
      offsets = data, first_chunks = data + sequences + 1;
#ifdef FASTKIT_WITH_CUDA
      void* const stream = current_stream(x);
      const bool one = chunk == kOneChunk;
      const auto unpack = [&](const auto* values) {
        check_launch("iir_scan", iir_scan_unpack_cuda(values, sequences, x.size(2), chunk, one, data,
                                                      data + sequences + 1, stream));
      };
      if (narrow) {
        unpack(static_cast<const int32_t*>(dense.data_ptr()));
      } else {
        unpack(static_cast<const int64_t*>(dense.data_ptr()));
      }
#endif
      return;
    }
    if (narrow) {
      const auto* data = static_cast<const int32_t*>(dense.data_ptr());
      values.assign(data, data + sequences + 1);
    } else {
      const auto* data = static_cast<const int64_t*>(dense.data_ptr());
      values.assign(data, data + sequences + 1);
    }
    const int64_t total = x.size(2);
    FASTKIT_CHECK(values[0] == 0, "iir_scan: cu_seqlens must start at 0, got ", values[0],
                  "; it holds S + 1 offsets, the first of them 0");
    values.push_back(0);
    for (int64_t s = 0; s < sequences; ++s) {
      FASTKIT_CHECK(values[s + 1] >= values[s], "iir_scan: cu_seqlens must not decrease, got ", values[s], " before ",
                    values[s + 1], " at index ", s + 1, "; pass cumulative lengths, not lengths");
      values.push_back(values.back() + chunks_of(values[s + 1] - values[s], chunk));
    }
    FASTKIT_CHECK(values[sequences] == total, "iir_scan: cu_seqlens must end at the number of samples, ", total,
                  ", got ", values[sequences], "; x must hold exactly the packed sequences");
    offsets = values.data(), first_chunks = values.data() + sequences + 1;
  }

  // With a gradient of their own.
  int64_t chunks(const Tensor& a, int64_t chunk) const {
    if (device_values) return chunk == kOneChunk ? sequences : a.size(2);
    return first_chunks[sequences];
  }

  static int64_t chunks_of(int64_t length, int64_t chunk) {
    return chunk == kOneChunk ? 1 : length / chunk + (length % chunk != 0);
  }
};

// What every op of this file is given.
struct Arguments {
  const Tensor &x, &a;
  const std::optional<Tensor>& b;
  std::optional<Tensor> state_y, state_x;
  int64_t chunk;
  bool carry;
  std::optional<Packing> packing;
  int64_t filters, batch, chunks;  // batch: of the states; chunks: all that have a gradient of their own
  bool bank;                       // a has an axis of filters

  Arguments(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& state_y,
            const std::optional<Tensor>& state_x, const std::optional<Tensor>& cu_seqlens, int64_t chunk, bool carry)
      : x(x), a(a), b(b), chunk(chunk), carry(carry) {
    FASTKIT_CHECK((x.is_cpu() || x.is_cuda()) && x.dim() == 3,
                  "iir_scan: x must be on the CPU or a GPU and have shape (B, C, T)");
    FASTKIT_CHECK(x.is_cpu() || x.size(2) < kLongestCuda, "iir_scan: on a GPU x must have T < ", kLongestCuda, ", got ",
                  x.size(2), "; filter it in pieces, with iir_scan_with_state");
    FASTKIT_CHECK(chunk >= 1, "iir_scan: chunk must be >= 1, got ", chunk);
    FASTKIT_CHECK(a.dim() == 4 || a.dim() == 5, "iir_scan: a must have 4 or 5 axes");
    bank = a.dim() == 5;
    filters = bank ? a.size(3) : 1;
    FASTKIT_CHECK(filters >= 1, "iir_scan: a must have a filter");
    if (cu_seqlens) {
      FASTKIT_CHECK(x.size(0) == 1, "iir_scan: with cu_seqlens x must have shape (1, C, total)");
      packing.emplace(*cu_seqlens, x, chunk);
      chunks = packing->chunks(a, chunk);
      batch = packing->sequences;
      FASTKIT_CHECK(chunks >= 1 || x.size(2) == 0, "iir_scan: a must have a chunk for the samples of x, got K = 0");
      FASTKIT_CHECK(a.size(2) == chunks || (chunk == kOneChunk && a.size(2) == 1), "iir_scan: a must have K = ",
                    chunks, " chunks for these cu_seqlens", chunk == kOneChunk ? ", one a sequence, or 1" : "",
                    ", got ", a.size(2), "; chunks restart at every sequence: K is the sum of ceil(length / chunk)");
    } else {
      chunks = Packing::chunks_of(x.size(2), chunk);
      batch = x.size(0);
    }
    check_coefficients("a", a, 2);
    if (b) check_coefficients("b", *b, 3);
    this->state_y = state("state_y", state_y, bank);
    this->state_x = state("state_x", state_x, false);
  }

  // Shape of (.., taps) for each filter of each row and chunk; of a state.
  std::vector<int64_t> per_chunk(int64_t taps) const {
    std::vector<int64_t> shape = {x.size(0), x.size(1), chunks};
    if (bank) shape.push_back(filters);
    shape.push_back(taps);
    return shape;
  }
  std::vector<int64_t> of_state(bool each_filter) const {
    std::vector<int64_t> shape = {batch, x.size(1)};
    if (each_filter && bank) shape.push_back(filters);
    shape.push_back(2);
    return shape;
  }
  int64_t borders() const { return x.size(2) / kIirScanTile + chunks + 1; }

  std::optional<Tensor> state(const char* name, const std::optional<Tensor>& t, bool each_filter) const {
    if (!t) return std::nullopt;
    const std::vector<int64_t> shape = of_state(each_filter);
    bool fits = same_device(x, *t) && t->scalar_type() == arithmetic(x) &&
                t->dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = t->size(static_cast<int64_t>(i)) == shape[i];
    FASTKIT_CHECK(fits, "iir_scan: ", name,
                  " must be on the device of x and have the dtype of the coefficients and shape (",
                  packing ? "S" : "B", ", C, ", each_filter && bank ? "F, 2)" : "2)");
    return contiguous(*t);
  }

 private:
  void check_coefficients(const char* name, const Tensor& c, int64_t taps) const {
    FASTKIT_CHECK(same_device(x, c) && c.scalar_type() == arithmetic(x), "iir_scan: ", name,
                  " must be on the device of x and have its dtype, float32 for half precision");
    const int64_t last = bank ? 4 : 3;
    FASTKIT_CHECK(c.dim() == a.dim() && (c.size(0) == 1 || c.size(0) == x.size(0)) &&
                      (c.size(1) == 1 || c.size(1) == x.size(1)) &&
                      (c.size(2) == chunks || (packing && chunk == kOneChunk && c.size(2) == 1)) &&
                      (!bank || c.size(3) == filters) && c.size(last) == taps,
                  "iir_scan: ", name, " must have shape (B|1, C|1, ", chunks, bank ? ", F, " : ", ", taps, ")");
  }
};

template <class U, class E>
Signal<U> signal(E* data, const Tensor& x, bool packed) {
  return {data, packed ? 0 : x.stride(0), x.stride(1), x.stride(2)};
}

template <class E>
Signal<const E> input(const Tensor& x, const Arguments& call) {
  return signal<const E>(static_cast<const E*>(x.data_ptr()), x, call.packing.has_value());
}

template <class E>
Signal<E> output(const Tensor& x, const Arguments& call) {
  return signal<E>(static_cast<E*>(x.data_ptr()), x, call.packing.has_value());
}

template <class T>
Coefficients<T> coefficients(const Tensor& c, bool bank) {
  const auto stride = [&](int64_t axis) { return c.size(axis) == 1 ? 0 : c.stride(axis); };
  return {static_cast<const T*>(c.data_ptr()), stride(0), stride(1), stride(2), bank ? stride(3) : 0,
          c.stride(bank ? 4 : 3)};
}

template <class T>
const T* values(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// The results' memory, or null where it is empty because not wanted.
template <class T>
T* results(const Tensor& t, bool wanted) {
  return wanted ? static_cast<T*>(t.data_ptr()) : nullptr;
}

void check_like(const char* name, const Tensor& g, const Tensor& x, const char* op = "iir_scan") {
  FASTKIT_CHECK(same_device(x, g) && g.scalar_type() == x.scalar_type() && g.dim() == 3 && g.size(0) == x.size(0) &&
                    g.size(1) == x.size(1) && g.size(2) == x.size(2),
                op, ": ", name, " must have x's device, shape and dtype");
}

// The call's shape, coefficients and state.
template <class E>
void describe(IirScan<E>& p, const Arguments& call, const Layout& layout) {
  using T = Arithmetic<E>;
  const Tensor& x = call.x;
  p.batch = call.batch, p.channels = x.size(1), p.time = x.size(2);
  p.chunk = call.chunk, p.chunks = call.chunks;
  p.filters = call.filters;
  p.carry = call.carry;
  p.channels_last = layout.axis == kChannels;
  p.stream = x.numel() * static_cast<int64_t>(sizeof(E)) >= kStreamBytes;
  // Blocks of channels, narrower where there would be fewer than threads, in whole cache lines.
  const int64_t threads = torch::stable::get_num_threads();
  p.threads = std::min(threads, x.numel() / kSerialSamples + 1);
  const int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  const int64_t wanted = p.channels * std::max<int64_t>(p.batch, 1) / std::max<int64_t>(threads, 1);
  p.block = std::clamp<int64_t>((wanted + line - 1) / line * line, line, kIirScanBlock<T>);
  if (call.packing) p.offsets = call.packing->offsets, p.first_chunks = call.packing->first_chunks;
  p.a = coefficients<T>(call.a, call.bank);
  if (call.b) p.b = coefficients<T>(*call.b, call.bank);
  p.state_y = values<T>(call.state_y), p.state_x = values<T>(call.state_x);
}

template <class Problem>
void run_cpu(void (*kernel)(const Problem&, int64_t, int64_t), int64_t units, const Problem& p) {
  const int64_t samples = std::max<int64_t>(p.time * p.channels * (p.offsets == nullptr ? p.batch : 1), 1);
  const int64_t grain = kSerialSamples * units / (samples * p.filters) + 1;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class E>
void run(const IirScanForward<E>& p, const Tensor& x) {
  if (p.batch * p.channels == 0) return;
  if (x.is_cpu()) {
    const auto& kernels = iir_scan_kernels().of<E>();
    return run_cpu(kernels.forward, kernels.units(p), p);
  }
#ifdef FASTKIT_WITH_CUDA
  StreamMemory memory{x};
  check_launch("iir_scan", iir_scan_forward_cuda<E>(p, current_stream(x), std::ref(memory)));
#endif
}

template <class E>
void run(const IirScanBackward<E>& p, const Tensor& x) {
  if (p.batch * p.channels == 0) return;
  if (x.is_cpu()) {
    const auto& kernels = iir_scan_kernels().of<E>();
    return run_cpu(kernels.backward, kernels.units(p), p);
  }
#ifdef FASTKIT_WITH_CUDA
  StreamMemory memory{x};
  check_launch("iir_scan", iir_scan_backward_cuda<E>(p, current_stream(x), std::ref(memory)));
#endif
}

std::tuple<Tensor, Tensor, Tensor, Tensor> iir_scan_fwd(const Tensor& x, const Tensor& a,
                                                        const std::optional<Tensor>& b,
                                                        const std::optional<Tensor>& state_y,
                                                        const std::optional<Tensor>& state_x,
                                                        const std::optional<Tensor>& cu_seqlens, int64_t chunk,
                                                        bool carry, bool needs_end, bool needs_borders) {
  const auto device = device_guard(x);
  const Arguments call(x, a, b, state_y, state_x, cu_seqlens, chunk, carry);
  Tensor y = empty_like(x);
  if (call.packing && x.is_cuda()) zero_(y);  // offsets that do not fit may leave samples out
  const auto when = [&](bool wanted, const std::vector<int64_t>& shape) {
    return wanted ? new_empty(a, shape) : new_empty(a, {0});
  };
  Tensor end_y = when(needs_end, call.of_state(true)), end_x = when(needs_end, call.of_state(false));
  const bool has_borders = needs_borders && x.is_cpu();  // on a GPU, backward walks a bank's filters again
  Tensor borders = when(has_borders, {x.size(0), call.borders(), call.filters, 2, x.size(1)});
  const Layout layout(y);
  const Tensor in = layout.readable(x, y), out = layout.writable(y);
  dispatch_floating("iir_scan", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    IirScanForward<E> p;
    describe(p, call, layout);
    p.x = input<E>(in, call);
    p.y = output<E>(out, call);
    p.end_y = results<T>(end_y, needs_end), p.end_x = results<T>(end_x, needs_end);
    p.borders = results<T>(borders, has_borders);
    run<E>(p, x);
  });
  layout.finish(y, out);
  return {y, end_y, end_x, borders};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> iir_scan_bwd(
    const Tensor& gy, const std::optional<Tensor>& gend_y, const std::optional<Tensor>& gend_x, const Tensor& x,
    const std::optional<Tensor>& y, const std::optional<Tensor>& borders, const Tensor& a,
    const std::optional<Tensor>& b, const std::optional<Tensor>& state_y, const std::optional<Tensor>& state_x,
    const std::optional<Tensor>& cu_seqlens, int64_t chunk, bool carry, bool needs_x, bool needs_coefficients) {
  const auto device = device_guard(x);
  if (x.is_cuda() && a.dim() == 5 && x.scalar_type() != a.scalar_type()) {  // a bank's sums round once
    const auto wide = [&](const Tensor& t) { return torch::stable::to(t, a.scalar_type()); };
    auto [sum, ga, gb, gstate_y, gstate_x] =
        iir_scan_bwd(wide(gy), gend_y, gend_x, wide(x), std::nullopt, borders, a, b, state_y, state_x, cu_seqlens,
                     chunk, carry, needs_x, needs_coefficients);
    Tensor gx = needs_x ? empty_like(x) : new_empty(x, {0});
    if (needs_x) copy_(gx, sum);
    return {gx, ga, gb, gstate_y, gstate_x};
  }
  const Arguments call(x, a, b, state_y, state_x, cu_seqlens, chunk, carry);
  check_like("gy", gy, x);
  if (call.filters == 1) {
    FASTKIT_CHECK(y.has_value(), "iir_scan: the backward of a single filter takes y");
    check_like("y", *y, x);
  } else if (x.is_cpu()) {
    FASTKIT_CHECK(borders && borders->is_cpu() && borders->scalar_type() == a.scalar_type() &&
                      borders->dim() == 5 && borders->size(0) == x.size(0) && borders->size(1) == call.borders() &&
                      borders->size(2) == call.filters && borders->size(3) == 2 && borders->size(4) == x.size(1),
                  "iir_scan: the backward of a bank takes the borders of its forward");
  }
  const std::optional<Tensor> end_y = call.state("gend_y", gend_y, true), end_x = call.state("gend_x", gend_x, false);
  Tensor gx = needs_x ? empty_like(x) : new_empty(x, {0});
  if (needs_x && call.packing && x.is_cuda()) zero_(gx);
  const auto when = [&](bool wanted, const std::vector<int64_t>& shape) {
    return wanted ? new_empty(a, shape) : new_empty(a, {0});
  };
  Tensor ga = when(needs_coefficients, call.per_chunk(2)), gb = when(needs_coefficients && b, call.per_chunk(3));
  if (needs_coefficients && (call.packing || x.size(2) == 0)) zero_(ga), zero_(gb);  // of what has no samples
  Tensor gstate_y = when(state_y.has_value(), call.of_state(true));
  Tensor gstate_x = when(state_x.has_value(), call.of_state(false));

  const Tensor like = needs_x ? gx : empty_like(x);
  const Layout layout(like);
  const Tensor out = needs_x ? layout.writable(gx) : gx;
  const Tensor gy_in = layout.readable(gy, like), x_in = layout.readable(x, like);
  const std::optional<Tensor> borders_in = borders ? std::optional(contiguous(*borders)) : std::nullopt;
  const std::optional<Tensor> y_in = y ? std::optional(layout.readable(*y, like)) : std::nullopt;
  dispatch_floating("iir_scan", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    IirScanBackward<E> p;
    describe(p, call, layout);
    p.gy = input<E>(gy_in, call);
    p.x = input<E>(x_in, call);
    if (y_in) p.y = input<E>(*y_in, call);
    p.borders = values<T>(borders_in);
    p.gend_y = values<T>(end_y), p.gend_x = values<T>(end_x);
    if (needs_x) p.gx = output<E>(out, call);
    p.ga = results<T>(ga, needs_coefficients), p.gb = results<T>(gb, needs_coefficients && b);
    p.gstate_y = results<T>(gstate_y, state_y.has_value());
    p.gstate_x = results<T>(gstate_x, state_x.has_value());
    run<E>(p, x);
  });
  if (needs_x) layout.finish(gx, out);
  return {gx, ga, gb, gstate_y, gstate_x};
}

// The sections of a cascade with a bank's axes: one batch entry, channel and chunk.
struct Sections {
  Tensor a;
  std::optional<Tensor> b;

  Sections(const Tensor& x, const Tensor& a, const Tensor& b) : a(checked(x, "a", a, 2)), b(checked(x, "b", b, 3)) {
    FASTKIT_CHECK(a.size(0) == b.size(0), "sosfilt: b must have as many rows as a, ", a.size(0), ", got ", b.size(0));
  }

  static Tensor checked(const Tensor& x, const char* name, const Tensor& c, int64_t taps) {
    FASTKIT_CHECK(x.is_cpu(), "sosfilt: x must be on the CPU");
    FASTKIT_CHECK(c.is_cpu() && c.scalar_type() == arithmetic(x), "sosfilt: ", name,
                  " must be on the CPU and have the dtype of x, float32 for half precision");
    FASTKIT_CHECK(c.dim() == 2 && c.size(0) >= 1 && c.size(1) == taps, "sosfilt: ", name,
                  " must have shape (S, ", taps, ") with S >= 1");
    return torch::stable::view(contiguous(c), {1, 1, 1, c.size(0), taps});
  }
};

std::tuple<Tensor, Tensor> sosfilt_fwd(const Tensor& x, const Tensor& a, const Tensor& b, bool needs_borders) {
  const Sections sections(x, a, b);
  const Arguments call(x, sections.a, sections.b, {}, {}, {}, kOneChunk, true);
  Tensor y = empty_like(x);
  const bool cascade = call.filters > 1, has_borders = cascade && needs_borders;
  Tensor borders = new_empty(sections.a, {0});
  if (has_borders) borders = new_empty(sections.a, {x.size(0), call.borders(), call.filters, 2, x.size(1)});
  const Layout layout(y);
  const Tensor in = layout.readable(x, y), out = layout.writable(y);
  dispatch_floating("sosfilt", x, [&](auto zero) {
    using E = decltype(zero);
    IirScanForward<E> p;
    describe(p, call, layout);
    p.cascade = cascade;
    p.x = input<E>(in, call);
    p.y = output<E>(out, call);
    p.borders = results<Arithmetic<E>>(borders, has_borders);
    run<E>(p, x);
  });
  layout.finish(y, out);
  return {y, borders};
}

// The sum of the rows of (rows, ..) gradients, in their order, shaped like c.
template <class T>
Tensor sum_of_rows(const Tensor& rows, const Tensor& c) {
  Tensor sums = new_empty(c, {c.size(0), c.size(1)});
  const auto* const from = static_cast<const T*>(rows.data_ptr());
  auto* const to = static_cast<T*>(sums.data_ptr());
  const int64_t n = sums.numel();
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t row = 0; row < rows.size(0); ++row) sum += static_cast<double>(from[row * n + i]);
    to[i] = static_cast<T>(sum);
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> sosfilt_bwd(const Tensor& gy, const Tensor& x, const Tensor& borders,
                                               const Tensor& a, const Tensor& b, bool needs_x,
                                               bool needs_coefficients) {
  const Sections sections(x, a, b);
  const Arguments call(x, sections.a, sections.b, {}, {}, {}, kOneChunk, true);
  check_like("gy", gy, x, "sosfilt");
  const bool cascade = call.filters > 1;
  if (needs_coefficients && !cascade) check_like("borders, of one filter y,", borders, x, "sosfilt");
  FASTKIT_CHECK(!needs_coefficients || !cascade ||
                    (borders.is_cpu() && borders.scalar_type() == a.scalar_type() && borders.dim() == 5 &&
                     borders.size(0) == x.size(0) && borders.size(1) == call.borders() &&
                     borders.size(2) == call.filters && borders.size(3) == 2 && borders.size(4) == x.size(1)),
                "sosfilt: the gradients of coefficients take the borders of the forward");
  Tensor gx = needs_x ? empty_like(x) : new_empty(x, {0});
  Tensor ga = new_empty(a, {0}), gb = new_empty(b, {0});
  const Tensor like = needs_x ? gx : empty_like(x);
  const Layout layout(like);
  const Tensor out = needs_x ? layout.writable(gx) : gx;
  const Tensor gy_in = layout.readable(gy, like), x_in = needs_coefficients ? layout.readable(x, like) : x;
  std::optional<Tensor> borders_in, y_in;
  if (needs_coefficients && cascade) borders_in = contiguous(borders);
  if (needs_coefficients && !cascade) y_in = layout.readable(borders, like);
  const int64_t rows = needs_coefficients ? x.size(0) * x.size(1) : 0;
  Tensor rows_a = new_empty(a, {rows, call.filters, 2}), rows_b = new_empty(b, {rows, call.filters, 3});
  if (x.size(2) == 0) zero_(rows_a), zero_(rows_b);  // of what has no samples
  dispatch_floating("sosfilt", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    IirScanBackward<E> p;
    describe(p, call, layout);
    p.cascade = cascade;
    p.gy = input<E>(gy_in, call);
    p.x = input<E>(x_in, call);
    p.borders = values<T>(borders_in);
    if (y_in) p.y = input<E>(*y_in, call);
    if (needs_x) p.gx = output<E>(out, call);
    p.ga = results<T>(rows_a, needs_coefficients), p.gb = results<T>(rows_b, needs_coefficients);
    run<E>(p, x);
    if (needs_coefficients) ga = sum_of_rows<T>(rows_a, a), gb = sum_of_rows<T>(rows_b, b);
  });
  if (needs_x) layout.finish(gx, out);
  return {gx, ga, gb};
}

std::tuple<Tensor, Tensor, Tensor> iir_step_fwd(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b,
                                                const Tensor& state_y, const Tensor& state_x) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2 && (a.dim() == 3 || a.dim() == 4),
                "iir_step: x must be on the CPU and have shape (B, C), a (B|1, C|1[, F], 2)");
  const bool bank = a.dim() == 4;
  const int64_t filters = bank ? a.size(2) : 1;
  FASTKIT_CHECK(filters >= 1, "iir_step: a must have a filter");
  const auto check = [&](const char* name, const Tensor& t, int64_t last, bool exact, bool each_filter) {
    const auto fits = [&](int64_t axis) { return t.size(axis) == x.size(axis) || (!exact && t.size(axis) == 1); };
    FASTKIT_CHECK(t.is_cpu() && t.scalar_type() == arithmetic(x) && t.dim() == (each_filter && bank ? 4 : 3) &&
                      fits(0) && fits(1) && (!(each_filter && bank) || t.size(2) == filters) &&
                      t.size(t.dim() - 1) == last,
                  "iir_step: ", name, " must be on the CPU and fit the shape and dtype of x");
  };
  check("a", a, 2, false, true);
  if (b) check("b", *b, 3, false, true);
  check("state_y", state_y, 2, true, true);
  check("state_x", state_x, 2, true, false);
  const Tensor in = contiguous(x), before_y = contiguous(state_y), before_x = contiguous(state_x);
  Tensor y = empty_like(in), end_y = empty_like(before_y), end_x = empty_like(before_x);
  dispatch_floating("iir_step", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    const auto taps = [&](const Tensor& c) {
      const auto stride = [&](int64_t axis) { return c.size(axis) == 1 ? 0 : c.stride(axis); };
      return Coefficients<T>{static_cast<const T*>(c.data_ptr()), stride(0), stride(1), 0, bank ? stride(2) : 0,
                             c.stride(bank ? 3 : 2)};
    };
    IirStep<E> p;
    p.batch = x.size(0), p.channels = x.size(1), p.filters = filters;
    p.x = static_cast<const E*>(in.data_ptr());
    p.a = taps(a);
    if (b) p.b = taps(*b);
    p.state_y = static_cast<const T*>(before_y.data_ptr()), p.state_x = static_cast<const T*>(before_x.data_ptr());
    p.y = static_cast<E*>(y.data_ptr());
    p.end_y = static_cast<T*>(end_y.data_ptr()), p.end_x = static_cast<T*>(end_x.data_ptr());
    const int64_t grain = kSerialSamples / (2 * filters) + 1;
    torch::stable::parallel_for(0, p.batch * p.channels, grain, [&](int64_t begin, int64_t end) {
      iir_step_kernels().of<E>()(p, begin, end);
    });
  });
  return {y, end_y, end_x};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("iir_scan_fwd", TORCH_BOX(&fastkit::iir_scan_fwd));
  m.impl("iir_scan_bwd", TORCH_BOX(&fastkit::iir_scan_bwd));
  m.impl("sosfilt_fwd", TORCH_BOX(&fastkit::sosfilt_fwd));
  m.impl("sosfilt_bwd", TORCH_BOX(&fastkit::sosfilt_bwd));
  m.impl("iir_step_fwd", TORCH_BOX(&fastkit::iir_step_fwd));
}

#ifdef FASTKIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkit, CUDA, m) {
  m.impl("iir_scan_fwd", TORCH_BOX(&fastkit::iir_scan_fwd));
  m.impl("iir_scan_bwd", TORCH_BOX(&fastkit::iir_scan_bwd));
}
#endif
