// iir_scan of anything, either stride: banks, cascades, coefficients that change every few samples.
//
// What       forward and backward of second-order recursions: filters of one input, summed, or one after another
//            (with b, one chunk); coefficients per (row, chunk, filter), chunks as short as one sample.
// Parallel   kLanes rows are the lanes of a vector. They walk time in tiles: part of a chunk, or several short
//            chunks. A tile's arrays are brought into the first-level cache, one vector over lanes a sample (squares
//            are transposed where time has stride 1), the filters run there in turn, and the results go back. A unit
//            is one such set of rows or, where channels have stride 1, as many as fill 4 cache lines.
// Bytes      per fp32 sample: forward reads x, writes y (8), at chunk = 1 also reads a and b (28). Backward reads gy
//            and x, writes gx (12), and of a single filter reads y; at chunk = 1 it reads a and b, writes their
//            gradients (56). Results larger than the caches are streamed; inputs are prefetched kAhead samples ahead.
// Numerics   y = (u - a2 y2) - a1 y1; a bank's sum in the order of its filters. Coefficient gradients: sums in the
//            working precision over a tile at most, double beyond.
// Backward   transposed form, from the end: l = gy + s1, s1 = s2 - a1 l, s2 = -a2 l, and likewise
//            gx = b0 l + r1, r1 = r2 + b1 l, r2 = b2 l: a sample uses its own chunk's coefficients alone. A
//            cascade, of one chunk, has l = (gy - a2 l2) - a1 l1, gx = b0 l + b1 l1 + b2 l2, filter by filter. The y of
//            several filters are computed again, tile by tile, from the states that forward left at the borders.
#define FASTKIT_HALF_VECTORS  // fewer rows at a time: with coefficients, backward walks up to 8 arrays of each
#include <new>

#include "cpu/iir_scan_tiles_arrays.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kAhead = 64;  // samples between a read and its prefetch
#ifdef __AVX512VL__
constexpr bool kHoldsTwo = true;  // registers hold the sums of two filters
#else
constexpr bool kHoldsTwo = kManyRegisters;
#endif

// --- forward ---------------------------------------------------------------------------------------------------

// A filter over a tile of x: put(s, y[s]).
template <class T, bool kNumerator, class Put>
FASTKIT_INLINE void recur(const Tile& tile, bool carry, const Taps<T>& taps, const Vec<T>* x, Pair<T>& before_x,
                          Pair<T>& before_y, Put put) {
  Vec<T> x1 = before_x.v[0], x2 = before_x.v[1], y1 = before_y.v[0], y2 = before_y.v[1];
  for (int q = 0, s = 0; q < tile.chunks; ++q) {
    const Vec<T> a1 = taps.a[2 * q], a2 = taps.a[2 * q + 1];
    Vec<T> b0{}, b1{}, b2{};
    if constexpr (kNumerator) b0 = taps.b[3 * q], b1 = taps.b[3 * q + 1], b2 = taps.b[3 * q + 2];
    if (!carry && q > 0) x1 = x2 = y1 = y2 = Vec<T>{};
    const int end = s + tile.steps < tile.n ? s + tile.steps : tile.n;
#pragma GCC unroll 4
    for (; s < end; ++s) {
      const Vec<T> x0 = x[s];
      Vec<T> u = x0;
      if constexpr (kNumerator) u = b0 * x0 + (b1 * x1 + b2 * x2);
      const Vec<T> y0 = (u - a2 * y2) - a1 * y1;
      put(s, y0);
      x2 = x1, x1 = x0, y2 = y1, y1 = y0;
    }
  }
  before_x = {{x1, x2}}, before_y = {{y1, y2}};
}

