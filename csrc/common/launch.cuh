// Kernels that are one functor of a warp: body(warp, unit, room), a unit of work to each warp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <functional>

#include "common/warp.h"

namespace fastkit {

struct DeviceWarp {
  template <class V>
  struct PerLane {
    V value;
    FASTKIT_DEVICE V& operator[](int) { return value; }
  };

  template <class Phase>
  FASTKIT_DEVICE void each(Phase&& phase) const {
    phase(static_cast<int>(threadIdx.x % kWarpLanes));
  }
  FASTKIT_DEVICE void sync() const { __syncwarp(); }

  template <class V>
  FASTKIT_DEVICE PerLane<V> up(const PerLane<V>& v, int distance) const {
    static_assert(sizeof(V) % sizeof(uint32_t) == 0);
    constexpr int kWords = sizeof(V) / sizeof(uint32_t);
    uint32_t words[kWords];
    memcpy(words, &v.value, sizeof(V));
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_up_sync(0xffffffffu, words[i], distance);
    PerLane<V> result;
    memcpy(&result.value, words, sizeof(V));
    return result;
  }
};

inline constexpr int kWarpsPerBlock = 4;

template <class Body>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes, 4) run_warps(const Body body, int64_t units) {
  __shared__ typename Body::Room rooms[kWarpsPerBlock];
  const int which = threadIdx.x / kWarpLanes;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + which;
  DeviceWarp warp;
  if (unit < units) body(warp, unit, rooms[which]);
}

// A stream of the current device, and memory that lives until its work is done. `error` keeps the first launch that
// failed.
struct CudaStream {
  cudaStream_t stream;
  const std::function<void*(int64_t bytes)>& memory;
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
    const auto blocks = static_cast<unsigned>((units + kWarpsPerBlock - 1) / kWarpsPerBlock);
    run_warps<Body><<<blocks, kWarpsPerBlock * kWarpLanes, 0, stream>>>(body, units);
    error = cudaGetLastError();
  }
};

}  // namespace fastkit
