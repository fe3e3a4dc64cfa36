// Kernel interface of the gates of FocusLayer, each row of which has logits r, u and h of its channels, in turn.
//
//   s = silu(r) y,    o = residual + sigmoid(u) (silu(h + m) - residual)
//
// What lies between the two, m = s U^T, is a product of PyTorch's. All tensors are dense and float32; rows are shared.
// What is computed takes the place of what it is computed from, and is read no more: rows come in blocks, and a block's
// tensors stay in a cache.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

struct FocusGates {
  int64_t channels = 0;
  float* logits = nullptr;         // (rows, 3 channels): in backward their gradients, in the end
  const float* y = nullptr;        // (rows, channels), and so are all that follow
  const float* residual = nullptr;
  const float* go = nullptr;
  float* s = nullptr;  // of reset; in backward its gradient, then y's
  float* m = nullptr;  // then o; in backward the gradient of the residual
};

struct FocusGatesKernels {  // for rows [begin, end)
  void (*reset)(const FocusGates&, int64_t begin, int64_t end);       // logits, y -> s
  void (*update)(const FocusGates&, int64_t begin, int64_t end);      // logits, m, residual -> o in m
  void (*update_bwd)(const FocusGates&, int64_t begin, int64_t end);  // logits, m, residual, go -> gradients of u, h
  void (*reset_bwd)(const FocusGates&, int64_t begin, int64_t end);   // logits, y, gs in s -> gradients of r, y
};
FASTKIT_TABLE(FocusGatesKernels, focus_gates_kernels)

}  // namespace fastkit