// Two filters, one after the other, over a tile of one chunk: put(s, y[s], z[s]). A step of one does not wait for the
// other's last, so that their latencies overlap.
template <class T, class Put>
FASTKIT_INLINE void recur_both(int n, const Taps<T>& first, const Taps<T>& second, const Vec<T>* x, Pair<T>& before_x,
                               Pair<T>& before_y, Pair<T>& before_z, Put put) {
  const Vec<T> a1 = first.a[0], a2 = first.a[1], b0 = first.b[0], b1 = first.b[1], b2 = first.b[2];
  const Vec<T> c1 = second.a[0], c2 = second.a[1], d0 = second.b[0], d1 = second.b[1], d2 = second.b[2];
  Vec<T> x1 = before_x.v[0], x2 = before_x.v[1], y1 = before_y.v[0], y2 = before_y.v[1];
  Vec<T> z1 = before_z.v[0], z2 = before_z.v[1];
#pragma GCC unroll 4
  for (int s = 0; s < n; ++s) {
    const Vec<T> x0 = x[s];
    const Vec<T> u = b0 * x0 + (b1 * x1 + b2 * x2), y0 = (u - a2 * y2) - a1 * y1;
    const Vec<T> v = d0 * y0 + (d1 * y1 + d2 * y2), z0 = (v - c2 * z2) - c1 * z1;
    put(s, y0, z0);
    x2 = x1, x1 = x0, y2 = y1, y1 = y0, z2 = z1, z1 = z0;
  }
  before_x = {{x1, x2}}, before_y = {{y1, y2}}, before_z = {{z1, z2}};
}

// A tile of a signal, from the square before it (backward needs two samples of it) to that of its last samples.
template <class T>
struct Buffer {
  Vec<T> v[kLanes<T> + kIirScanTile + kLanes<T>];

  Vec<T>* at() { return v + kLanes<T>; }
  Vec<T>& operator[](int s) { return at()[s]; }
};

template <class E, bool kNumerator>
class Forward {
  using T = Arithmetic<E>;

 public:
  using Call = IirScanForward<E>;
  struct Filter {
    Pair<T> y;
    TapsOfChunk<T> taps;
  };
  struct Room {
    Buffer<T> x, y;
    TapsOfTile<T> taps;

    explicit Room(const Call&) {}
  };
  static constexpr bool kFromTheEnd = false;

  Forward(const Call& p, int64_t index, Filter* filters)
      : rows(p, index), p_(p), filters_(filters), x_(rows.reader(p.x, kAhead)), y_(rows.writer(p.y)),
        taps_(rows, kAhead) {
    before_x_ = rows.state(p.state_x);
    for (int64_t f = 0; f < p.filters; ++f) filters_[f].y = rows.state(p.state_y, p.filters, f);
  }

  void visit(const Tile& tile, Room& room) {
    if (!p_.carry && tile.opens && tile.k > 0) {
      before_x_ = {};
      for (int64_t f = 0; f < p_.filters; ++f) filters_[f].y = {};
    }
    if (p_.borders != nullptr) write_borders(tile);
    x_.read(room.x.at(), tile.t, tile.n);
    if constexpr (kNumerator) {
      if (p_.cascade) return visit_cascade(tile, room);
    }
    Vec<T>* const y = p_.filters == 1 ? room.x.at() : room.y.at();
    const Pair<T> before_x = before_x_;
    for (int64_t f = 0; f < p_.filters; ++f) {
      Filter& filter = filters_[f];
      const Taps<T> taps = taps_.of(tile, f, tile.opens, filter.taps, room.taps);
      Pair<T> input = before_x;
      if (f == 0) {
        recur<T, kNumerator>(tile, p_.carry, taps, room.x.at(), input, filter.y,
                             [&](int s, Vec<T> v) __attribute__((always_inline)) { y[s] = v; });
      } else {
        recur<T, kNumerator>(tile, p_.carry, taps, room.x.at(), input, filter.y,
                             [&](int s, Vec<T> v) __attribute__((always_inline)) { y[s] += v; });
      }
      if (f == 0) before_x_ = input;
    }
    y_.write(y, tile.t, tile.n);
  }

  void finish() {
    rows.set_state(p_.end_x, before_x_);
    for (int64_t f = 0; f < p_.filters; ++f) rows.set_state(p_.end_y, filters_[f].y, p_.filters, f);
  }

  const Rows<E> rows;

