// iir_scan where every sample has a filter of its own, history is carried on, and time has stride 1.
//
// What       forward and backward of a second-order recursion, coefficients per (row, sample).
// Parallel   a unit is kRows rows, walked side by side in scalars, a sample of each at a time: the arithmetic of one
//            fills the latency of the other. Vectors would have 7 arrays to transpose for 5 multiply-adds, from as
//            many places in memory as they have lanes; two rows are few enough for the hardware's own prefetch.
// Bytes      per fp32 sample: forward reads x, a, b, writes y (28, without b 16). Backward reads gy, x, y, a, b,
//            writes gx and the gradients of a and b (56, without b 28). Results go through a tile in the first-level
//            cache; where the signal is larger than the caches, lines that they fill whole are streamed from there.
// Numerics   y = (u - a2 y2) - a1 y1: one FMA of latency a sample. Nothing is summed over time.
// Backward   transposed form, from the end: l = gy + s1, s1 = s2 - a1 l, s2 = -a2 l, and likewise
//            gx = b0 l + r1, r1 = r2 + b1 l, r2 = b2 l: a sample uses its own coefficients alone.
#define FASTKIT_HALF_VECTORS  // of the tiles' way to memory alone
#include "cpu/iir_scan_kernels.h"
#include "cpu/iir_scan_row.h"
#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kRows = 2;
template <class T>
constexpr int kTile = 2048 / sizeof(T);  // samples; results go to memory in runs of so many

// The rows of a unit: of all (b, c), or, packed, of the channels of one sequence.
template <class E>
struct Unit {
  Row<E> rows[kRows];
  int count;
  Span span;  // of all its rows

  Unit(const IirScan<E>& p, int64_t unit) {
    const bool packed = p.offsets != nullptr;
    const int64_t all = packed ? p.channels : p.batch * p.channels, units = (all + kRows - 1) / kRows;
    const int64_t first = (packed ? unit % units : unit) * kRows;
    count = static_cast<int>(all - first < kRows ? all - first : kRows);
    for (int i = 0; i < count; ++i) {
      rows[i] = {p, packed ? unit / units : (first + i) / p.channels, packed ? first + i : (first + i) % p.channels};
    }
    span = rows[0].span;
  }

  static int64_t units(const IirScan<E>& p) {
    if (p.offsets != nullptr) return p.batch * ((p.channels + kRows - 1) / kRows);
    return (p.batch * p.channels + kRows - 1) / kRows;
  }
};

// A tile's results to where they belong.
template <class E>
FASTKIT_INLINE void write(E* to, const Arithmetic<E>* from, int n, bool streams) {
  constexpr int W = kLanes<E>, L = kLine<E>;
  const int head = static_cast<int>(-reinterpret_cast<uintptr_t>(to) % kLineBytes / sizeof(E));
  int i = 0;
  if (streams && head <= n) {
    for (; i < head; ++i) to[i] = rounded<E>(from[i]);
    for (; i + L <= n; i += L) {
      for (int j = 0; j < L; j += W) stream(to + i + j, load(from + i + j));
    }
  }
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = rounded<E>(from[i]);
}

template <class E, bool kNumerator, int R>
void forward_rows(const IirScanForward<E>& p, const Unit<E>& unit) {
  using T = Arithmetic<E>;
  const Span& span = unit.span;
  const E* x[R];
  E* y[R];
  const T *a[R], *b[R];
  Two<T> before_x[R], before_y[R];
  for (int i = 0; i < R; ++i) {
    const Row<E>& row = unit.rows[i];
    x[i] = row.point(p.x), y[i] = row.point(p.y);
    a[i] = row.point(p.a), b[i] = row.point(p.b);
    before_x[i] = row.state(p.state_x), before_y[i] = row.state(p.state_y);
  }
  const int64_t a_step = p.a.chunk, a_tap = p.a.tap, b_step = p.b.chunk, b_tap = p.b.tap;
  alignas(kLineBytes) T tile[R][kTile<T>];
  for (int64_t t = 0; t < span.time; t += kTile<T>) {
    const int n = static_cast<int>(span.time - t < kTile<T> ? span.time - t : kTile<T>);
    for (int s = 0; s < n; ++s) {
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const Two<T> dx = before_x[i], dy = before_y[i];
        const T* at = a[i] + (t + s) * a_step;
        const T x0 = widened<E>(x[i][t + s]);
        T u = x0;
        if constexpr (kNumerator) {
          const T* bt = b[i] + (t + s) * b_step;
          u = fma_one(bt[0], x0, fma_one(bt[b_tap], dx.v1, bt[2 * b_tap] * dx.v2));
        }
        const T y0 = fnma_one(at[0], dy.v1, fnma_one(at[a_tap], dy.v2, u));
        tile[i][s] = y0;
        before_x[i] = {x0, dx.v1}, before_y[i] = {y0, dy.v1};
      }
    }
    for (int i = 0; i < R; ++i) write<E>(y[i] + t, tile[i], n, p.stream);
  }
  for (int i = 0; i < R; ++i) {
    unit.rows[i].put_state(p.end_x, before_x[i].v1, before_x[i].v2);
    unit.rows[i].put_state(p.end_y, before_y[i].v1, before_y[i].v2);
  }
}

