// The launcher of icp_epoch. It returns null, or what CUDA says against the launch.
#pragma once

#include "fastkit/cuda_memory.h"

namespace fastkit {

// An epoch of R restarts: what reference/icp.py computes, all of it on the GPU and dense. n, m < 2^31.
struct ICPEpochOnGpu {
  static constexpr int kColumns = 64;  // at most

  int64_t restarts = 0, n = 0, m = 0, columns = 0;
  const float *source = nullptr, *target = nullptr;  // (n, D), (m, D)
  const float *w_xy = nullptr, *w_yx = nullptr;      // (R, D, D)
  const int64_t* seeds = nullptr;                    // (R)
  int64_t epoch = 0, batch_size = 0;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, cycle_weight = 0;
  bool mutual_only = false;
  bool searches = true;  // or nearest_target and nearest_source are given

  float *new_w_xy = nullptr, *new_w_yx = nullptr;                     // (R, D, D)
  int64_t *nearest_target = nullptr, *nearest_source = nullptr;       // (R, n), (R, m)
  float* cost = nullptr;                                              // (R)
  int64_t* mutual = nullptr;                                          // (R)
};

// Nothing waits for the device.
const char* icp_epoch_cuda(const ICPEpochOnGpu& call, void* stream, const CudaMemory& memory);

}  // namespace fastkit