 private:
  // A filter's output is the next one's input.
  void visit_cascade(const Tile& tile, Room& room) {
    Vec<T>* const x = room.x.at();
    Pair<T> input = before_x_;  // the two samples before the tile of what the next filter is given
    const auto taps = [&](int64_t f) { return taps_.of(tile, f, tile.opens, filters_[f].taps, room.taps); };
    for (int64_t f = 0; f < p_.filters; f += 2) {
      const bool both = f + 1 < p_.filters;
      const Pair<T> output = filters_[both ? f + 1 : f].y;
      if (both) {
        recur_both<T>(tile.n, taps(f), taps(f + 1), x, input, filters_[f].y, filters_[f + 1].y,
                      [&](int s, Vec<T>, Vec<T> z) __attribute__((always_inline)) { x[s] = z; });
      } else {
        recur<T, true>(tile, true, taps(f), x, input, filters_[f].y,
                       [&](int s, Vec<T> y) __attribute__((always_inline)) { x[s] = y; });
      }
      if (f == 0) before_x_ = input;
      input = output;
    }
    y_.write(x, tile.t, tile.n);
  }

  void write_borders(const Tile& tile) const {
    const auto borders = rows.borders(p_.borders);
    for (int64_t f = 0; f < p_.filters; ++f) borders.write(filters_[f].y.v, 2 * f, 2, 1, rows.border(tile));
  }

  const Call& p_;
  Filter* const filters_;
  const Reader<E> x_;
  const Writer<E> y_;
  const AllTaps<E, kNumerator> taps_;
  Pair<T> before_x_;
};

// --- backward --------------------------------------------------------------------------------------------------

template <class E, bool kNumerator, bool kSums>
class Backward {
  using T = Arithmetic<E>;
  static constexpr int W = kLanes<E>;

 public:
  using Call = IirScanBackward<E>;
  struct Filter {
    Pair<T> s;  // owed to gy of the present sample and of the one before it; of a cascade, l of the two after it
    TapsOfChunk<T> taps;
    double a[2][W], b[3][W];  // gradients of a chunk's coefficients so far
  };
  struct Room {
    Buffer<T> x, y, gy, gx;
    TapsOfTile<T> taps, sums, second_sums;
    Buffer<T>* const signals;  // of a cascade: what each filter is given, and what the last one gives

    explicit Room(const Call& p) : signals(kSums && p.cascade ? new Buffer<T>[p.filters + 1] : nullptr) {}
    Room(const Room&) = delete;
    ~Room() { delete[] signals; }
  };
  static constexpr bool kFromTheEnd = true;

  Backward(const Call& p, int64_t index, Filter* filters)
      : rows(p, index), p_(p), filters_(filters), gy_(rows.reader(p.gy, -kAhead)), x_(rows.reader(p.x, -kAhead)),
        y_(rows.reader(p.y, -kAhead)), gx_(rows.writer(p.gx)), taps_(rows, -kAhead), ga_(rows, p.ga), gb_(rows, p.gb) {
    r_ = rows.state(p.gend_x);
    for (int64_t f = 0; f < p.filters; ++f) filters_[f].s = rows.state(p.gend_y, p.filters, f);
  }

  void visit(const Tile& tile, Room& room) {
    gy_.read(room.gy.at(), tile.t, tile.n);
    if constexpr (kNumerator) {
      if (p_.cascade) return visit_cascade(tile, room);
    }
    const bool bank = p_.filters > 1;
    if constexpr (kSums) {
      if (kNumerator || bank) read(room.x, x_, p_.state_x, tile);
      if (!bank) read(room.y, y_, p_.state_y, tile);
    }
    Pair<T> r = r_;
    for (int64_t f = 0; f < p_.filters; ++f) {
      Filter& filter = filters_[f];
      const Taps<T> taps = taps_.of(tile, f, tile.closes, filter.taps, room.taps);
      if (kSums && bank) recompute(tile, taps, f, room);
      if (f == 0) {
        adjoint(tile, taps, filter.s, r, room,
                [&](int s, Vec<T> v) __attribute__((always_inline)) { room.gx[s] = v; });
        r_ = r;
      } else {
        r = {};
        adjoint(tile, taps, filter.s, r, room,
                [&](int s, Vec<T> v) __attribute__((always_inline)) { room.gx[s] += v; });
        for (int i = 0; i < 2; ++i) r_.v[i] += r.v[i];
      }
      if constexpr (kSums) write_sums(tile, f, room.sums);
    }
    if (p_.gx.data != nullptr) gx_.write(room.gx.at(), tile.t, tile.n);
    if (!p_.carry && tile.opens && tile.k > 0) {
      r_ = {};
      for (int64_t f = 0; f < p_.filters; ++f) filters_[f].s = {};
    }
  }

