// iir_scan where time has stride 1.
//
// What       forward and backward of a second-order recursion, coefficients per (row, chunk).
// Parallel   a unit is kLanes rows, one per lane; the recursion runs along time, kLanes samples of every row at
//            a time (a square that is transposed in registers), threads take different units.
// Bytes      per fp32 sample: forward reads x, writes y (8); backward reads gy, x, y, writes gx (16, without b
//            12). Results larger than the caches are streamed; inputs are prefetched some squares ahead.
// Numerics   y = (u - a2 y2) - a1 y1: one FMA of latency a sample. Coefficient gradients: fp32 sums over at
//            most kSegment samples of one lane-wide vector, double beyond.
// Backward   l[t] = gy[t] - a1[t+1] l[t+1] - a2[t+2] l[t+2] runs in lanes from the end of a segment and is
//            transposed back into a small buffer; then, row by row and along time, gx and the coefficient sums
//            are read off l, and l shifted by 1 and 2. Inside a chunk its own coefficients rule; what crosses
//            into the chunk before it (carry) is handed over in two terms, for its last and last but one sample.
#define FASTKIT_HALF_VECTORS  // and 8 rows at a power-of-two distance still fit a set of the first-level cache
#include "cpu/iir_scan_kernels.h"
#include "cpu/iir_scan_lanes.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kSegment = 128;      // samples of backward's buffer
constexpr int kAhead = 8;          // lines between a read and its prefetch, forward
constexpr int kBehind = kSegment;  // samples between them, backward

template <class T>
struct Taps {
  Vec<T> a1, a2, b0, b1, b2;

  template <class E>
  Taps(const IirScan<E>& p, const Lanes<E>& lanes, int64_t k) {
    a1 = lanes.gather(p.a, k, 0);
    a2 = lanes.gather(p.a, k, 1);
    b0 = b1 = b2 = Vec<T>{};
    if (p.b.data != nullptr) {
      b0 = lanes.gather(p.b, k, 0);
      b1 = lanes.gather(p.b, k, 1);
      b2 = lanes.gather(p.b, k, 2);
    }
  }
};

template <class T>
struct History {
  Vec<T> x1{}, x2{}, y1{}, y2{};
};

// n steps over a square in place: x in, y out.
template <class T, bool kNumerator>
FASTKIT_INLINE void recur(Vec<T> (&v)[kLanes<T>], History<T>& h, const Taps<T>& c, int n) {
#pragma GCC unroll 16
  for (int s = 0; s < kLanes<T>; ++s) {
    if (s >= n) break;
    Vec<T> x0 = v[s], u = x0;
    if constexpr (kNumerator) u = c.b0 * x0 + (c.b1 * h.x1 + c.b2 * h.x2);
    Vec<T> y0 = (u - c.a2 * h.y2) - c.a1 * h.y1;
    v[s] = y0;
    h.x2 = h.x1, h.x1 = x0, h.y2 = h.y1, h.y1 = y0;
  }
}

