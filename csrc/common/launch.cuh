// Kernels that are one functor of a team of warps: body(team, unit, room), a unit of work to each team. Body::kWarps are
// the warps of a team, Body::Room is its shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <type_traits>

#include "common/warp.h"
#include "fastkit/cuda_memory.h"

namespace fastkit {

template <int kWarps>
struct DeviceTeam {
  template <class V>
  struct PerLane {
    V value;
    FASTKIT_DEVICE V& operator[](int) { return value; }
  };

  template <class Phase>
  FASTKIT_DEVICE void each(Phase&& phase) const {
    phase(static_cast<int>(threadIdx.x % (kWarps * kWarpLanes)));
  }
  FASTKIT_DEVICE void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  template <class V>
  FASTKIT_DEVICE PerLane<V> up(const PerLane<V>& v, int distance) const {
    return shuffled(v, [&](uint32_t word) { return __shfl_up_sync(0xffffffffu, word, distance); });
  }
  template <class V>
  FASTKIT_DEVICE PerLane<V> turned(const PerLane<V>& v) const {
    const int from = (threadIdx.x + kWarpLanes - 1) % kWarpLanes;
    return shuffled(v, [&](uint32_t word) { return __shfl_sync(0xffffffffu, word, from); });
  }
  template <class V>
  FASTKIT_DEVICE PerLane<V> lane(const PerLane<V>& v, int which) const {
    return shuffled(v, [&](uint32_t word) { return __shfl_sync(0xffffffffu, word, which); });
  }

  // Past the first-level cache where it can; whole lines come to the second, whose other parts neighbours ask for.
  template <int kBytes>
  FASTKIT_DEVICE void copy(void* to, const void* from) const {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(kBytes)
                   : "memory");
    }
  }
  FASTKIT_DEVICE void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kGroups>
  FASTKIT_DEVICE void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
  }

 private:
  template <class V, class Shuffle>
  static FASTKIT_DEVICE PerLane<V> shuffled(const PerLane<V>& v, Shuffle&& shuffle) {
    static_assert(sizeof(V) % sizeof(uint32_t) == 0);
    constexpr int kWords = sizeof(V) / sizeof(uint32_t);
    uint32_t words[kWords];
    memcpy(words, &v.value, sizeof(V));
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
    PerLane<V> result;
    memcpy(&result.value, words, sizeof(V));
    return result;
  }
};

inline constexpr int kWarpsPerBlock = 4;  // of small teams
inline constexpr int kStaticRoom = 48 * 1024;  // bytes of a block; more are asked for at launch
template <class Body>
inline constexpr int kTeams = Body::kWarps < kWarpsPerBlock ? kWarpsPerBlock / Body::kWarps : 1;  // of a block
template <class Body>
inline constexpr int kThreads = kTeams<Body> * Body::kWarps * kWarpLanes;

// Threads of a multiprocessor, at least: 512, which leaves each 128 registers, or Body::kResident.
template <class Body, class = void>
inline constexpr int kResident = 512;
template <class Body>
inline constexpr int kResident<Body, std::void_t<decltype(Body::kResident)>> = Body::kResident;

template <class Body>
__global__ void __launch_bounds__(kThreads<Body>, kResident<Body> / kThreads<Body>) run_teams(const Body body, int64_t units) {
  using Room = typename Body::Room;
  const int which = threadIdx.x / (Body::kWarps * kWarpLanes);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kTeams<Body> + which;
  DeviceTeam<Body::kWarps> team;
  if constexpr (kTeams<Body> * sizeof(Room) <= kStaticRoom) {
    __shared__ Room rooms[kTeams<Body>];
    if (unit < units) body(team, unit, rooms[which]);
  } else {
    extern __shared__ __align__(16) unsigned char rooms[];
    if (unit < units) body(team, unit, reinterpret_cast<Room*>(rooms)[which]);
  }
}

// A stream of the current device, and memory for what runs there. `error` keeps the first launch that failed.
struct CudaStream {
  cudaStream_t stream;
  const CudaMemory& memory;
  cudaError_t error = cudaSuccess;

  int64_t warps() const {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return static_cast<int64_t>(multiprocessors) * 32;
  }

  template <class U>
  U* allocate(int64_t count) const {
    return static_cast<U*>(memory(count * static_cast<int64_t>(sizeof(U))));
  }

  template <class Body>
  void run(const Body& body, int64_t units) {
    if (units == 0 || error != cudaSuccess) return;
    constexpr int kBytes = kTeams<Body> * static_cast<int>(sizeof(typename Body::Room));
    constexpr int kRoom = kBytes > kStaticRoom ? kBytes : 0;
    if constexpr (kRoom > 0) {
      error = cudaFuncSetAttribute(run_teams<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
      if (error != cudaSuccess) return;
    }
    const auto blocks = static_cast<unsigned>((units + kTeams<Body> - 1) / kTeams<Body>);
    run_teams<Body><<<blocks, kThreads<Body>, kRoom, stream>>>(body, units);
    error = cudaGetLastError();
  }
};

// Of launches(CudaStream&): null, or what CUDA says against the first that failed.
template <class Launches>
const char* launched(void* stream, const CudaMemory& memory, Launches&& launches) {
  CudaStream on{static_cast<cudaStream_t>(stream), memory};
  launches(on);
  return on.error == cudaSuccess ? nullptr : cudaGetErrorString(on.error);
}

}  // namespace fastkit
