// lora_linear: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/lora_linear.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::zero_;

constexpr int64_t kSerialProducts = int64_t{1} << 20;  // fewer multiply-adds are not worth a second thread
constexpr int64_t kLeastTokens = 24;                   // of a segment

void check_rows(const char* name, const Tensor& t, int64_t columns, const Tensor& like) {
  FASTKIT_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == columns &&
                    t.scalar_type() == like.scalar_type(),
                "lora_linear: ", name, " must be on the CPU and have shape (", like.size(0), ", ", columns,
                ") and the dtype of x");
}

template <class U, class E>
Rows<U> rows(E* data, const Tensor& t) {
  return {data, t.stride(0)};
}
template <class E>
Rows<const E> input(const Tensor& t) {
  return rows<const E>(static_cast<const E*>(t.data_ptr()), t);
}
template <class E>
Rows<E> output(const Tensor& t) {
  return rows<E>(static_cast<E*>(t.data_ptr()), t);
}

// The low-rank matrices in the type of arithmetic, dense.
struct Adapter {
  Tensor a, b;
  std::optional<Tensor> mask;

  Adapter(const Tensor& x, const Tensor& a, const std::optional<Tensor>& mask, const Tensor& b)
      : a(dense("lora_a", a, x)), b(dense("lora_b", b, x)) {
    FASTKIT_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1) && a.size(0) >= 1 && a.size(1) >= 1,
                  "lora_linear: lora_a must have shape (R, D) and lora_b (O, R) with R >= 1 and D >= 1");
    if (!mask) return;
    FASTKIT_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                      mask->size(0) == a.size(0) && mask->size(1) == a.size(1),
                  "lora_linear: mask must be on the CPU, bool and have the shape of lora_a");
    this->mask = contiguous(*mask);
  }

  template <class E>
  void describe(LoraLinear<E>& p, const Tensor& x, double scale) const {
    using T = Arithmetic<E>;
    p.tokens = x.size(0), p.columns = a.size(1), p.outputs = b.size(0), p.rank = a.size(0);
    p.scale = static_cast<T>(scale);
    p.a = static_cast<const T*>(a.data_ptr()), p.b = static_cast<const T*>(b.data_ptr());
    if (mask) p.mask = static_cast<const bool*>(mask->data_ptr());
    const int64_t products = p.tokens * p.rank * (p.columns + p.outputs);
    const int64_t worth = std::min(products / kSerialProducts, p.tokens / kLeastTokens) + 1;
    p.segments = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, worth);
  }

 private:
  static Tensor dense(const char* name, const Tensor& t, const Tensor& x) {
    FASTKIT_CHECK(t.is_cpu() && (t.scalar_type() == x.scalar_type() || t.scalar_type() == arithmetic(x)),
                  "lora_linear: ", name, " must be on the CPU and have the dtype of x, or float32 for half precision");
    return contiguous(torch::stable::to(t, arithmetic(x)));
  }
};

template <class Problem>
void run(const LoraLinearPass<Problem>& pass, Problem& p, const Tensor& like) {
  const Tensor room = new_empty(like, {pass.room(p)});
  p.room = static_cast<decltype(p.room)>(room.data_ptr());
  pass.begin(p);
  torch::stable::parallel_for(0, p.segments, 1, [&](int64_t begin, int64_t end) { pass.run(p, begin, end); });
  const int64_t tiles = pass.tiles(p);
  if (tiles == 0) return;
  const int64_t grain = kSerialProducts / (24 * p.rank * p.segments) + 1;
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { pass.finish(p, begin, end); });
}

std::tuple<Tensor, Tensor> lora_linear_fwd_(const Tensor& y, const Tensor& x, const std::optional<Tensor>& lora_x,
                                            const Tensor& a, const std::optional<Tensor>& mask, const Tensor& b,
                                            double scale, bool needs_square_sum) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2, "lora_linear: x must be on the CPU and have shape (N, D)");
  const Adapter adapter(x, a, mask, b);
  check_rows("x", x, a.size(1), x);
  check_rows("y", y, b.size(0), x);
  FASTKIT_CHECK(y.stride(1) == 1 || y.size(1) <= 1, "lora_linear: the columns of y must have stride 1");
  if (lora_x) check_rows("lora_x", *lora_x, a.size(1), x);
  const Tensor in = readable_rows(lora_x ? *lora_x : x);
  const Tensor observed = lora_x && needs_square_sum ? readable_rows(x) : in;
  Tensor h = new_empty(adapter.a, {x.size(0), a.size(0)});
  Tensor square_sum = new_empty(x, {needs_square_sum ? a.size(1) : 0}, ScalarType::Float);
  dispatch_floating("lora_linear", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    LoraLinearForward<E> p;
    adapter.describe(p, x, scale);
    p.x = input<E>(in), p.observed = input<E>(observed), p.y = output<E>(y);
    p.h = static_cast<T*>(h.data_ptr());
    if (needs_square_sum) p.square_sum = static_cast<float*>(square_sum.data_ptr());
    run(lora_linear_kernels().of<E>().forward, p, h);
  });
  return {h, square_sum};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd_(const std::optional<Tensor>& gx, const Tensor& gy, const Tensor& x,
                                                    const Tensor& h, const Tensor& a,
                                                    const std::optional<Tensor>& mask, const Tensor& b, double scale,
                                                    bool adds, bool needs_adapter, bool needs_bias) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2, "lora_linear: x must be on the CPU and have shape (N, D)");
  const Adapter adapter(x, a, mask, b);
  check_rows("x", x, a.size(1), x);
  check_rows("gy", gy, b.size(0), x);
  if (gx) {
    check_rows("gx", *gx, a.size(1), x);
    FASTKIT_CHECK(gx->stride(1) == 1 || gx->size(1) <= 1, "lora_linear: the columns of gx must have stride 1");
  }
  FASTKIT_CHECK(h.is_cpu() && h.scalar_type() == arithmetic(x) && h.dim() == 2 && h.size(0) == x.size(0) &&
                    h.size(1) == a.size(0),
                "lora_linear: h must be what the forward gave");
  const Tensor in = readable_rows(x), gy_in = readable_rows(gy), h_in = contiguous(h);
  const auto when = [&](bool wanted, std::initializer_list<int64_t> shape) {
    return wanted ? new_empty(adapter.a, shape) : new_empty(adapter.a, {0});
  };
  Tensor ga = when(needs_adapter, {a.size(0), a.size(1)}), gb = when(needs_adapter, {b.size(0), b.size(1)});
  Tensor gbias = when(needs_bias, {b.size(0)});
  dispatch_floating("lora_linear", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    LoraLinearBackward<E> p;
    adapter.describe(p, x, scale);
    p.gy = input<E>(gy_in), p.x = input<E>(in);
    p.h = static_cast<const T*>(h_in.data_ptr());
    if (gx) p.gx = output<E>(*gx), p.adds = adds;
    if (needs_adapter) p.ga = static_cast<T*>(ga.data_ptr()), p.gb = static_cast<T*>(gb.data_ptr());
    if (needs_bias) p.gbias = static_cast<T*>(gbias.data_ptr());
    run(lora_linear_kernels().of<E>().backward, p, h);
  });
  return {ga, gb, gbias};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("lora_linear_fwd_", TORCH_BOX(&fastkit::lora_linear_fwd_));
  m.impl("lora_linear_bwd_", TORCH_BOX(&fastkit::lora_linear_bwd_));
}
