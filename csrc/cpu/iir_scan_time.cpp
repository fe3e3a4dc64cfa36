// iir_scan where time has stride 1 and rows are fewer than lanes: long signals.
//
// What       forward and backward of a second-order recursion, coefficients per (row, chunk).
// Parallel   a unit is one row. Inside a chunk a tile of kLanes segments, at most kSegment samples each, is walked
//            at once, a segment in each lane: what enters a segment is known before it is walked. Threads take
//            different rows.
// Bytes      per fp32 sample: forward reads x, writes y (8); backward reads gy, x, y, writes gx (16, without b
//            12). Results larger than the caches are streamed. A tile is read twice, from memory and from L1.
// Numerics   With h the impulse response of 1 / A: the last two results of a segment, were nothing before it, are
//            its products with h; what is owed to the next segment's first two samples then follows from what was
//            owed to its own, in double, from segment to segment and tile to tile. Every segment is then the plain
//            recursion y = (u - a2 y2) - a1 y1, one FMA of latency a sample. Coefficient gradients: fp32 sums over
//            at most kSegment samples of one lane-wide vector, double beyond.
// Backward   l = gy / A reversed is the same walk from the end, into a buffer; then, along time, gx and the
//            coefficient sums are read off l, and l shifted by 1 and 2. Inside a chunk its own coefficients rule;
//            what crosses into the chunk before it (carry) is handed over in two terms, for its last and last but
//            one sample.
// Bad input  A result that is not finite is followed by such results only. A tile with such a segment is walked once
//            more, sample by sample: inf and NaN appear where the plain recursion has them, also where it would
//            overflow in between, or h, or a product with h, before it does.
#define FASTKIT_HALF_VECTORS  // shuffles are half of the work
#include "cpu/iir_scan_kernels.h"
#include "cpu/iir_scan_row.h"
#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

template <class T>
constexpr int kSegment = 512 / sizeof(T);  // samples of a segment, at most
constexpr int kLeast = 8;                  // and at least

template <class T>
struct Taps {
  T a1, a2, b0 = 1, b1 = 0, b2 = 0;
};

// What earlier samples add to the next sample and to the one after it.
struct Owed {
  double now = 0, next = 0;
};

template <class T>
FASTKIT_INLINE bool finite(T value) {
  return value - value == 0;
}

template <class T>
FASTKIT_INLINE bool finite(Two<double> end, Vec<T> ends) {
  ends -= ends;
  double zero = end.v1 - end.v1 + (end.v2 - end.v2);
  for (int i = 0; i < kLanes<T>; ++i) zero += ends[i];
  return zero == 0;
}

#ifdef __aarch64__
// The sum of two doubles, the second what rounding to the first leaves. long double is a function call an operation
// here, or no more than double.
struct Pair {
  double high = 0, low = 0;

  FASTKIT_ALWAYS_INLINE Pair() {}
  FASTKIT_ALWAYS_INLINE Pair(double value) : high(value) {}
  FASTKIT_ALWAYS_INLINE Pair(double large, double small) : high(large + small), low(small - (high - large)) {}
  FASTKIT_ALWAYS_INLINE explicit operator double() const { return high; }
};
FASTKIT_INLINE Pair operator-(Pair a) {
  a.high = -a.high, a.low = -a.low;
  return a;
}
FASTKIT_INLINE Pair operator+(Pair a, Pair b) {
  const double sum = a.high + b.high, of_b = sum - a.high;
  return {sum, (a.high - (sum - of_b)) + (b.high - of_b) + (a.low + b.low)};
}
FASTKIT_INLINE Pair operator-(Pair a, Pair b) { return a + -b; }
FASTKIT_INLINE Pair operator*(Pair a, Pair b) {
  double product = a.high * b.high;
  asm("" : "+w"(product));  // rounded: not to be contracted with the sum that follows
  return {product, __builtin_fma(a.high, b.high, -product) + (a.high * b.low + a.low * b.high)};
}
using BeyondDouble = Pair;
#else
using BeyondDouble = long double;
#endif

