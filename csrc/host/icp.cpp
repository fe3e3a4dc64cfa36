// icp_epoch on NumPy arrays, for tests: the GPU's functors with teams of warps that are loops (host/warp.h).
#include "fastkit/icp_cuda.h"
#include "fastkit/icp_warps.h"
#include "fastkit/philox.h"
#include "host/arrays.h"
#include "host/warp.h"

namespace {

using namespace fastkit;

// nearest_* and the new_* maps, cost and mutual are written; nearest rows are read where the call does not search.
void epoch(const Array<float>& source, const Array<float>& target, const Array<float>& w_xy, const Array<float>& w_yx,
           const Array<int64_t>& seeds, Array<int64_t> nearest_target, Array<int64_t> nearest_source, bool searches,
           int64_t epoch, int64_t batch_size, double lr, double beta1, double beta2, double eps, double cycle_weight,
           bool mutual_only, Array<float> new_w_xy, Array<float> new_w_yx, Array<float> cost, Array<int64_t> mutual,
           int64_t mapped_bytes) {
  ICPEpochOnGpu call;
  call.restarts = seeds.shape(0), call.n = source.shape(0), call.m = target.shape(0), call.columns = source.shape(1);
  call.source = source.data(), call.target = target.data(), call.w_xy = w_xy.data(), call.w_yx = w_yx.data();
  call.seeds = seeds.data();
  call.epoch = epoch, call.batch_size = batch_size;
  call.lr = lr, call.beta1 = beta1, call.beta2 = beta2, call.eps = eps, call.cycle_weight = cycle_weight;
  call.mutual_only = mutual_only, call.searches = searches;
  call.new_w_xy = new_w_xy.mutable_data(), call.new_w_yx = new_w_yx.mutable_data();
  call.nearest_target = nearest_target.mutable_data(), call.nearest_source = nearest_source.mutable_data();
  call.cost = cost.mutable_data(), call.mutual = mutual.mutable_data();
  HostStream stream(1);
  icp_warps::epoch(call, stream, mapped_bytes);
}

// The rows of a side in the order of visits, with their nearest, which are given; (R, 2, n) for tables of n rows each.
Array<int64_t> visits(const Array<int64_t>& seeds, Array<int64_t> nearest, uint32_t epoch, bool mutual_only) {
  const int64_t restarts = seeds.shape(0), n = nearest.shape(1);
  icp_warps::Order order;
  for (icp_warps::Side& side : order.sides.of) {
    side.count = static_cast<int32_t>(n), side.nearest = nearest.mutable_data();
  }
  order.seeds = seeds.data(), order.epoch = epoch, order.mutual_only = mutual_only;
  Array<int64_t> result({restarts, int64_t{2}, n});
  order.visits = reinterpret_cast<uint64_t*>(result.mutable_data());
  HostStream stream(1);
  stream.run(order, 2 * restarts);
  return result;
}

}  // namespace

void bind_icp(py::module_& m) {
  m.def("icp_epoch", &epoch);
  m.def("icp_visits", &visits);
  m.def("philox_word", &philox_word);
}