template <class E, bool kNumerator>
void forward_unit(const IirScanForward<E>& p, int64_t unit) {
  using T = Arithmetic<E>;
  constexpr int W = kLanes<E>, L = kLine<E>, P = L / W;  // P squares make a line of every row
  const Lanes<E> lanes(p, unit);
  const Span& span = lanes.span;
  const E* x[W];
  E* y[W];
  lanes.point(x, p.x);
  lanes.point(y, p.y);
  bool streams = p.stream;
  for (int i = 0; i < W; ++i) streams = streams && on_line(y[i]);

  History<T> h;
  h.y1 = lanes.gather(p, p.state_y, 0), h.y2 = lanes.gather(p, p.state_y, 1);
  h.x1 = lanes.gather(p, p.state_x, 0), h.x2 = lanes.gather(p, p.state_x, 1);
  for (int64_t k = 0; k < span.chunks; ++k) {
    const Taps<T> c(p, lanes, k);
    if (!p.carry && k > 0) h = History<T>{};
    int64_t t = k * p.chunk, end = t + p.chunk < span.time ? t + p.chunk : span.time;
    for (; t + L <= end; t += L) {
      Vec<E> out[P][W];
#pragma GCC unroll 4
      for (int j = 0; j < P; ++j) {
        load_square<E>(out[j], x, t + j * W, W);
        recur<T, kNumerator>(out[j], h, c, W);
        transpose<T>(out[j]);
      }
      if (lanes.count == W && streams && t % L == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          for (int j = 0; j < P; ++j) stream(y[i] + t + j * W, out[j][i]);
          prefetch(x[i] + t + kAhead * L);
        }
      } else {
        for (int i = 0; i < lanes.count; ++i) {
          for (int j = 0; j < P; ++j) store(y[i] + t + j * W, out[j][i]);
        }
      }
    }
    for (; t < end; t += W) {
      int n = static_cast<int>(end - t < W ? end - t : W);
      Vec<E> v[W];
      load_square<E>(v, x, t, n);
      recur<T, kNumerator>(v, h, c, n);
      transpose<T>(v);
      for (int i = 0; i < lanes.count; ++i) store(y[i] + t, v[i], n);
    }
  }
  lanes.scatter(p, p.end_y, 0, h.y1), lanes.scatter(p, p.end_y, 1, h.y2);
  lanes.scatter(p, p.end_x, 0, h.x1), lanes.scatter(p, p.end_x, 1, h.x2);
}

template <class E, bool kNumerator>
class Backward {
  using T = Arithmetic<E>;
  static constexpr int W = kLanes<E>, L = kLine<E>;
  static constexpr int kPitch = kSegment + L;  // not a power of two: lanes fall into different cache sets

 public:
  Backward(const IirScanBackward<E>& p, int64_t unit)
      : p_(p), lanes_(p, unit), span_(lanes_.span), writes_(p.gx.data != nullptr), sums_(p.ga != nullptr) {
    lanes_.point(gy_, p.gy);
    lanes_.point(gx_, p.gx);
    lanes_.point(x_, p.x);
    lanes_.point(y_, p.y);
    streams_ = p.stream && writes_ && (p.chunks == 1 || p.chunk % L == 0);
    for (int i = 0; i < W; ++i) streams_ = streams_ && on_line(gx_[i]);
  }

  void run() {
    g1_ = lanes_.gather(p_, p_.gend_y, 0), g2_ = lanes_.gather(p_, p_.gend_y, 1);
    e1_ = lanes_.gather(p_, p_.gend_x, 0), e2_ = lanes_.gather(p_, p_.gend_x, 1);
    for (int64_t k = span_.chunks; k-- > 0;) chunk(k);
    lanes_.scatter(p_, p_.gstate_y, 0, g1_), lanes_.scatter(p_, p_.gstate_y, 1, g2_);
    lanes_.scatter(p_, p_.gstate_x, 0, e1_), lanes_.scatter(p_, p_.gstate_x, 1, e2_);
  }

 private:
  void chunk(int64_t k) {
    const Taps<T> c(p_, lanes_, k);
    const int64_t begin = k * p_.chunk, end = begin + p_.chunk < span_.time ? begin + p_.chunk : span_.time;
    if (!p_.carry && k + 1 < span_.chunks) g1_ = g2_ = e1_ = e2_ = Vec<T>{};
    if (begin == end) return;  // a sequence without samples
    l1_ = l2_ = Vec<T>{};
    for (auto& sum : total_) {
      for (double& lane : sum) lane = 0;
    }
    for (int64_t t = begin + (end - begin - 1) / kSegment * kSegment; t >= begin; t -= kSegment) {
      const int n = static_cast<int>(end - t < kSegment ? end - t : kSegment);
      adjoint(c, t, n);
      read_off(c, t, n);
    }
    if (sums_) write_sums(k, begin);
    g1_ += -c.a1 * l1_ - c.a2 * l2_, g2_ = -c.a2 * l1_;
    if constexpr (kNumerator) e1_ += c.b1 * l1_ + c.b2 * l2_, e2_ = c.b2 * l1_;
  }