// What h is computed in. h of poles near 1 magnifies its own rounding as n^2.
template <class T>
struct PreciseOf {
  using type = double;
};
template <>
struct PreciseOf<double> {
  using type = BeyondDouble;
};

template <class E>
FASTKIT_INLINE Row<E> row_of(const IirScan<E>& p, int64_t unit) {
  return {p, unit / p.channels, unit % p.channels};
}

template <class E>
FASTKIT_INLINE Taps<Arithmetic<E>> taps_of(const Row<E>& row, int64_t k) {
  using T = Arithmetic<E>;
  const Coefficients<T>&a = row.p->a, &b = row.p->b;
  const T* at = row.point(a) + k * a.chunk;
  Taps<T> c{at[0], at[a.tap]};
  if (b.data == nullptr) return c;
  at = row.point(b) + k * b.chunk;
  c.b0 = at[0], c.b1 = at[b.tap], c.b2 = at[2 * b.tap];
  return c;
}

// Samples of a segment when n are left: none if so few are left that they are better walked one by one.
template <class T>
FASTKIT_INLINE int segment(int64_t n) {
  constexpr int W = kLanes<T>;
  const int64_t s = n / (W * W) * W;
  return s < kLeast ? 0 : s < kSegment<T> ? static_cast<int>(s) : kSegment<T>;
}

// Samples before the first that p shares with the start of a line.
template <class E>
FASTKIT_INLINE int64_t to_line(const E* p) {
  return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(E)) & (kLine<E> - 1);
}

// What enters the segments of a tile. The signal is filtered by B / A (kNumerator) or 1 / A, from its end if kReverse.
//
// z1, z2 are a segment's last two results, were nothing before it, z2 the older. Not they are the products but z2 and
// z1 - rho z2, rho the mean of the poles: where the poles are close h grows as n, and errors of z1 and z2 that do not
// agree would grow along the next segment as the plain recursion's never do.
template <class E, bool kNumerator, bool kReverse>
class Segments {
  using T = Arithmetic<E>;
  static constexpr int W = kLanes<E>, kMost = kSegment<T>;

