// A warp on the host: its lanes take turns, a phase of all of them after the other.
#pragma once

#include <memory>
#include <vector>

#include "common/warp.h"

namespace fastkit {

struct HostWarp {
  template <class V>
  struct PerLane {
    V value[kWarpLanes];
    V& operator[](int lane) { return value[lane]; }
  };

  template <class Phase>
  void each(Phase&& phase) const {
    for (int lane = 0; lane < kWarpLanes; ++lane) phase(lane);
  }
  void sync() const {}

  template <class V>
  PerLane<V> up(const PerLane<V>& v, int distance) const {
    PerLane<V> result = v;
    for (int lane = distance; lane < kWarpLanes; ++lane) result.value[lane] = v.value[lane - distance];
    return result;
  }
};

// Takes what common/launch.cuh's CudaStream takes, a unit after the other.
class HostStream {
 public:
  explicit HostStream(int64_t warps) : warps_(warps) {}
  int64_t warps() const { return warps_; }

  template <class U>
  U* allocate(int64_t count) {
    memory_.push_back(std::make_unique<char[]>(count * sizeof(U) + 1));
    return reinterpret_cast<U*>(memory_.back().get());
  }

  template <class Body>
  void run(const Body& body, int64_t units) {
    for (int64_t unit = 0; unit < units; ++unit) {
      typename Body::Room room;
      HostWarp warp;
      body(warp, unit, room);
    }
  }

 private:
  int64_t warps_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

}  // namespace fastkit
