// Device code as a team of warps, of 32 lanes each, that goes through phases together. DeviceTeam (common/launch.cuh) is
// one of the GPU; HostTeam (host/warp.h) runs the same code on the host, a phase of all threads after the other, for
// tests. A team of one warp is a warp, whose threads are its lanes:
//
//   PerLane<V>            a value that each thread has of its own: v[thread]
//   each(phase)           phase(thread), for every thread
//   sync()                what threads have written to memory is there for the others
//   up(v, distance)       of each lane the v of the lane so far below it in its warp, or its own where there is none
//   turned(v)             of each lane the v of the lane below it, of the first that of the last
//   lane(v, which)        that of one lane of the warp
//   copy<bytes>(to, from) 4, 8 or 16 bytes from global to shared memory, between commit() and the wait() for it
//   commit()              ends a group of copies; group by group they arrive
//   wait<groups>()        all but so many of the latest groups of this thread have arrived; then sync()
//
// Phases read other threads' values through up(), turned() and lane(), or through memory and a sync() alone.
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
template <class Team, class PerLane, class Combine>
FASTKIT_DEVICE void scan(Team& team, PerLane& v, Combine&& combine) {
FASTKIT_UNROLL
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    auto lower = team.up(v, distance);
    team.each([&](int thread) {
      if (thread % kWarpLanes >= distance) v[thread] = combine(v[thread], lower[thread]);
    });
  }
}

}  // namespace fastkit