 public:
  // For segments of at most `length` samples.
  void prepare(const Taps<T>& taps, int length) {
    using Precise = typename PreciseOf<T>::type;
    c_ = taps, length_ = length;
    const Precise a1 = c_.a1, a2 = c_.a2;
    Precise response[2][kMost + 4], *const h = response[0] + 3, *const r = response[1] + 3;  // r[n] = h[n] - rho h[n-1]
    h[-3] = h[-2] = h[-1] = r[-2] = r[-1] = 0, h[0] = r[0] = 1, h[1] = -a1, r[1] = -a1 * 0.5;
    for (int n = 2; n < kLeast; ++n) {
      h[n] = -a1 * h[n - 1] - a2 * h[n - 2];
      r[n] = -a1 * r[n - 1] - a2 * r[n - 2];
    }
    for (int m = kLeast; m <= length; m *= 2) {  // h[m + i] = h[m] h[i] - a2 h[m-1] h[i-1], likewise r
      const Precise h1 = -a2 * h[m - 1], h0 = -a1 * h[m - 1] - a2 * h[m - 2];
      const Precise r1 = -a2 * r[m - 1], r0 = -a1 * r[m - 1] - a2 * r[m - 2];
      const int count = m <= length - m ? m : length - m + 1;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) {
        h[m + i] = h0 * h[i] + h1 * h[i - 1];
        r[m + i] = r0 * h[i] + r1 * h[i - 1];
      }
    }
    for (int n = 0; n < length; ++n) {
      const int i = kReverse ? n : length - 1 - n;
      older_[i] = static_cast<T>(through(h + n - 1));
      apart_[i] = static_cast<T>(through(r + n));
    }
    for (int n = -2; n <= length; ++n) h_[2 + n] = static_cast<double>(h[n]);
  }

  // The tile of W segments of n samples at x: `owed` to the first one walked becomes `now`, `next` owed to each,
  // `end` the last two results of the last one walked.
  void enter(const E* x, int n, Owed owed, Vec<T>& now, Vec<T>& next, Two<double>& end) const {
    const int from = kReverse ? 0 : length_ - n;
    alignas(kLineBytes) T older[W], apart[W], entering[2][W];
    products(x, n, older_ + from, apart_ + from, older, apart);
    const double* h = h_ + 2 + n;
    const double a1 = c_.a1, a2 = c_.a2, c11 = h[0], c12 = h[-1], c21 = -a2 * h[-1], c22 = -a2 * h[-2];
    for (int i = 0;; ++i) {
      const int j = kReverse ? W - 1 - i : i;
      const double z2 = older[j], z1 = apart[j] - a1 / 2 * z2;
      entering[0][j] = static_cast<T>(owed.now), entering[1][j] = static_cast<T>(owed.next);
      if (i == W - 1) {
        end.v1 = z1 + (h[-1] * owed.now + h[-2] * owed.next);
        end.v2 = z2 + (h[-2] * owed.now + h[-3] * owed.next);
        break;
      }
      Owed after{-a1 * z1 - a2 * z2, -a2 * z1};
      if constexpr (kNumerator) {
        const E* last = x + (j + 1) * n - 1;
        const T x1 = widened<E>(last[0]), x2 = widened<E>(last[-1]);
        after.now += c_.b1 * double{x1} + c_.b2 * double{x2}, after.next += c_.b2 * double{x1};
      }
      after.now += c12 * owed.next + c11 * owed.now, after.next += c22 * owed.next + c21 * owed.now;
      owed = after;
    }
    now = load(entering[0]), next = load(entering[1]);
  }

 private:
  template <class Precise>
  FASTKIT_ALWAYS_INLINE Precise through(const Precise* response) const {
    if constexpr (!kNumerator) return response[0];
    return c_.b0 * response[0] + (c_.b1 * response[-1] + c_.b2 * response[-2]);
  }

  // The products of each segment with the weights u and v.
  FASTKIT_INLINE void products(const E* x, int n, const T* u, const T* v, T (&with_u)[W], T (&with_v)[W]) {
    constexpr int K = W < 4 ? W : 4;  // segments at once
    Vec<T> sum_u[W], sum_v[W];
    for (int j = 0; j < W; j += K) {
      Vec<T> su[K]{}, sv[K]{};
      for (int s = 0; s < n; s += W) {
        const Vec<T> us = load(u + s), vs = load(v + s);
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i) {
          const E* at = x + (j + i) * n + s;
          const Vec<T> xs = load(at);
          if (s % kLine<E> == 0) prefetch(at + (kReverse ? -2 * W : 2 * W) * n);  // of a tile to come
          su[i] += xs * us, sv[i] += xs * vs;
        }
      }
      for (int i = 0; i < K; ++i) sum_u[j + i] = su[i], sum_v[j + i] = sv[i];
    }
    store(with_u, sum_each<T>(sum_u));
    store(with_v, sum_each<T>(sum_v));
  }

  Taps<T> c_;
  int length_;
  double h_[kMost + 3];
  alignas(kLineBytes) T older_[kMost], apart_[kMost];  // weights
};

template <class E, bool kNumerator>
class Forward {
  using T = Arithmetic<E>;
  static constexpr int W = kLanes<E>, L = kLine<E>, P = L / W;  // P squares make a line of every segment

 public:
  Forward(const IirScanForward<E>& p, int64_t unit)
      : p_(p), row_(row_of<E>(p, unit)), x_(row_.point(p.x)), y_(row_.point(p.y)) {}

  void run() {
    x1_ = row_.state(p_.state_x), written_ = row_.state(p_.state_y);
    exact_ = {written_.v1, written_.v2};
    const int64_t time = row_.span.time;
    for (int64_t k = 0; k < row_.span.chunks; ++k) {
      if (!p_.carry && k > 0) x1_ = written_ = {}, exact_ = {};
      const int64_t begin = k * p_.chunk;
      chunk(taps_of(row_, k), begin, p_.chunk < time - begin ? begin + p_.chunk : time);
    }
    row_.put_state(p_.end_y, written_.v1, written_.v2);
    row_.put_state(p_.end_x, x1_.v1, x1_.v2);
  }

