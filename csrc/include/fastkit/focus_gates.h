// Kernel interface of the gates of FocusLayer, each row of which has logits r, u and h of its channels, in turn.
//
//   s = silu(r) y,    o = residual + sigmoid(u) (silu(h + m) - residual)
//
// What lies between the two, m = s U^T, is a product of PyTorch's. All tensors are dense and float32; rows are shared.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

struct FocusGates {
  int64_t channels = 0;
  const float* logits = nullptr;  // (rows, 3 channels)
  const float* y = nullptr;       // (rows, channels), and so are all others but glogits
  const float* m = nullptr;
  const float* residual = nullptr;
  const float* go = nullptr;
  const float* gs = nullptr;
  float* s = nullptr;
  float* o = nullptr;
  float* glogits = nullptr;  // (rows, 3 channels): update_bwd writes all, those of r as 0; reset_bwd those of r
  float* gresidual = nullptr;
  float* gy = nullptr;
};

struct FocusGatesKernels {  // for rows [begin, end)
  void (*reset)(const FocusGates&, int64_t begin, int64_t end);       // logits, y -> s
  void (*update)(const FocusGates&, int64_t begin, int64_t end);      // logits, m, residual -> o
  void (*update_bwd)(const FocusGates&, int64_t begin, int64_t end);  // .., go -> glogits, gresidual
  void (*reset_bwd)(const FocusGates&, int64_t begin, int64_t end);   // logits, y, gs -> glogits, gy
};
FASTKIT_TABLE(FocusGatesKernels, focus_gates_kernels)

}  // namespace fastkit