  void finish() {
    rows.set_state(p_.gstate_x, r_);
    for (int64_t f = 0; f < p_.filters; ++f) rows.set_state(p_.gstate_y, filters_[f].s, p_.filters, f);
  }

  const Rows<E> rows;

 private:
  // In place, from the last filter to the first: the gradient of what one was given is gy of the one before it.
  void visit_cascade(const Tile& tile, Room& room) {
    if constexpr (kSums) recompute_cascade(tile, room);
    const auto taps = [&](int64_t f) {
      return taps_.of(tile, f, !kSums && tile.closes, filters_[f].taps, room.taps);
    };
    Vec<T>* const g = room.gy.at();
    for (int64_t f = p_.filters - 1; f >= 0; --f) {
      const bool both = (!kSums || kHoldsTwo) && f % 2 == 1;
      if (both) {
        --f;
        both_adjoints_in_place(tile.n, taps(f), taps(f + 1), filters_[f].s, filters_[f + 1].s, g,
                               kSums ? room.signals + f : nullptr, room.sums, room.second_sums);
      } else {
        adjoint_in_place(tile.n, taps(f), filters_[f].s, g, kSums ? room.signals + f : nullptr, room.sums);
      }
      if constexpr (kSums) {
        if (both) write_sums(tile, f + 1, room.second_sums);
        write_sums(tile, f, room.sums);
      }
    }
    if (p_.gx.data != nullptr) gx_.write(room.gy.at(), tile.t, tile.n);
  }

  void recompute_cascade(const Tile& tile, Room& room) const {
    const auto borders = rows.borders(p_.borders);
    Buffer<T>* const signals = room.signals;
    read(signals[0], x_, p_.state_x, tile);
    for (int64_t f = 0; f < p_.filters; ++f) {
      Pair<T> y;
      borders.read(y.v, 2 * f, 2, 1, rows.border(tile));
      signals[f + 1][-1] = y.v[0], signals[f + 1][-2] = y.v[1];
    }
    const auto before = [&](int64_t i) { return Pair<T>{{signals[i][-1], signals[i][-2]}}; };
    const auto taps = [&](int64_t f) { return taps_.of(tile, f, tile.closes, filters_[f].taps, room.taps); };
    for (int64_t f = 0; f < p_.filters; f += 2) {
      Vec<T>* const y = signals[f + 1].at();
      Pair<T> before_x = before(f), before_y = before(f + 1);
      if (f + 1 < p_.filters) {
        Vec<T>* const z = signals[f + 2].at();
        Pair<T> before_z = before(f + 2);
        recur_both<T>(tile.n, taps(f), taps(f + 1), signals[f].at(), before_x, before_y, before_z,
                      [&](int s, Vec<T> y0, Vec<T> z0) __attribute__((always_inline)) { y[s] = y0, z[s] = z0; });
      } else {
        recur<T, true>(tile, true, taps(f), signals[f].at(), before_x, before_y,
                       [&](int s, Vec<T> y0) __attribute__((always_inline)) { y[s] = y0; });
      }
    }
  }