  // buffer_[row][i] = l[t + i] for i < n + 2; samples past the chunk's end count as zero.
  void adjoint(const Taps<T>& c, int64_t t, int n) {
    Vec<T> l1 = l1_, l2 = l2_;
    alignas(kLineBytes) T after[2][W];
    store(after[0], l1), store(after[1], l2);
    for (int i = 0; i < W; ++i) buffer_[i][n] = after[0][i], buffer_[i][n + 1] = after[1][i];
    auto step = [&](Vec<T> g) __attribute__((always_inline)) {
      const Vec<T> l0 = (g - c.a2 * l2) - c.a1 * l1;
      l2 = l1, l1 = l0;
      return l0;
    };
    for (int s = (n - 1) / W * W; s >= 0; s -= W) {
      const int m = n - s < W ? n - s : W;
      Vec<E> v[W];
      load_square<E>(v, gy_, t + s, m);
      if (m == W) {
        v[W - 1] += g1_, v[W - 2] += g2_;
        g1_ = g2_ = Vec<T>{};
#pragma GCC unroll 16
        for (int i = W - 1; i >= 0; --i) v[i] = step(v[i]);
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(buffer_[i] + s, v[i]);
      } else {
        for (int i = m - 1; i >= 0; --i) {
          v[i] = step(v[i] + g1_);
          g1_ = g2_, g2_ = Vec<T>{};
        }
        transpose<T>(v);
        for (int i = 0; i < W; ++i) store(buffer_[i] + s, v[i], m);
      }
    }
    l1_ = l1, l2_ = l2;
  }

  // gx and the coefficient sums of samples [t, t + n), row by row.
  void read_off(const Taps<T>& c, int64_t t, int n) {
    const int full = n / W * W;
    Vec<T> sum[kSums][W] = {};
    T edge[W][2 * W] = {};  // of each row: e2, e1 for its last two samples, at W - 1 and W
    const bool owes = kNumerator || p_.gend_x != nullptr;
    if (owes) {
      for (int i = 0; i < W; ++i) edge[i][W - 1] = e2_[i], edge[i][W] = e1_[i];
    }
    for (int i = 0; i < lanes_.count; ++i) {
      const T* l = buffer_[i];
      const E *gy = gy_[i] + t, *x = x_[i] + t, *y = y_[i] + t;
      const T b0 = c.b0[i], b1 = c.b1[i], b2 = c.b2[i];
      E* gx = writes_ ? gx_[i] + t : nullptr;
      Vec<T> a1{}, a2{}, s0{}, s1{}, s2{};
      for (int s = 0; s < full; s += W) {
        Vec<T> l0 = load(l + s), l1 = load(l + s + 1), l2 = load(l + s + 2);
        if (writes_) {
          Vec<T> g = kNumerator ? b0 * l0 + (b1 * l1 + b2 * l2) : l0;
          if (owes && s + W + 1 >= n) g += load(edge[i] + W + 1 + s - n);
          if (streams_) {
            stream(gx + s, g);
          } else {
            store(gx + s, g);
          }
        }
        if (sums_) {
          Vec<T> y0 = load(y + s);
          a1 += l1 * y0, a2 += l2 * y0;
          if constexpr (kNumerator) {
            Vec<T> x0 = load(x + s);
            s0 += l0 * x0, s1 += l1 * x0, s2 += l2 * x0;
          }
        }
        if (streams_ && s % L == 0) {
          prefetch(gy + s - kBehind);
          if (sums_) prefetch(y + s - kBehind);
          if (kNumerator && sums_) prefetch(x + s - kBehind);
        }
      }
      for (int s = full; s < n; ++s) {
        if (writes_) {
          const T g = kNumerator ? b0 * l[s] + (b1 * l[s + 1] + b2 * l[s + 2]) : l[s];
          gx[s] = rounded<E>(g + edge[i][W + 1 + s - n]);
        }
        if (sums_) {
          const T y0 = widened(y[s]);
          a1[0] += l[s + 1] * y0, a2[0] += l[s + 2] * y0;
          if constexpr (kNumerator) {
            const T x0 = widened(x[s]);
            s0[0] += l[s] * x0, s1[0] += l[s + 1] * x0, s2[0] += l[s + 2] * x0;
          }
        }
      }
      sum[0][i] = a1, sum[1][i] = a2;
      if constexpr (kNumerator) sum[2][i] = s0, sum[3][i] = s1, sum[4][i] = s2;
    }
    e1_ = n > 1 ? Vec<T>{} : e2_, e2_ = Vec<T>{};
    if (!sums_) return;
    for (int q = 0; q < kSums; ++q) add(q, sum_each<T>(sum[q]));
  }

