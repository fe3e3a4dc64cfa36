// Rows in the lanes of vectors: which rows a unit has, and squares of samples. Included by kernels of either width.
#pragma once

#include "cpu/simd.h"
#include "fastkit/iir_scan.h"

namespace fastkit::FASTKIT_ISA {
inline namespace FASTKIT_WIDTH {

// The rows of one unit: kLanes in a row of all (b, c), or, packed, of the channels of one sequence.
template <class E>
struct Lanes {
  using T = Arithmetic<E>;
  static constexpr int W = kLanes<E>;
  int64_t batch[W], channel[W];
  int count;
  Span span;

  Lanes(const IirScan<E>& p, int64_t unit) {
    const bool packed = p.offsets != nullptr;
    const int64_t rows = packed ? p.channels : p.batch * p.channels, blocks = (rows + W - 1) / W;
    const int64_t sequence = packed ? unit / blocks : 0, first = (packed ? unit % blocks : unit) * W;
    count = static_cast<int>(rows - first < W ? rows - first : W);
    for (int i = 0; i < W; ++i) {
      const int64_t row = first + (i < count ? i : count - 1);  // idle lanes repeat the last row
      batch[i] = packed ? sequence : row / p.channels;
      channel[i] = packed ? row : row % p.channels;
    }
    span = p.span(batch[0]);
  }

  static int64_t units(const IirScan<E>& p) {
    if (p.offsets != nullptr) return p.batch * ((p.channels + W - 1) / W);
    return (p.batch * p.channels + W - 1) / W;
  }

  // The rows' first samples of the span.
  template <class U>
  void point(U* (&rows)[W], const Signal<U>& signal) const {
    for (int i = 0; i < W; ++i) {
      rows[i] = signal.data == nullptr ? nullptr : signal.at(batch[i], channel[i]) + span.begin * signal.time;
    }
  }

  // Chunk k of the span.
  Vec<T> gather(const Coefficients<T>& c, int64_t k, int tap, int64_t filter = 0) const {
    const int64_t offset = (span.first_chunk + k) * c.chunk + filter * c.filter + tap * c.tap;
    alignas(kLineBytes) T values[W];
    for (int i = 0; i < W; ++i) values[i] = c.at(batch[i], channel[i])[offset];
    return load(values);
  }

  // Entry `which` of 2 of dense (batch, C, F, 2) states: zero where there are none.
  Vec<T> gather(const IirScan<E>& p, const T* states, int which, int64_t filters = 1, int64_t filter = 0) const {
    if (states == nullptr) return Vec<T>{};
    alignas(kLineBytes) T values[W];
    for (int i = 0; i < W; ++i) {
      values[i] = states[((batch[i] * p.channels + channel[i]) * filters + filter) * 2 + which];
    }
    return load(values);
  }

  void scatter(const IirScan<E>& p, T* states, int which, Vec<T> v, int64_t filters = 1, int64_t filter = 0) const {
    if (states == nullptr) return;
    alignas(kLineBytes) T values[W];
    store(values, v);
    for (int i = 0; i < count; ++i) {
      states[((batch[i] * p.channels + channel[i]) * filters + filter) * 2 + which] = values[i];
    }
  }
};

// Columns [t, t + W) of the rows, n <= W of them there, as W vectors over lanes.
template <class E>
FASTKIT_INLINE void load_square(Vec<E> (&v)[kLanes<E>], const E* const (&rows)[kLanes<E>], int64_t t, int n) {
  if (n == kLanes<E>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<E>; ++i) v[i] = load(rows[i] + t);
  } else {
    for (int i = 0; i < kLanes<E>; ++i) v[i] = load(rows[i] + t, n);
  }
  transpose<Arithmetic<E>>(v);
}

}  // namespace FASTKIT_WIDTH
}  // namespace fastkit::FASTKIT_ISA