 private:
  void chunk(const Taps<T>& c, int64_t t, int64_t end) {
    const int64_t head = p_.stream ? to_line(y_ + t) : 0;
    if (head > 0 && end - t - head >= W * kSegment<T>) one_by_one(c, t, head), t += head;
    int n = segment<T>(end - t);
    if (n > 0) segments_.prepare(c, n);
    for (; n > 0; n = segment<T>(end - t)) {
      tile(c, t, n);
      t += W * n;
    }
    one_by_one(c, t, end - t);
  }

  void tile(const Taps<T>& c, int64_t t, int n) {
    const Owed owed{c.b1 * double{x1_.v1} + c.b2 * double{x1_.v2} - c.a1 * exact_.v1 - c.a2 * exact_.v2,
                    c.b2 * double{x1_.v1} - c.a2 * exact_.v1};
    Vec<T> now, next;
    Two<double> end;
    segments_.enter(x_ + t, n, owed, now, next, end);
    const bool streams = p_.stream && n % L == 0 && on_line(y_ + t);
    const Two<Vec<T>> y = streams ? walk<P, true>(c, x_ + t, y_ + t, n, now, next)
                                  : walk<1, false>(c, x_ + t, y_ + t, n, now, next);
    if (!finite<T>(end, y.v1)) return one_by_one<true>(c, t, W * n);
    exact_ = end, written_ = {y.v1[W - 1], y.v2[W - 1]};
    const E* last = x_ + t + W * n - 1;
    x1_ = {widened<E>(last[0]), widened<E>(last[-1])};
  }

  // y of a tile, kSquares at a time; returns the segments' last two.
  template <int kSquares, bool kStream>
  FASTKIT_ALWAYS_INLINE Two<Vec<T>> walk(const Taps<T>& c, const E* x, E* y, int n, Vec<T> now, Vec<T> next) {
    const Vec<T> a1 = Vec<T>{} + c.a1, a2 = Vec<T>{} + c.a2;
    const Vec<T> b0 = Vec<T>{} + c.b0, b1 = Vec<T>{} + c.b1, b2 = Vec<T>{} + c.b2;
    Vec<T> y1{}, y2{};
    for (int s = 0; s < n; s += kSquares * W) {
      Vec<T> v[kSquares][W];
#pragma GCC unroll 4
      for (int q = 0; q < kSquares; ++q) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[q][i] = load(x + i * n + s + q * W);
        transpose<T>(v[q]);
        if constexpr (!kNumerator) v[q][0] += now, v[q][1] += next, now = next = Vec<T>{};
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const Vec<T> x0 = v[q][i];
          Vec<T> u = x0;
          if constexpr (kNumerator) u = b0 * x0 + now, now = next + b1 * x0, next = b2 * x0;
          v[q][i] = (u - a2 * y2) - a1 * y1;
          y2 = y1, y1 = v[q][i];
        }
        transpose<T>(v[q]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
#pragma GCC unroll 4
        for (int q = 0; q < kSquares; ++q) {
          if constexpr (kStream) {
            stream(y + i * n + s + q * W, v[q][i]);
          } else {
            if (s % L == 0) prefetch_near(y + (i + W) * n + s);  // of the next tile
            store(y + i * n + s + q * W, v[q][i]);
          }
        }
      }
    }
    return {y1, y2};
  }

  // kAgain: over a tile that has been walked, of which what is finite either way stays.
  template <bool kAgain = false>
  void one_by_one(const Taps<T>& c, int64_t t, int64_t n) {
    if (n == 0) return;
    T x1 = x1_.v1, x2 = x1_.v2, y1 = static_cast<T>(exact_.v1), y2 = static_cast<T>(exact_.v2), before = written_.v1;
    for (int64_t i = t; i < t + n; ++i) {
      const T x0 = widened<E>(x_[i]), u = kNumerator ? c.b0 * x0 + (c.b1 * x1 + c.b2 * x2) : x0;
      const T y0 = (u - c.a2 * y2) - c.a1 * y1;
      if (!kAgain || !finite(y0) || !finite(widened<E>(y_[i]))) y_[i] = rounded<E>(y0);
      x2 = x1, x1 = x0, y2 = y1, y1 = y0;
    }
    x1_ = {x1, x2}, exact_ = {y1, y2}, written_ = {y1, n > 1 ? y2 : before};
  }

  const IirScanForward<E>& p_;
  const Row<E> row_;
  const E* const x_;
  E* const y_;
  Two<T> x1_;         // x of the two samples before the present one
  Two<T> written_;    // y of them as they were written, but for the rounding to half precision
  Two<double> exact_;  // and more precisely
  Segments<E, kNumerator, false> segments_;
};