  // A filter of a cascade over a tile, from its end: gx in place of gy, and the sums for its coefficients, with what it
  // was given and what it gave, the one behind the other. `after`: l of the two samples after the tile.
  static FASTKIT_ALWAYS_INLINE void adjoint_in_place(int n, const Taps<T>& taps, Pair<T>& after, Vec<T>* g,
                                                     Buffer<T>* signals, TapsOfTile<T>& sums) {
    const Vec<T> a1 = taps.a[0], a2 = taps.a[1], b0 = taps.b[0], b1 = taps.b[1], b2 = taps.b[2];
    const Vec<T> *const x = kSums ? signals[0].at() : nullptr, *const y = kSums ? signals[1].at() : nullptr;
    Vec<T> l1 = after.v[0], l2 = after.v[1], ga1{}, ga2{}, gb0{}, gb1{}, gb2{};
#pragma GCC unroll 4
    for (int s = n - 1; s >= 0; --s) {
      const Vec<T> l = (g[s] - a2 * l2) - a1 * l1;
      g[s] = b0 * l + (b1 * l1 + b2 * l2);
      if constexpr (kSums) {
        const Vec<T> x0 = x[s], y0 = y[s];
        ga1 -= l1 * y0, ga2 -= l2 * y0;
        gb0 += l * x0, gb1 += l1 * x0, gb2 += l2 * x0;
      }
      l2 = l1, l1 = l;
    }
    after = {{l1, l2}};
    if constexpr (kSums) {
      sums.a[0] = ga1, sums.a[1] = ga2;
      sums.b[0] = gb0, sums.b[1] = gb1, sums.b[2] = gb2;
    }
  }

  // Likewise of two filters, from the second to the first: their latencies overlap, as in recur_both.
  static FASTKIT_ALWAYS_INLINE void both_adjoints_in_place(int n, const Taps<T>& first, const Taps<T>& second,
                                                           Pair<T>& after_first, Pair<T>& after_second, Vec<T>* g,
                                                           Buffer<T>* signals, TapsOfTile<T>& first_sums,
                                                           TapsOfTile<T>& second_sums) {
    const Vec<T> a1 = first.a[0], a2 = first.a[1], b0 = first.b[0], b1 = first.b[1], b2 = first.b[2];
    const Vec<T> c1 = second.a[0], c2 = second.a[1], d0 = second.b[0], d1 = second.b[1], d2 = second.b[2];
    const Vec<T> *const x = kSums ? signals[0].at() : nullptr, *const y = kSums ? signals[1].at() : nullptr;
    const Vec<T>* const z = kSums ? signals[2].at() : nullptr;
    Vec<T> l1 = after_first.v[0], l2 = after_first.v[1], m1 = after_second.v[0], m2 = after_second.v[1];
    Vec<T> ga1{}, ga2{}, gb0{}, gb1{}, gb2{}, gc1{}, gc2{}, gd0{}, gd1{}, gd2{};
#pragma GCC unroll 2
    for (int s = n - 1; s >= 0; --s) {
      const Vec<T> m = (g[s] - c2 * m2) - c1 * m1, gy = d0 * m + (d1 * m1 + d2 * m2);
      const Vec<T> l = (gy - a2 * l2) - a1 * l1;
      g[s] = b0 * l + (b1 * l1 + b2 * l2);
      if constexpr (kSums) {
        const Vec<T> x0 = x[s], y0 = y[s], z0 = z[s];
        gc1 -= m1 * z0, gc2 -= m2 * z0, gd0 += m * y0, gd1 += m1 * y0, gd2 += m2 * y0;
        ga1 -= l1 * y0, ga2 -= l2 * y0, gb0 += l * x0, gb1 += l1 * x0, gb2 += l2 * x0;
      }
      m2 = m1, m1 = m, l2 = l1, l1 = l;
    }
    after_first = {{l1, l2}}, after_second = {{m1, m2}};
    if constexpr (kSums) {
      first_sums.a[0] = ga1, first_sums.a[1] = ga2;
      first_sums.b[0] = gb0, first_sums.b[1] = gb1, first_sums.b[2] = gb2;
      second_sums.a[0] = gc1, second_sums.a[1] = gc2;
      second_sums.b[0] = gd0, second_sums.b[1] = gd1, second_sums.b[2] = gd2;
    }
  }

  // A tile of a signal and the two samples before it.
  void read(Buffer<T>& to, const Reader<E>& signal, const T* states, const Tile& tile) const {
    const int before = signal.way == Way::squares ? W : 2;  // no tile but the first begins before sample W
    if (tile.t == 0) {
      const Pair<T> state = rows.state(states);
      to[-2] = state.v[1], to[-1] = state.v[0];
    } else if (!p_.carry && tile.opens) {
      to[-2] = to[-1] = Vec<T>{};
    } else {
      signal.read(to.at() - before, tile.t - before, before);
    }
    signal.read(to.at(), tile.t, tile.n);
  }

