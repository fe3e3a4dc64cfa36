// icp_epoch: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/aligned.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/ranges.h"
#include "fastkit/icp.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

struct Result {
  Tensor w_xy, w_yx, nearest_target, nearest_source, cost, mutual;
};

template <class T>
void run(const ICPFunctions<T>& functions, ICPCall<T> call, const Tensor& w_xy, const Tensor& w_yx,
         const Tensor& seeds, bool given, const Result& to) {
  const int64_t columns = call.columns, restarts = w_xy.size(0);
  const Aligned<T> source(functions.packed_size(call.source.count, columns));
  const Aligned<T> target(functions.packed_size(call.target.count, columns));
  functions.pack(call.source, columns, source.data());
  functions.pack(call.target, columns, target.data());
  call.source.packed = source.data(), call.target.packed = target.data();
  const int64_t bytes = functions.room(call), square = columns * columns;
  const auto some = [&](int64_t begin, int64_t end, ParallelRanges parallel) {
    const Aligned<char> room(bytes);
    for (int64_t i = begin; i < end; ++i) {
      ICPRestart<T> restart;
      restart.w_xy = static_cast<const T*>(w_xy.data_ptr()) + i * square;
      restart.w_yx = static_cast<const T*>(w_yx.data_ptr()) + i * square;
      restart.next_xy = static_cast<T*>(to.w_xy.data_ptr()) + i * square;
      restart.next_yx = static_cast<T*>(to.w_yx.data_ptr()) + i * square;
      restart.seed = static_cast<uint64_t>(static_cast<const int64_t*>(seeds.data_ptr())[i]);
      restart.nearest_target = static_cast<int64_t*>(to.nearest_target.data_ptr()) + i * call.source.count;
      restart.nearest_source = static_cast<int64_t*>(to.nearest_source.data_ptr()) + i * call.target.count;
      restart.given = given;
      restart.cost = static_cast<T*>(to.cost.data_ptr()) + i;
      restart.mutual = static_cast<int64_t*>(to.mutual.data_ptr()) + i;
      restart.room = room.data();
      functions.epoch(call, restart, parallel);
    }
  };
  if (restarts < static_cast<int64_t>(torch::stable::get_num_threads())) return some(0, restarts, in_parallel);
  torch::stable::parallel_for(0, restarts, 1, [&](int64_t begin, int64_t end) { some(begin, end, in_order); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> icp_epoch_fwd(
    const Tensor& source, const Tensor& target, const Tensor& w_xy, const Tensor& w_yx, const Tensor& seeds,
    const std::optional<Tensor>& nearest_target, const std::optional<Tensor>& nearest_source, int64_t epoch,
    int64_t batch_size, double lr, double beta1, double beta2, double eps, double cycle_weight, bool mutual_only) {
  const bool single = source.scalar_type() == ScalarType::Float;
  FASTKIT_CHECK(single || source.scalar_type() == ScalarType::Double, "icp_epoch: source must be float32 or float64");
  constexpr int64_t kMost = int64_t{1} << 31;
  FASTKIT_CHECK(source.is_cpu() && source.dim() == 2 && source.size(0) >= 1 && source.size(0) < kMost &&
                    source.size(1) >= 1,
                "icp_epoch: source must be on the CPU and have shape (n, D) with 1 <= n < 2^31, D >= 1");
  const int64_t n = source.size(0), columns = source.size(1);
  FASTKIT_CHECK(target.is_cpu() && target.dim() == 2 && target.size(0) >= 1 && target.size(0) < kMost &&
                    target.size(1) == columns && target.scalar_type() == source.scalar_type(),
                "icp_epoch: target must be on the CPU and have shape (m, D) and the dtype of source");
  const int64_t m = target.size(0);
  FASTKIT_CHECK(w_xy.dim() == 3, "icp_epoch: w_xy must have shape (R, D, D)");
  const int64_t restarts = w_xy.size(0);
  const auto check_map = [&](const char* name, const Tensor& w) {
    FASTKIT_CHECK(w.is_cpu() && w.dim() == 3 && w.size(0) == restarts && w.size(1) == columns &&
                      w.size(2) == columns && w.scalar_type() == source.scalar_type(),
                  "icp_epoch: ", name, " must be on the CPU and have shape (R, D, D) and the dtype of source");
  };
  check_map("w_xy", w_xy), check_map("w_yx", w_yx);
  FASTKIT_CHECK(seeds.is_cpu() && seeds.dim() == 1 && seeds.size(0) == restarts &&
                    seeds.scalar_type() == ScalarType::Long,
                "icp_epoch: seeds must be on the CPU and have shape (R,) and dtype int64");
  FASTKIT_CHECK(nearest_target.has_value() == nearest_source.has_value(),
                "icp_epoch: nearest_target and nearest_source must both be given, or both be None");
  const auto check_nearest = [&](const char* name, const Tensor& nearest, int64_t count) {
    FASTKIT_CHECK(nearest.is_cpu() && nearest.dim() == 2 && nearest.size(0) == restarts && nearest.size(1) == count &&
                      nearest.scalar_type() == ScalarType::Long,
                  "icp_epoch: ", name, " must be on the CPU, int64, with a row of each table's rows for each restart");
  };
  const bool given = nearest_target.has_value();
  if (given) check_nearest("nearest_target", *nearest_target, n), check_nearest("nearest_source", *nearest_source, m);
  FASTKIT_CHECK(batch_size >= 1, "icp_epoch: batch_size must be at least 1");
  FASTKIT_CHECK(epoch >= 0 && epoch < int64_t{1} << 32, "icp_epoch: epoch must be at least 0 and below 2^32");

  Result to;
  to.w_xy = new_empty(source, {restarts, columns, columns}), to.w_yx = new_empty(source, {restarts, columns, columns});
  to.nearest_target = new_empty(source, {restarts, n}, ScalarType::Long);
  to.nearest_source = new_empty(source, {restarts, m}, ScalarType::Long);
  if (given) {
    torch::stable::copy_(to.nearest_target, *nearest_target), torch::stable::copy_(to.nearest_source, *nearest_source);
  }
  to.cost = new_empty(source, {restarts}), to.mutual = new_empty(source, {restarts}, ScalarType::Long);
  const Tensor x = contiguous(source), y = contiguous(target), xy = contiguous(w_xy), yx = contiguous(w_yx);
  const Tensor keys = contiguous(seeds);
  const auto call = [&](const auto& functions, auto zero) {
    using T = decltype(zero);
    ICPCall<T> of;
    of.source.rows = static_cast<const T*>(x.data_ptr()), of.source.count = n;
    of.target.rows = static_cast<const T*>(y.data_ptr()), of.target.count = m;
    of.columns = columns, of.batch_size = batch_size, of.epoch = static_cast<uint32_t>(epoch);
    of.lr = lr, of.beta1 = beta1, of.beta2 = beta2, of.eps = eps, of.cycle_weight = cycle_weight;
    of.mutual_only = mutual_only;
    run<T>(functions, of, xy, yx, keys, given, to);
  };
  if (restarts == 0) {
  } else if (single) {
    call(icp_kernels().f32, float{});
  } else {
    call(icp_kernels().f64, double{});
  }
  return {to.w_xy, to.w_yx, to.nearest_target, to.nearest_source, to.cost, to.mutual};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) { m.impl("icp_epoch_fwd", TORCH_BOX(&fastkit::icp_epoch_fwd)); }