template <class E, bool kNumerator, bool kSum>
class Backward {
  using T = Arithmetic<E>;
  static constexpr int W = kLanes<E>, L = kLine<E>, kSums = kNumerator ? 5 : 2;
  static constexpr int kTile = W * kSegment<T>;
  typedef double Doubles __attribute__((vector_size(W * sizeof(double))));

 public:
  Backward(const IirScanBackward<E>& p, int64_t unit)
      : p_(p), row_(row_of<E>(p, unit)), gy_(row_.point(p.gy)), x_(row_.point(p.x)), y_(row_.point(p.y)),
        gx_(row_.point(p.gx)) {}

  void run() {
    const Two<T> gend_y = row_.state(p_.gend_y), gend_x = row_.state(p_.gend_x);
    s_ = {gend_y.v1, gend_y.v2}, r_ = {gend_x.v1, gend_x.v2};
    const int64_t time = row_.span.time;
    for (int64_t k = row_.span.chunks; k-- > 0;) {
      if (!p_.carry && k + 1 < row_.span.chunks) s_ = r_ = {};
      const int64_t begin = k * p_.chunk;
      chunk(k, begin, p_.chunk < time - begin ? begin + p_.chunk : time);
    }
    row_.put_state(p_.gstate_y, s_.now, s_.next);
    row_.put_state(p_.gstate_x, r_.now, r_.next);
  }

 private:
  void chunk(int64_t k, int64_t begin, int64_t end) {
    if (begin == end) return;  // a sequence without samples
    const Taps<T> c = taps_of(row_, k);
    l_ = {};
    for (Doubles& sum : total_) sum = Doubles{};

    // From its start: a head up to a line, tiles, the longest first, and what is left.
    int64_t head = p_.stream && gx_ != nullptr ? to_line(gx_ + begin) : 0;
    if (end - begin - head < kTile) head = 0;
    const int64_t whole = (end - begin - head) / kTile, after_whole = begin + head + whole * kTile;
    const int short_segment = segment<T>(end - after_whole);
    const int64_t rest = after_whole + W * short_segment;
    if (whole > 0 || short_segment > 0) segments_.prepare(c, whole > 0 ? kSegment<T> : short_segment);
    for (int64_t left = end - rest; left > 0;) {
      const int n = static_cast<int>(left < kTile ? left : kTile);
      left -= n;
      one_by_one(c, rest + left, n);
      read_off(c, rest + left, n, end);
    }
    if (short_segment > 0) tile(c, after_whole, short_segment, end);
    for (int64_t i = whole; i-- > 0;) tile(c, begin + head + i * kTile, kSegment<T>, end);
    if (head > 0) one_by_one(c, begin, static_cast<int>(head)), read_off(c, begin, static_cast<int>(head), end);

    if constexpr (kSum) write_sums(k, begin, end - begin);
    const double older = end - begin > 1 ? c.b2 * double{l_.v2} : r_.next;
    r_ = {c.b1 * double{l_.v1} + older, c.b2 * double{l_.v1}};
  }

  void tile(const Taps<T>& c, int64_t t, int n, int64_t end) {
    Vec<T> now, next;
    Two<double> exact;
    segments_.enter(gy_ + t, n, s_, now, next, exact);
    if (finite<T>(exact, walk(c, t, n, now, next))) {
      s_ = {-c.a1 * exact.v1 - c.a2 * exact.v2, -c.a2 * exact.v1};
    } else {
      one_by_one<true>(c, t, W * n);
    }
    read_off(c, t, W * n, end);
  }