  // y of one filter of a bank.
  void recompute(const Tile& tile, const Taps<T>& taps, int64_t f, Room& room) const {
    Pair<T> x{{room.x[-1], room.x[-2]}}, y;
    rows.borders(p_.borders).read(y.v, 2 * f, 2, 1, rows.border(tile));
    room.y[-1] = y.v[0], room.y[-2] = y.v[1];
    recur<T, kNumerator>(tile, p_.carry, taps, room.x.at(), x, y,
                         [&](int s, Vec<T> v) __attribute__((always_inline)) { room.y[s] = v; });
  }

  // A filter over a tile, from its end: put(s, gx[s]), and the gradients of its coefficients, chunk by chunk.
  template <class Put>
  FASTKIT_ALWAYS_INLINE void adjoint(const Tile& tile, const Taps<T>& taps, Pair<T>& owed_y, Pair<T>& owed_x,
                                     Room& room, Put put) const {
    const Vec<T> *const x = room.x.at(), *const y = room.y.at(), *const gy = room.gy.at();
    // s1 is two terms, so that a step's latency is that of one FMA: s - last_a1 * last.
    Vec<T> s1 = owed_y.v[0], s2 = owed_y.v[1], last{}, last_a1{};
    Vec<T> r1 = owed_x.v[0], r2 = owed_x.v[1];
    for (int q = tile.chunks - 1; q >= 0; --q) {
      const Vec<T> a1 = taps.a[2 * q], a2 = taps.a[2 * q + 1];
      Vec<T> b0{}, b1{}, b2{}, ga1{}, ga2{}, gb0{}, gb1{}, gb2{};
      if constexpr (kNumerator) b0 = taps.b[3 * q], b1 = taps.b[3 * q + 1], b2 = taps.b[3 * q + 2];
      const int begin = q * tile.steps, end = begin + tile.steps < tile.n ? begin + tile.steps : tile.n;
      auto step = [&](int s, Vec<T> y1, Vec<T> y2, Vec<T> x1, Vec<T> x2) __attribute__((always_inline)) {
        const Vec<T> l = (gy[s] + s1) - last_a1 * last;
        s1 = s2, s2 = -a2 * l, last = l, last_a1 = a1;
        put(s, (kNumerator ? b0 * l : l) + r1);
        r1 = r2, r2 = Vec<T>{};
        if constexpr (kNumerator) r1 += b1 * l, r2 = b2 * l;
        if constexpr (kSums) ga1 -= l * y1, ga2 -= l * y2;
        if constexpr (kSums && kNumerator) gb0 += l * x[s], gb1 += l * x1, gb2 += l * x2;
      };
      const int whole = p_.carry || q == 0 ? begin : begin + 2;  // from here on what came before counts, else it is zero
      int s = end - 1;
      for (; s >= whole; --s) step(s, y[s - 1], y[s - 2], x[s - 1], x[s - 2]);
      for (; s >= begin; --s) {
        const Vec<T> none{};
        step(s, s > begin ? y[s - 1] : none, none, s > begin ? x[s - 1] : none, none);
      }
      if (!p_.carry && q > 0) s1 = s2 = last = r1 = r2 = Vec<T>{};
      if constexpr (kSums) room.sums.a[2 * q] = ga1, room.sums.a[2 * q + 1] = ga2;
      if constexpr (kSums && kNumerator) {
        room.sums.b[3 * q] = gb0, room.sums.b[3 * q + 1] = gb1, room.sums.b[3 * q + 2] = gb2;
      }
    }
    owed_y = {{s1 - last_a1 * last, s2}}, owed_x = {{r1, r2}};
  }

  void write_sums(const Tile& tile, int64_t f, TapsOfTile<T>& sums) {
    if (!(tile.opens && tile.closes)) {
      add(filters_[f].a, sums.a, tile);
      if constexpr (kNumerator) add(filters_[f].b, sums.b, tile);
    }
    if (!tile.opens) return;
    ga_.write(sums.a, f, tile);
    if constexpr (kNumerator) gb_.write(sums.b, f, tile);
  }