// l of samples [t, t + n) of R rows, from the last to the first; s is what is owed to gy of sample t + n - 1 and of
// the one before it, and becomes that of sample t - 1.
template <class E, int R>
FASTKIT_INLINE void adjoint(const E* const (&gy)[R], const Arithmetic<E>* const (&a)[R], int64_t step, int64_t tap,
                            int64_t t, int n, Two<Arithmetic<E>> (&s)[R], Arithmetic<E> (&l)[R][kTile<Arithmetic<E>>]) {
  using T = Arithmetic<E>;
  T now[R], next[R], last[R]{}, a1[R]{};  // s.v1 is now - a1 last: one FMA of latency a sample
  for (int i = 0; i < R; ++i) now[i] = s[i].v1, next[i] = s[i].v2;
  for (int q = n - 1; q >= 0; --q) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const T* at = a[i] + (t + q) * step;
      const T l0 = fnma_one(a1[i], last[i], widened<E>(gy[i][t + q]) + now[i]);
      l[i][q] = l0;
      now[i] = next[i], next[i] = -at[tap] * l0, last[i] = l0, a1[i] = at[0];
    }
  }
  for (int i = 0; i < R; ++i) s[i] = {fnma_one(a1[i], last[i], now[i]), next[i]};
}

// gx from l of n samples, whose numerators start at b (null: 1); r is owed to gx as s is to gy.
template <class T>
FASTKIT_INLINE void numerator_adjoint(const T* l, const T* b, int64_t step, int64_t tap, int n, Two<T>& r, T* gx) {
  if (b == nullptr) {
    for (int q = 0; q < n; ++q) gx[q] = l[q];
    gx[n - 1] += r.v1;
    if (n > 1) gx[n - 2] += r.v2;
    r = {n > 1 ? T{} : r.v2, T{}};
    return;
  }
  T now = r.v1, next = r.v2;
  for (int q = n - 1; q >= 0; --q) {
    const T* at = b + q * step;
    gx[q] = fma_one(at[0], l[q], now);
    now = fma_one(at[tap], l[q], next), next = at[2 * tap] * l[q];
  }
  r = {now, next};
}

// Samples [t - 2, t + n) of a signal, those before the first being its state.
template <class E>
FASTKIT_INLINE void read(const E* signal, Two<Arithmetic<E>> state, int64_t t, int n, Arithmetic<E>* to) {
  to[0] = t < 2 ? state.v2 : widened<E>(signal[t - 2]), to[1] = t < 1 ? state.v1 : widened<E>(signal[t - 1]);
  constexpr int W = kLanes<E>;
  int q = 0;
  for (; q + W <= n; q += W) store(to + 2 + q, load(signal + t + q));
  for (; q < n; ++q) to[2 + q] = widened<E>(signal[t + q]);
}

template <class E, bool kNumerator, bool kGradients, int R>
void backward_rows(const IirScanBackward<E>& p, const Unit<E>& unit) {
  using T = Arithmetic<E>;
  const Span& span = unit.span;
  const E* gy[R];
  const T* a[R];
  Two<T> s[R], r[R];
  for (int i = 0; i < R; ++i) {
    const Row<E>& row = unit.rows[i];
    gy[i] = row.point(p.gy), a[i] = row.point(p.a);
    s[i] = row.state(p.gend_y), r[i] = row.state(p.gend_x);
  }
  alignas(kLineBytes) T l[R][kTile<T>], gx[kTile<T>], signal[kTile<T> + 2], ga[2 * kTile<T>], gb[3 * kTile<T>];
  const int64_t tiles = (span.time + kTile<T> - 1) / kTile<T>;
  for (int64_t t = (tiles - 1) * kTile<T>; t >= 0; t -= kTile<T>) {
    const int n = static_cast<int>(span.time - t < kTile<T> ? span.time - t : kTile<T>);
    adjoint<E, R>(gy, a, p.a.chunk, p.a.tap, t, n, s, l);
    for (int i = 0; i < R; ++i) {
      const Row<E>& row = unit.rows[i];
      if (p.gx.data != nullptr || p.gstate_x != nullptr) {
        const T* b = kNumerator ? row.point(p.b) + t * p.b.chunk : nullptr;
        numerator_adjoint<T>(l[i], b, p.b.chunk, p.b.tap, n, r[i], gx);
      }
      if (E* to = row.point(p.gx)) write<E>(to + t, gx, n, p.stream);
      if constexpr (kGradients) {
        read<E>(row.point(p.y), row.state(p.state_y), t, n, signal);
        for (int q = 0; q < n; ++q) ga[2 * q] = -l[i][q] * signal[q + 1], ga[2 * q + 1] = -l[i][q] * signal[q];
        write<T>(row.point(p.ga, 2) + 2 * t, ga, 2 * n, p.stream);
      }
      if constexpr (kGradients && kNumerator) {
        read<E>(row.point(p.x), row.state(p.state_x), t, n, signal);
        for (int q = 0; q < n; ++q) {
          for (int j = 0; j < 3; ++j) gb[3 * q + j] = l[i][q] * signal[q + 2 - j];
        }
        write<T>(row.point(p.gb, 3) + 3 * t, gb, 3 * n, p.stream);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    unit.rows[i].put_state(p.gstate_y, s[i].v1, s[i].v2);
    unit.rows[i].put_state(p.gstate_x, r[i].v1, r[i].v2);
  }
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Unit<E> unit(p, index);
    with_flag(p.b.data != nullptr, [&](auto numerator) {
      with_flag(unit.count == kRows, [&](auto full) {
        forward_rows<E, numerator.value, full.value ? kRows : 1>(p, unit);
      });
    });
  }
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Unit<E> unit(p, index);
    with_flag(p.b.data != nullptr, [&](auto numerator) {
      with_flag(p.ga != nullptr, [&](auto gradients) {
        with_flag(unit.count == kRows, [&](auto full) {
          backward_rows<E, numerator.value, gradients.value, full.value ? kRows : 1>(p, unit);
        });
      });
    });
  }
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {Unit<E>::units, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_samples = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
