// A team of warps on the host: its threads take turns, a phase of all of them after the other.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "common/warp.h"

namespace fastkit {

template <int kWarps>
struct HostTeam {
  static constexpr int kThreads = kWarps * kWarpLanes;

  template <class V>
  struct PerLane {
    V value[kThreads];
    V& operator[](int thread) { return value[thread]; }
  };

  template <class Phase>
  void each(Phase&& phase) const {
    for (int thread = 0; thread < kThreads; ++thread) phase(thread);
  }
  void sync() const {}

  template <class V>
  PerLane<V> up(const PerLane<V>& v, int distance) const {
    return gather(v, [&](int lane) { return lane < distance ? lane : lane - distance; });
  }
  template <class V>
  PerLane<V> turned(const PerLane<V>& v) const {
    return gather(v, [](int lane) { return lane == 0 ? kWarpLanes - 1 : lane - 1; });
  }
  template <class V>
  PerLane<V> lane(const PerLane<V>& v, int which) const {
    return gather(v, [&](int) { return which; });
  }

  template <int kBytes>
  void copy(void* to, const void* from) const {
    memcpy(to, from, kBytes);
  }
  void commit() const {}
  template <int kGroups>
  void wait() const {}

 private:
  template <class V, class From>
  PerLane<V> gather(const PerLane<V>& v, From&& from) const {
    PerLane<V> result = v;
    for (int i = 0; i < kThreads; ++i) result.value[i] = v.value[i - i % kWarpLanes + from(i % kWarpLanes)];
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
    auto room = std::make_unique<typename Body::Room>();
    for (int64_t unit = 0; unit < units; ++unit) {
      memset(static_cast<void*>(room.get()), 0xff, sizeof(*room));  // NaN: what nobody has written is not to be read
      HostTeam<Body::kWarps> team;
      body(team, unit, *room);
    }
  }

 private:
  int64_t warps_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

}  // namespace fastkit