  void add(int q, Vec<T> rows) {
    alignas(kLineBytes) T values[W];
    store(values, rows);
    for (int i = 0; i < W; ++i) total_[q][i] += values[i];
  }

  // A signal some samples before t, which may lie before the first: in the state.
  Vec<T> before(const E* const (&rows)[W], const T* states, int64_t t, int lag) const {
    if (t < lag) return lanes_.gather(p_, states, lag - 1 - static_cast<int>(t));
    alignas(kLineBytes) T values[W];
    for (int i = 0; i < W; ++i) values[i] = widened(rows[i][t - lag]);
    return load(values);
  }

  // The products of this chunk's first samples with the history before it, then the results.
  void write_sums(int64_t k, int64_t begin) {
    if (p_.carry || k == 0) {
      const Vec<T> y1 = before(y_, p_.state_y, begin, 1), y2 = before(y_, p_.state_y, begin, 2);
      add(0, l1_ * y1), add(1, l1_ * y2 + l2_ * y1);
      if constexpr (kNumerator) {
        const Vec<T> x1 = before(x_, p_.state_x, begin, 1), x2 = before(x_, p_.state_x, begin, 2);
        add(3, l1_ * x1), add(4, l1_ * x2 + l2_ * x1);
      }
    }
    T values[kSums][W];
    for (int q = 0; q < kSums; ++q) {
      for (int i = 0; i < W; ++i) values[q][i] = static_cast<T>(q < 2 ? -total_[q][i] : total_[q][i]);
    }
    for (int i = 0; i < lanes_.count; ++i) {
      const int64_t at = p_.row(lanes_.batch[i], lanes_.channel[i]) * p_.chunks + span_.first_chunk + k;
      for (int q = 0; q < 2; ++q) p_.ga[2 * at + q] = values[q][i];
      if constexpr (kNumerator) {
        for (int q = 0; q < 3; ++q) p_.gb[3 * at + q] = values[2 + q][i];
      }
    }
  }

  static constexpr int kSums = kNumerator ? 5 : 2;

  const IirScanBackward<E>& p_;
  const Lanes<E> lanes_;
  const Span& span_;
  const bool writes_, sums_;
  bool streams_;
  const E *gy_[W], *x_[W], *y_[W];
  E* gx_[W];
  Vec<T> l1_{}, l2_{};  // l of the two samples after the present one, zero past the chunk's end
  Vec<T> g1_{}, g2_{};  // owed to gy of the present sample and the one before it, by the chunks after
  Vec<T> e1_{}, e2_{};  // likewise to gx
  double total_[kSums][W];
  alignas(kLineBytes) T buffer_[W][kPitch];
};

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    for (int64_t unit = begin; unit < end; ++unit) forward_unit<E, numerator.value>(p, unit);
  });
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    for (int64_t unit = begin; unit < end; ++unit) Backward<E, numerator.value>(p, unit).run();
  });
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {Lanes<E>::units, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_rows = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