  // buffer_[i] = l[t + i] of a tile; returns the segments' first. Below: of any n samples.
  FASTKIT_ALWAYS_INLINE Vec<T> walk(const Taps<T>& c, int64_t t, int n, Vec<T> now, Vec<T> next) {
    const Vec<T> a1 = Vec<T>{} + c.a1, a2 = Vec<T>{} + c.a2;
    Vec<T> l1{}, l2{};
    for (int s = n - W; s >= 0; s -= W) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(gy_ + t + i * n + s);
      transpose<T>(v);
      v[W - 1] += now, v[W - 2] += next, now = next = Vec<T>{};
#pragma GCC unroll 16
      for (int i = W - 1; i >= 0; --i) {
        v[i] = (v[i] - a2 * l2) - a1 * l1;
        l2 = l1, l1 = v[i];
      }
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(buffer_ + i * n + s, v[i]);
    }
    return l1;
  }

  template <bool kAgain = false>
  void one_by_one(const Taps<T>& c, int64_t t, int n) {
    T now = static_cast<T>(s_.now), next = static_cast<T>(s_.next), l1 = 0, l2 = 0;
    for (int i = n - 1; i >= 0; --i) {
      const T l0 = ((widened<E>(gy_[t + i]) + now) - c.a2 * l2) - c.a1 * l1;
      if (!kAgain || !finite(l0) || !finite(buffer_[i])) buffer_[i] = l0;
      l2 = l1, l1 = l0, now = next, next = 0;
    }
    s_ = {now - double{c.a1} * l1 - double{c.a2} * l2, -double{c.a2} * l1};
  }

  // gx and the coefficient sums of samples [t, t + n), whose l are in the buffer, of a chunk that ends at `end`.
  void read_off(const Taps<T>& c, int64_t t, int n, int64_t end) {
    buffer_[n] = l_.v1, buffer_[n + 1] = l_.v2;
    l_ = {buffer_[0], buffer_[1]};
    // The chunk's last two samples meet no l of after it, and are owed by the chunks after it.
    const int left = static_cast<int>(end - (t + n) < 2 ? 2 - (end - (t + n)) : 0);
    const int vectors = n >= left ? (n - left) / W * W : 0;
    if (gx_ == nullptr) {
      if constexpr (kSum) read_vectors<false, false>(c, t, vectors);
    } else if (p_.stream && on_line(gx_ + t)) {
      read_vectors<true, true>(c, t, vectors);
    } else {
      read_vectors<true, false>(c, t, vectors);
    }
    for (int i = vectors; i < n; ++i) {
      const T* l = buffer_ + i;
      const int64_t after = end - (t + i) - 1;
      if (gx_ != nullptr) {
        T g = kNumerator ? c.b0 * l[0] + (c.b1 * l[1] + c.b2 * l[2]) : l[0];
        if (after < 2) g += static_cast<T>(after == 0 ? r_.now : r_.next);
        gx_[t + i] = rounded<E>(g);
      }
      if constexpr (kSum) {
        const double y0 = widened<E>(y_[t + i]);
        if (after > 0) total_[0][0] += l[1] * y0;
        if (after > 1) total_[1][0] += l[2] * y0;
        if constexpr (kNumerator) {
          const double x0 = widened<E>(x_[t + i]);
          total_[2][0] += l[0] * x0;
          if (after > 0) total_[3][0] += l[1] * x0;
          if (after > 1) total_[4][0] += l[2] * x0;
        }
      }
    }
  }

  template <bool kWrite, bool kStream>
  FASTKIT_ALWAYS_INLINE void read_vectors(const Taps<T>& c, int64_t t, int n) {
    const Vec<T> b0 = Vec<T>{} + c.b0, b1 = Vec<T>{} + c.b1, b2 = Vec<T>{} + c.b2;
    const E *x = x_ + t, *y = y_ + t;
    E* gx = kWrite ? gx_ + t : nullptr;
    for (int begin = 0; begin < n; begin += kSegment<T>) {
      const int to = n - begin < kSegment<T> ? n : begin + kSegment<T>;
      Vec<T> a1{}, a2{}, s0{}, s1{}, s2{};
      for (int s = begin; s < to; s += W) {
        const Vec<T> l0 = load(buffer_ + s), l1 = load(buffer_ + s + 1), l2 = load(buffer_ + s + 2);
        if constexpr (kWrite) {
          const Vec<T> g = kNumerator ? b0 * l0 + (b1 * l1 + b2 * l2) : l0;
          if constexpr (kStream) {
            stream(gx + s, g);
          } else {
            if (s % L == 0) prefetch_near(gx + s - kTile);  // of the next tile
            store(gx + s, g);
          }
        }
        if constexpr (kSum) {
          const Vec<T> y0 = load(y + s);
          a1 += l1 * y0, a2 += l2 * y0;
          if constexpr (kNumerator) {
            const Vec<T> x0 = load(x + s);
            s0 += l0 * x0, s1 += l1 * x0, s2 += l2 * x0;
          }
        }
        if (kSum && s % L == 0) {
          prefetch(y + s - kTile);
          if constexpr (kNumerator) prefetch(x + s - kTile);
        }
      }
      if constexpr (kSum) {
        add(0, a1), add(1, a2);
        if constexpr (kNumerator) add(2, s0), add(3, s1), add(4, s2);
      }
    }
  }

  FASTKIT_ALWAYS_INLINE void add(int q, Vec<T> sum) { total_[q] += __builtin_convertvector(sum, Doubles); }

  // The products of the chunk's first samples with the history before it, then the results.
  void write_sums(int64_t k, int64_t begin, int64_t n) {
    double sum[kSums] = {};
    for (int q = 0; q < kSums; ++q) {
      for (int i = 0; i < W; ++i) sum[q] += total_[q][i];
    }
    if (k == 0) {
      if (p_.state_y != nullptr) add_history(sum[0], sum[1], row_.state(p_.state_y), n);
      if constexpr (kNumerator) {
        if (p_.state_x != nullptr) add_history(sum[3], sum[4], row_.state(p_.state_x), n);
      }
    } else if (p_.carry) {
      add_history(sum[0], sum[1], {widened<E>(y_[begin - 1]), widened<E>(y_[begin - 2])}, n);
      if constexpr (kNumerator) {
        add_history(sum[3], sum[4], {widened<E>(x_[begin - 1]), widened<E>(x_[begin - 2])}, n);
      }
    }
    for (int q = 0; q < 2; ++q) row_.point(p_.ga, 2)[2 * k + q] = static_cast<T>(-sum[q]);
    if constexpr (kNumerator) {
      for (int q = 0; q < 3; ++q) row_.point(p_.gb, 3)[3 * k + q] = static_cast<T>(sum[2 + q]);
    }
  }

  void add_history(double& lag1, double& lag2, Two<T> before, int64_t n) const {
    lag1 += double{l_.v1} * before.v1, lag2 += double{l_.v1} * before.v2;
    if (n > 1) lag2 += double{l_.v2} * before.v1;
  }

  const IirScanBackward<E>& p_;
  const Row<E> row_;
  const E *const gy_, *const x_, *const y_;
  E* const gx_;
  Two<T> l_;  // l of the two samples after the present one, zero past the chunk's end
  // To gy of the present sample and the one before it; to gx of the chunk's last sample and the one before.
  Owed s_, r_;
  Doubles total_[kSums];  // l1 y, l2 y, l0 x, l1 x, l2 x
  alignas(kLineBytes) T buffer_[kTile + W];
  Segments<E, false, true> segments_;
};

template <class E>
int64_t units(const IirScan<E>& p) {
  return p.batch * p.channels;
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    for (int64_t unit = begin; unit < end; ++unit) Forward<E, numerator.value>(p, unit).run();
  });
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    with_flag(p.ga != nullptr, [&](auto sums) {
      for (int64_t unit = begin; unit < end; ++unit) Backward<E, numerator.value, sums.value>(p, unit).run();
    });
  });
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {units<E>, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_time = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
