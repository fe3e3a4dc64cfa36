// icp_epoch: tensors -> raw pointers, for CUDA. Empty in a build without it.
#ifdef FASTKIT_WITH_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <functional>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/stream.h"
#include "fastkit/icp_cuda.h"

namespace fastkit {
namespace {

using torch::stable::new_empty;

constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;  // that an int32_t counts

// Of a dtype and shape, and on the device of `like`; without gaps.
Tensor dense(const char* name, const Tensor& t, const Tensor& like, ScalarType dtype,
             std::initializer_list<int64_t> shape) {
  bool fits = t.is_cuda() && t.get_device_index() == like.get_device_index() && t.scalar_type() == dtype &&
              is_strided(t) && t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (int64_t size : shape) fits = fits && t.size(axis++) == size;
  FASTKIT_CHECK(fits, "icp_epoch: ", name,
                " must fit source (n, D), target (m, D) and seeds (R,) in shape, dtype and device");
  return torch::stable::contiguous(t);
}

template <class U>
U* data(const Tensor& t) {
  return static_cast<U*>(t.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> icp_epoch_fwd(
    const Tensor& source, const Tensor& target, const Tensor& w_xy, const Tensor& w_yx, const Tensor& seeds,
    const std::optional<Tensor>& nearest_target, const std::optional<Tensor>& nearest_source, int64_t epoch,
    int64_t batch_size, double lr, double beta1, double beta2, double eps, double cycle_weight, bool mutual_only) {
  FASTKIT_CHECK(source.is_cuda() && source.dim() == 2 && target.dim() == 2 && seeds.dim() == 1,
                "icp_epoch: source must have shape (n, D), target (m, D) and seeds (R,), on a CUDA device");
  const int64_t n = source.size(0), m = target.size(0), D = source.size(1), R = seeds.size(0);
  FASTKIT_CHECK(n >= 1 && m >= 1 && n <= kMostRows && m <= kMostRows,
                "icp_epoch: source and target must have at least 1 and fewer than 2^31 rows");
  FASTKIT_CHECK(D >= 1 && D <= ICPEpochOnGpu::kColumns, "icp_epoch: D must be at most ", ICPEpochOnGpu::kColumns,
                " for impl 'cuda', got ", D, "; products of PyTorch do wider tables");
  FASTKIT_CHECK(batch_size >= 1, "icp_epoch: batch_size must be at least 1");
  FASTKIT_CHECK(nearest_target.has_value() == nearest_source.has_value(),
                "icp_epoch: nearest_target and nearest_source must be given both or neither");
  const auto device = device_guard(source);
  const Tensor x = dense("source", source, source, ScalarType::Float, {n, D});
  const Tensor y = dense("target", target, source, ScalarType::Float, {m, D});
  const Tensor xy = dense("w_xy", w_xy, source, ScalarType::Float, {R, D, D});
  const Tensor yx = dense("w_yx", w_yx, source, ScalarType::Float, {R, D, D});
  const Tensor keys = dense("seeds", seeds, source, ScalarType::Long, {R});
  Tensor there = new_empty(source, {R, n}, ScalarType::Long), back = new_empty(source, {R, m}, ScalarType::Long);
  if (nearest_target) {  // no result is an argument
    torch::stable::copy_(there, dense("nearest_target", *nearest_target, source, ScalarType::Long, {R, n}));
    torch::stable::copy_(back, dense("nearest_source", *nearest_source, source, ScalarType::Long, {R, m}));
  }
  const Tensor new_xy = new_empty(source, {R, D, D}), new_yx = new_empty(source, {R, D, D});
  const Tensor cost = new_empty(source, {R}), mutual = new_empty(source, {R}, ScalarType::Long);
  if (R > 0) {
    ICPEpochOnGpu call;
    call.restarts = R, call.n = n, call.m = m, call.columns = D;
    call.source = data<const float>(x), call.target = data<const float>(y);
    call.w_xy = data<const float>(xy), call.w_yx = data<const float>(yx);
    call.seeds = data<const int64_t>(keys);
    call.epoch = epoch, call.batch_size = batch_size;
    call.lr = lr, call.beta1 = beta1, call.beta2 = beta2, call.eps = eps, call.cycle_weight = cycle_weight;
    call.mutual_only = mutual_only, call.searches = !nearest_target.has_value();
    call.new_w_xy = data<float>(new_xy), call.new_w_yx = data<float>(new_yx);
    call.nearest_target = data<int64_t>(there), call.nearest_source = data<int64_t>(back);
    call.cost = data<float>(cost), call.mutual = data<int64_t>(mutual);
    StreamMemory memory{source};
    check_launch("icp_epoch", icp_epoch_cuda(call, current_stream(source), std::ref(memory)));
  }
  return {new_xy, new_yx, there, back, cost, mutual};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CUDA, m) { m.impl("icp_epoch_fwd", TORCH_BOX(&fastkit::icp_epoch_fwd)); }
#endif
