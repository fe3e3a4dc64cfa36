// polar: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/ranges.h"
#include "fastkit/procrustes.h"

namespace fastkit {
namespace {

using torch::stable::new_empty;

template <class T>
void factor_each(const PolarFunctions<T>& functions, const PolarSchedule& schedule, const Tensor& m, const Tensor& w,
                 const Tensor& orthogonal) {
  const int64_t batch = m.size(0), rows = m.size(1), columns = m.size(2);
  const auto some = [&](int64_t begin, int64_t end, ParallelRanges parallel) {
    const Tensor room = new_empty(m, {functions.room(rows, columns)});
    for (int64_t i = begin; i < end; ++i) {
      PolarMatrix<T> p;
      p.m = static_cast<const T*>(m.data_ptr()) + i * rows * columns;
      p.w = static_cast<T*>(w.data_ptr()) + i * rows * columns;
      p.rows = rows, p.columns = columns, p.room = static_cast<T*>(room.data_ptr());
      static_cast<bool*>(orthogonal.data_ptr())[i] = functions.factor(p, schedule, parallel);
    }
  };
  if (batch < static_cast<int64_t>(torch::stable::get_num_threads())) return some(0, batch, in_parallel);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) { some(begin, end, in_order); });
}

std::tuple<Tensor, Tensor> polar_fwd(const Tensor& m, const std::vector<double>& rationals,
                                     const std::vector<double>& quintics) {
  FASTKIT_CHECK(m.is_cpu() && m.dim() == 3 && m.size(1) >= m.size(2) && m.size(2) >= 1,
                "polar: m must be on the CPU and have shape (B, P, Q) with P >= Q >= 1");
  const bool single = m.scalar_type() == ScalarType::Float;
  FASTKIT_CHECK(single || m.scalar_type() == ScalarType::Double, "polar: m must be float32 or float64");
  FASTKIT_CHECK(rationals.size() % 3 == 0 && quintics.size() % 3 == 0, "polar: a step must have three coefficients");
  const Tensor in = torch::stable::contiguous(m);
  Tensor w = new_empty(in, {in.size(0), in.size(1), in.size(2)});
  Tensor orthogonal = new_empty(in, {in.size(0)}, ScalarType::Bool);
  PolarSchedule schedule;
  schedule.rationals = rationals.data(), schedule.rational_count = static_cast<int64_t>(rationals.size() / 3);
  schedule.quintics = quintics.data(), schedule.quintic_count = static_cast<int64_t>(quintics.size() / 3);
  schedule.tolerance = 64 * (single ? 0x1p-23 : 0x1p-52);
  if (single) {
    factor_each(polar_kernels().f32, schedule, in, w, orthogonal);
  } else {
    factor_each(polar_kernels().f64, schedule, in, w, orthogonal);
  }
  return {w, orthogonal};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) { m.impl("polar_fwd", TORCH_BOX(&fastkit::polar_fwd)); }
