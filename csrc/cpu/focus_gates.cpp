// The gates of FocusLayer on the CPU: one pass over a block of rows before the product between them, one after it.
//
// Parallel   rows.
// Bytes      per row and channel, of a cache: reset 12, update 20, update_bwd 32, reset_bwd 20.
// Numerics   float32; sigmoid to some units in the last place.
#include "cpu/exponential.h"
#include "fastkit/focus_gates.h"

namespace fastkit::FASTKIT_ISA {
namespace {

using V = Vec<float>;

FASTKIT_INLINE V sigmoid(V x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential<float>(-x)); }

// The derivative of silu(x), with s = sigmoid(x).
FASTKIT_INLINE V silu_slope(V x, V s) { return fma<float>(s * x, broadcast(1.0f) - s, s); }

// body(c, load, store) for each vector of channels: the last may be short.
template <class Body>
FASTKIT_INLINE void each(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes<float> <= channels; c += kLanes<float>) {
    body(c, [](const float* p) __attribute__((always_inline)) { return load(p); },
         [](float* p, V v) __attribute__((always_inline)) { store(p, v); });
  }
  const int64_t left = channels - c;
  if (left == 0) return;
  body(c, [left](const float* p) __attribute__((always_inline)) { return load(p, left); },
       [left](float* p, V v) __attribute__((always_inline)) { store(p, v, left); });
}

void reset(const FocusGates& p, int64_t begin, int64_t end) {
  KernelScope scope;
  for (int64_t row = begin; row < end; ++row) {
    const float *r = p.logits + 3 * row * p.channels, *y = p.y + row * p.channels;
    float* s = p.s + row * p.channels;
    each(p.channels, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const V logit = get(r + c);
      put(s + c, logit * sigmoid(logit) * get(y + c));
    });
  }
}

void update(const FocusGates& p, int64_t begin, int64_t end) {
  KernelScope scope;
  for (int64_t row = begin; row < end; ++row) {
    const float *u = p.logits + (3 * row + 1) * p.channels, *h = u + p.channels;
    const float* residual = p.residual + row * p.channels;
    float* m = p.m + row * p.channels;
    each(p.channels, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const V x = get(h + c) + get(m + c), before = get(residual + c);
      put(m + c, fma<float>(sigmoid(get(u + c)), fma<float>(x, sigmoid(x), -before), before));
    });
  }
}

void update_bwd(const FocusGates& p, int64_t begin, int64_t end) {
  KernelScope scope;
  for (int64_t row = begin; row < end; ++row) {
    float *u = p.logits + (3 * row + 1) * p.channels, *h = u + p.channels, *m = p.m + row * p.channels;
    const float *residual = p.residual + row * p.channels, *go = p.go + row * p.channels;
    each(p.channels, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const V x = get(h + c) + get(m + c), s = sigmoid(x), open = sigmoid(get(u + c)), g = get(go + c);
      const V passed = g * open, kept = g - passed;
      put(u + c, kept * open * fma<float>(x, s, -get(residual + c)));
      put(h + c, passed * silu_slope(x, s));
      put(m + c, kept);
    });
  }
}

void reset_bwd(const FocusGates& p, int64_t begin, int64_t end) {
  KernelScope scope;
  for (int64_t row = begin; row < end; ++row) {
    const float* y = p.y + row * p.channels;
    float *r = p.logits + 3 * row * p.channels, *gs = p.s + row * p.channels;
    each(p.channels, [&](int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const V x = get(r + c), s = sigmoid(x), g = get(gs + c);
      put(r + c, g * get(y + c) * silu_slope(x, s));
      put(gs + c, g * x * s);
    });
  }
}

}  // namespace

const FocusGatesKernels focus_gates_kernels = {reset, update, update_bwd, reset_bwd};

}  // namespace fastkit::FASTKIT_ISA
