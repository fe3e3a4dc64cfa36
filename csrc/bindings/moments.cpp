// moments: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/moments.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr int64_t kSerialProducts = int64_t{1} << 20;  // fewer multiply-adds are not worth a second thread
constexpr int64_t kOfElement = 16;                     // multiply-adds that take as long as reading an element

// How many threads a call is worth, and how it is cut for them: into segments of rows where their lower halves, in
// float64 too, take less room than the rows, and what is left into groups of columns.
template <class E>
void cut(Moments<E>& p, int64_t panels) {
  const int64_t products = p.rows * p.columns * (p.columns / 2 + kOfElement);
  const int64_t threads = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, products / kSerialProducts + 1);
  p.segments = std::clamp<int64_t>(p.rows / (2 * p.columns), 1, threads);
  p.groups = std::min(threads / p.segments, panels);
}

template <class T>
void refuse_weight(const T* weights, int64_t row) {
  char value[32] = "nan";
  if (!std::isnan(weights[row])) std::snprintf(value, sizeof(value), "%g", static_cast<double>(weights[row]));
  FASTKIT_CHECK(false, "moments: weights must be finite and not negative, got ", value, " at index ", row,
                "; leave that row out, or give it the weight 0");
}

std::tuple<Tensor, Tensor, Tensor> moments_fwd(const Tensor& x, const std::optional<Tensor>& weights) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) >= 1,
                "moments: x must be on the CPU and have shape (N, D) with D >= 1");
  std::optional<Tensor> w;
  if (weights) {
    FASTKIT_CHECK(weights->is_cpu() && weights->dim() == 1 && weights->size(0) == x.size(0) &&
                      (weights->scalar_type() == x.scalar_type() || weights->scalar_type() == arithmetic(x)),
                  "moments: weights must be on the CPU and have shape (", x.size(0),
                  ",) and the dtype of x, or float32 for half precision");
    w = contiguous(torch::stable::to(*weights, arithmetic(x)));
  }
  Tensor count, mean, scatter;
  dispatch_floating("moments", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    const Tensor in = readable_rows(x);
    count = new_empty(x, {}, ScalarType::Double);
    mean = new_empty(x, {x.size(1)}, arithmetic(x)), scatter = new_empty(x, {x.size(1), x.size(1)}, arithmetic(x));
    const auto& kernels = moments_kernels().of<E>();
    Moments<E> p;
    p.rows = x.size(0), p.columns = x.size(1);
    p.x = static_cast<const E*>(in.data_ptr()), p.stride = in.stride(0);
    if (w) p.weights = static_cast<const T*>(w->data_ptr());
    p.count = static_cast<double*>(count.data_ptr());
    p.mean = static_cast<T*>(mean.data_ptr()), p.scatter = static_cast<T*>(scatter.data_ptr());
    const int64_t panels = kernels.panels(p);
    cut(p, panels);
    const Tensor room = new_empty(x, {kernels.room(p)}, ScalarType::Double);
    p.room = static_cast<double*>(room.data_ptr());
    std::vector<int64_t> refused(p.units(), -1);
    p.refused = refused.data();
    torch::stable::parallel_for(0, p.units(), 1, [&](int64_t begin, int64_t end) { kernels.run(p, begin, end); });
    for (int64_t row : refused) {
      if (row >= 0) refuse_weight(p.weights, row);
    }
    const int64_t grain = kSerialProducts * panels / (p.segments * p.columns * p.columns) + 1;
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) { kernels.finish(p, begin, end); });
  });
  return {count, mean, scatter};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) { m.impl("moments_fwd", TORCH_BOX(&fastkit::moments_fwd)); }
