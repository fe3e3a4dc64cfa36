// icp_epoch on the GPU: the launches of icp_warps_search.h and icp_warps_steps.h.
#pragma once

#include "fastkit/icp_warps_search.h"
#include "fastkit/icp_warps_steps.h"

namespace fastkit::icp_warps {

inline constexpr int64_t kMappedBytes = int64_t{64} << 20;

// Stream: run(body, units), allocate<U>(count). mapped_bytes: of mapped tables at a time, or those of one restart.
template <class Stream>
void epoch(const ICPEpochOnGpu& call, Stream& stream, int64_t mapped_bytes = kMappedBytes) {
  const auto D = static_cast<int32_t>(call.columns);
  Sides sides;
  sides.columns = D, sides.wide = D <= Steps<2>::kWide ? Steps<2>::kWide : Steps<4>::kWide;
  sides.of[0].rows = call.source, sides.of[1].rows = call.target;
  sides.of[0].count = static_cast<int32_t>(call.n), sides.of[1].count = static_cast<int32_t>(call.m);
  sides.of[0].map = call.w_yx, sides.of[1].map = call.w_xy;
  sides.of[0].nearest = call.nearest_target, sides.of[1].nearest = call.nearest_source;
  int64_t of_restart = 0;  // numbers of mapped tables
  for (Side& side : sides.of) {
    side.room = (int64_t{side.count} + kKeys - 1) / kKeys * kKeys;
    side.columns = stream.template allocate<float>(D * side.room);
    side.packed = stream.template allocate<float>(int64_t{side.count} * sides.wide);
    of_restart += (D + 1) * side.room;
  }
  const Tiles tiles = Tiles::over(sides, kKeys);
  stream.run(Layout{sides, tiles}, tiles.units());

  const int64_t fitting = mapped_bytes / (4 * of_restart), together = fitting < 1 ? 1 : fitting;
  const int64_t most = call.restarts < together ? call.restarts : together;
  for (int side = 0; side < 2; ++side) {
    sides.of[side].keys = stream.template allocate<float>(most * (D + 1) * sides.of[1 - side].room);
  }
  for (int64_t first = 0; first < call.restarts; first += most) {
    const int64_t count = call.restarts - first < most ? call.restarts - first : most;
    Sides some = sides;
    for (Side& side : some.of) side.map += first * D * D, side.nearest += first * side.count;
    stream.run(Mapped{some, tiles}, count * tiles.units());
    const Tiles queries = Tiles::over(some, Nearest::kQueries);
    if (call.searches) stream.run(Nearest{some, queries}, count * queries.units());
    stream.run(Costs{some, call.cost + first, call.mutual + first}, count);
  }

  Order order;
  order.sides = sides, order.seeds = call.seeds, order.epoch = static_cast<uint32_t>(call.epoch);
  order.mutual_only = call.mutual_only;
  order.visits = stream.template allocate<uint64_t>(call.restarts * (call.n + call.m));
  stream.run(order, 2 * call.restarts);

  const auto run = [&](auto steps) {
    steps.sides = sides, steps.visits = order.visits, steps.cost = call.cost;
    steps.mutual = call.mutual_only ? call.mutual : nullptr;
    steps.maps[0] = call.new_w_xy, steps.maps[1] = call.new_w_yx;
    steps.batch_size = call.batch_size;
    stream.run(steps, call.restarts);
  };
  if (sides.wide == Steps<2>::kWide) {
    run(Steps<2>(call));
  } else {
    run(Steps<4>(call));
  }
}

}  // namespace fastkit::icp_warps