  // Adds a tile's sums to its chunk's, which come back in their place.
  template <int kTaps>
  static void add(double (&totals)[kTaps][W], Vec<T>* sums, const Tile& tile) {
    for (int q = 0; q < kTaps; ++q) {
      alignas(kLineBytes) T values[W];
      store(values, sums[q]);
      for (int i = 0; i < W; ++i) {
        totals[q][i] = (tile.closes ? 0 : totals[q][i]) + static_cast<double>(values[i]);
        values[i] = static_cast<T>(totals[q][i]);
      }
      sums[q] = load(values);
    }
  }

  const Call& p_;
  Filter* const filters_;
  const Reader<E> gy_, x_, y_;
  const Writer<E> gx_;
  const AllTaps<E, kNumerator> taps_;
  const TapsWriter<E, 2> ga_;
  const TapsWriter<E, 3> gb_;
  Pair<T> r_;  // owed to gx of the present sample and of the one before it
};

// --- units -----------------------------------------------------------------------------------------------------

// The sets of rows of a unit: where channels have stride 1 they fill whole cache lines, so that none is fetched twice.
template <class E>
struct Unit {
  static constexpr int kMost = 4 * kLine<E> / kLanes<E>;
  int64_t first;  // Rows' index
  int count;

  Unit(const IirScan<E>& p, int64_t unit) {
    const int64_t sets = sets_of_sequence(p), units = units_of_sequence(p), within = unit % units * most(p);
    first = unit / units * sets + within;
    count = static_cast<int>(sets - within < most(p) ? sets - within : most(p));
  }

  static int64_t units(const IirScan<E>& p) { return (p.offsets != nullptr ? p.batch : 1) * units_of_sequence(p); }

 private:
  static int most(const IirScan<E>& p) {
    if (!p.channels_last) return 1;
    const int64_t sets = p.block / kLanes<E>;  // whole cache lines, fewer where threads would idle
    return sets < 1 ? 1 : sets < kMost ? static_cast<int>(sets) : kMost;
  }
  static int64_t sets_of_sequence(const IirScan<E>& p) {  // not packed: everything is one
    const int64_t rows = p.offsets != nullptr ? p.channels : p.batch * p.channels;
    return (rows + kLanes<E> - 1) / kLanes<E>;
  }
  static int64_t units_of_sequence(const IirScan<E>& p) { return (sets_of_sequence(p) + most(p) - 1) / most(p); }
};

template <class Walker, class E>
void walk(const typename Walker::Call& p, int64_t begin, int64_t end) {
  using Filter = typename Walker::Filter;
  constexpr int kMost = Unit<E>::kMost;
  constexpr std::align_val_t kAlign{kLineBytes};
  auto* const filters = static_cast<Filter*>(::operator new(sizeof(Filter) * kMost * p.filters, kAlign));
  auto* const walkers = static_cast<Walker*>(::operator new(sizeof(Walker) * kMost, kAlign));
  typename Walker::Room room(p);
  for (int64_t index = begin; index < end; ++index) {
    const Unit<E> unit(p, index);
    for (int i = 0; i < unit.count; ++i) new (walkers + i) Walker(p, unit.first + i, filters + i * p.filters);
    const Tiles<E> tiles(p, walkers->rows.span);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const Tile tile = tiles[Walker::kFromTheEnd ? tiles.count - 1 - i : i];
      for (int j = 0; j < unit.count; ++j) walkers[j].visit(tile, room);
    }
    for (int i = 0; i < unit.count; ++i) walkers[i].finish();
  }
  ::operator delete(walkers, kAlign);
  ::operator delete(filters, kAlign);
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  if (p.b.data != nullptr) {
    walk<Forward<E, true>, E>(p, begin, end);
  } else {
    walk<Forward<E, false>, E>(p, begin, end);
  }
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  const bool numerator = p.b.data != nullptr, sums = p.ga != nullptr;
  if (numerator && sums) {
    walk<Backward<E, true, true>, E>(p, begin, end);
  } else if (numerator) {
    walk<Backward<E, true, false>, E>(p, begin, end);
  } else if (sums) {
    walk<Backward<E, false, true>, E>(p, begin, end);
  } else {
    walk<Backward<E, false, false>, E>(p, begin, end);
  }
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {Unit<E>::units, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_tiles = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
