// Device code as a warp of 32 lanes that goes through phases together. DeviceWarp (common/launch.cuh) is a warp of the
// GPU; HostWarp (host/warp.h) runs the same code on the host, a phase of all lanes after the other, for tests:
//
//   PerLane<V>            a value that each lane has of its own: v[lane]
//   each(phase)           phase(lane), for every lane
//   sync()                what lanes have written to memory is there for the others
//   up(v, distance)       of each lane the v of the lane so far below it, or its own where there is none
//
// Phases read other lanes' values through up(), or through memory and a sync() alone.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTKIT_DEVICE __device__ __forceinline__
#define FASTKIT_UNROLL _Pragma("unroll")
#else
#define FASTKIT_DEVICE inline
#define FASTKIT_UNROLL
#endif

namespace fastkit {

inline constexpr int kWarpLanes = 32;

// Of each lane: its v combined with that of every lane below it, combine(upper, lower).
template <class Warp, class PerLane, class Combine>
FASTKIT_DEVICE void scan(Warp& warp, PerLane& v, Combine&& combine) {
FASTKIT_UNROLL
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    auto lower = warp.up(v, distance);
    warp.each([&](int lane) {
      if (lane >= distance) v[lane] = combine(v[lane], lower[lane]);
    });
  }
}

}  // namespace fastkit
