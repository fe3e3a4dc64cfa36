// iir_step: one sample of every row.
//
// What       y from x, the coefficients and the state of a row's filters, and the state after it.
// Parallel   threads take runs of rows (b, c); rows of one b are vectorised by the compiler, kBlock at a time.
// Bytes      per fp32 row, one filter: reads x, a, b, both states (40, without b 28), writes y and both states (20).
// Numerics   y_f = u - a1 y1 - a2 y2, u = b0 x + b1 x1 + b2 x2; the filters are summed in order.
#define FASTKIT_HALF_VECTORS  // of the conversions from and to half precision alone
#include "cpu/simd.h"
#include "fastkit/iir_scan.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kBlock = 128;  // rows

// Rows [0, n) of `taps` neighbouring values, `stride` apart: where they lie, or, unless they are dense, a copy.
template <class T, int kTaps>
FASTKIT_INLINE const T* dense(const T* from, int64_t stride, int64_t tap, int n, T (&copy)[kTaps * kBlock]) {
  if (tap == 1 && stride == kTaps) return from;
  for (int i = 0; i < n; ++i) {
    for (int q = 0; q < kTaps; ++q) copy[i * kTaps + q] = from[i * stride + q * tap];
  }
  return copy;
}

// A filter's part of y; the first filter's begins it, and shifts x.
template <class T, bool kNumerator, bool kFirst>
FASTKIT_INLINE void filter(int n, const T* __restrict__ x, const T* __restrict__ a, const T* __restrict__ b,
                           const T* __restrict__ before_y, const T* __restrict__ before_x, T* __restrict__ y,
                           T* __restrict__ after_y, T* __restrict__ after_x) {
  for (int i = 0; i < n; ++i) {
    T u = x[i];
    if constexpr (kNumerator) u = b[3 * i] * u + (b[3 * i + 1] * before_x[2 * i] + b[3 * i + 2] * before_x[2 * i + 1]);
    const T y1 = before_y[2 * i], y0 = (u - a[2 * i + 1] * before_y[2 * i + 1]) - a[2 * i] * y1;
    after_y[2 * i] = y0, after_y[2 * i + 1] = y1;
    if constexpr (kFirst) {
      y[i] = y0;
      after_x[2 * i] = x[i], after_x[2 * i + 1] = before_x[2 * i];
    } else {
      y[i] += y0;
    }
  }
}

template <class E>
FASTKIT_INLINE void widen_all(const E* from, Arithmetic<E>* to, int n) {
  int i = 0;
  for (; i + kLanes<E> <= n; i += kLanes<E>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widened<E>(from[i]);
}

template <class E>
FASTKIT_INLINE void round_all(const Arithmetic<E>* from, E* to, int n) {
  int i = 0;
  for (; i + kLanes<E> <= n; i += kLanes<E>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = rounded<E>(from[i]);
}

// n <= kBlock rows from (batch, channel) on, all of one batch entry.
template <class E, bool kNumerator>
void block(const IirStep<E>& p, int64_t batch, int64_t channel, int n) {
  using T = Arithmetic<E>;
  const int64_t row = batch * p.channels + channel, filters = p.filters;
  T wide_x[kBlock], wide_y[kBlock], copy_a[2 * kBlock], copy_b[3 * kBlock], copy_y[2 * kBlock], copy_after[2 * kBlock];
  const T* x = wide_x;
  T* y = wide_y;
  if constexpr (IsSame<E, T>) {
    x = p.x + row, y = p.y + row;
  } else {
    widen_all(p.x + row, wide_x, n);
  }
  const T* before_x = p.state_x + 2 * row;
  for (int64_t f = 0; f < filters; ++f) {
    const T* a = dense<T, 2>(p.a.at(batch, channel) + f * p.a.filter, p.a.channel, p.a.tap, n, copy_a);
    const T* b = nullptr;
    if constexpr (kNumerator) {
      b = dense<T, 3>(p.b.at(batch, channel) + f * p.b.filter, p.b.channel, p.b.tap, n, copy_b);
    }
    const T* before_y = dense<T, 2>(p.state_y + 2 * (row * filters + f), 2 * filters, 1, n, copy_y);
    T* after_y = filters == 1 ? p.end_y + 2 * row : copy_after;
    if (f == 0) {
      filter<T, kNumerator, true>(n, x, a, b, before_y, before_x, y, after_y, p.end_x + 2 * row);
    } else {
      filter<T, kNumerator, false>(n, x, a, b, before_y, before_x, y, after_y, p.end_x + 2 * row);
    }
    if (filters > 1) {
      T* end = p.end_y + 2 * (row * filters + f);
      for (int i = 0; i < n; ++i) end[2 * filters * i] = after_y[2 * i], end[2 * filters * i + 1] = after_y[2 * i + 1];
    }
  }
  if constexpr (!IsSame<E, T>) round_all(wide_y, p.y + row, n);
}

template <class E>
void step(const IirStep<E>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  while (begin < end) {
    const int64_t batch = begin / p.channels, channel = begin % p.channels, rest = p.channels - channel;
    const int64_t here = end - begin < rest ? end - begin : rest;
    const int n = here < kBlock ? static_cast<int>(here) : kBlock;
    if (p.b.data != nullptr) {
      block<E, true>(p, batch, channel, n);
    } else {
      block<E, false>(p, batch, channel, n);
    }
    begin += n;
  }
}

}  // namespace

const IirStepKernels iir_step_kernels = {step<float>, step<double>, step<BFloat16>, step<Half>};

}  // namespace fastkit::FASTKIT_ISA
