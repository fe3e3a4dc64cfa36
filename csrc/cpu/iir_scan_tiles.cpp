// iir_scan of anything, either stride: banks, cascades, coefficients that change every few samples.
//
// What       forward and backward of second-order recursions: filters of one input, summed, or one after another
//            (forward only); coefficients per (row, chunk, filter), chunks as short as one sample.
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
//            gx = b0 l + r1, r1 = r2 + b1 l, r2 = b2 l: a sample uses its own chunk's coefficients alone. The y of
//            a bank's filters are computed again, tile by tile, from the states that forward left at the borders.
#define FASTKIT_HALF_VECTORS  // fewer rows at a time: with coefficients, backward walks up to 8 arrays of each
#include <new>

#include "cpu/iir_scan_kernels.h"
#include "cpu/iir_scan_lanes.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kShortTile = 16;  // most samples of a tile of short chunks: longer, and memory waits for arithmetic
constexpr int kAhead = 64;      // samples between a read and its prefetch

// --- tiles -----------------------------------------------------------------------------------------------------

// Samples [t, t + n) of a span: chunks [k, k + chunks), short ones, or part of chunk k. `steps`: samples of each
// chunk within the tile, the last one's perhaps fewer.
struct Tile {
  int64_t t, k;
  int n, chunks, steps;
  bool opens, closes;  // its first sample begins a chunk, its last one ends one
};

template <class E>
struct Tiles {
  const int64_t chunk, time;
  const bool are_short;
  int64_t count, per;  // per: chunks of a tile if they are short, else tiles of a chunk

  Tiles(const IirScan<E>& p, const Span& span) : chunk(p.chunk), time(span.time), are_short(p.chunk < kShortChunk) {
    count = per = 0;
    if (time == 0) return;
    const int64_t whole = (time - 1) / chunk, rest = time - whole * chunk;  // chunks before the last, and its length
    if (are_short) {
      per = kShortTile / chunk;
      count = whole / per + 1;
    } else {
      per = ((whole > 0 ? chunk : time) + kIirScanTile - 1) / kIirScanTile;
      count = whole * per + (rest + kIirScanTile - 1) / kIirScanTile;
    }
  }

  Tile operator[](int64_t i) const {
    if (are_short) {
      const int64_t k = i * per, t = k * chunk;
      const int n = static_cast<int>(time - t < per * chunk ? time - t : per * chunk), steps = static_cast<int>(chunk);
      return {t, k, n, (n + steps - 1) / steps, steps, true, true};
    }
    const int64_t k = i / per, begin = k * chunk, end = time - begin < chunk ? time : begin + chunk;
    const int64_t t = begin + i % per * kIirScanTile;
    const int n = static_cast<int>(end - t < kIirScanTile ? end - t : kIirScanTile);
    return {t, k, n, 1, n, t == begin, t + n == end};
  }
};

// --- arrays ----------------------------------------------------------------------------------------------------

// How the columns of an array meet the lanes, which are its rows.
enum class Way {
  squares,  // columns have stride 1
  vectors,  // rows have
  scalars   // neither
};

template <class E>
struct Reader {
  static constexpr int W = kLanes<E>, L = kLine<E>, P = L / W;  // P squares make a line of every row
  const E* rows[W];
  int64_t stride;  // between columns
  Way way;
  int64_t ahead = 0;  // columns from a read to its prefetch; 0: none

  // Columns [t, t + n) to out[0], out[step], ..; squares want step 1, and write up to W - 1 vectors more.
  void read(Vec<E>* out, int64_t t, int n, int step = 1, int64_t offset = 0) const {
    if (way == Way::squares) {
      int s = 0;
      for (; s + L <= n; s += L) {  // a line of every row at once: rows may compete for one set of the cache
        Vec<E> v[P][W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < P; ++j) v[j][i] = load(rows[i] + t + s + j * W);
          if (ahead != 0) prefetch(rows[i] + t + s + ahead);
        }
#pragma GCC unroll 8
        for (int j = 0; j < P; ++j) {
          transpose<Arithmetic<E>>(v[j]);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) out[s + j * W + i] = v[j][i];
        }
      }
      for (; s < n; s += W) {
        Vec<E> v[W];
        load_square<E>(v, rows, t + s, n - s < W ? n - s : W);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) out[s + i] = v[i];
      }
    } else if (way == Way::vectors) {
      const E* from = rows[0] + offset + t * stride;
      for (int s = 0; s < n; ++s, from += stride) {
        out[s * step] = load(from);
        if (ahead != 0) prefetch(from + ahead * stride);
      }
    } else {
      for (int s = 0; s < n; ++s) {
        alignas(kLineBytes) Arithmetic<E> values[W];
        for (int i = 0; i < W; ++i) values[i] = widened(rows[i][offset + (t + s) * stride]);
        out[s * step] = load(values);
      }
    }
  }
};

template <class E>
struct Writer {
  static constexpr int W = kLanes<E>, L = kLine<E>, P = L / W;  // P squares make a line of every row
  E* rows[W];
  int64_t stride;
  Way way;
  int count;     // lanes to write
  bool streams;  // lines of the array begin at columns t % L == 0 (vectors: anywhere), and no lane is idle

  // in[0], in[step], .. to columns [t, t + n); squares want step 1, and read up to W - 1 vectors more.
  void write(const Vec<E>* in, int64_t t, int n, int step = 1, int64_t offset = 0) const {
    int s = 0;
    if (way == Way::squares) {
      for (; streams && t % L == 0 && s + L <= n; s += L) {
        Vec<E> v[P][W];
#pragma GCC unroll 8
        for (int j = 0; j < P; ++j) square(v[j], in + s + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < P; ++j) stream(rows[i] + t + s + j * W, v[j][i]);
        }
      }
      for (; s < n; s += W) {
        Vec<E> v[W];
        square(v, in + s);
        if (n - s < W) {
          for (int i = 0; i < count; ++i) store(rows[i] + t + s, v[i], n - s);
        } else if (count < W) {
          for (int i = 0; i < count; ++i) store(rows[i] + t + s, v[i]);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(rows[i] + t + s, v[i]);
        }
      }
    } else if (way == Way::vectors) {
      E* to = rows[0] + offset + t * stride;
      for (; s < n; ++s, to += stride) {
        if (streams) {
          stream(to, in[s * step]);
        } else {
          store(to, in[s * step]);
        }
      }
    } else {
      for (; s < n; ++s) {
        for (int i = 0; i < count; ++i) rows[i][offset + (t + s) * stride] = rounded<E>(in[s * step][i]);
      }
    }
  }

 private:
  static FASTKIT_ALWAYS_INLINE void square(Vec<E> (&v)[W], const Vec<E>* in) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = in[i];
    transpose<Arithmetic<E>>(v);
  }
};

template <class T>
struct Pair {
  Vec<T> v[2] = {};  // of the last sample and the one before it
};

// Coefficients of a filter over a tile: of its chunk q a[2q + i] and b[3q + i].
template <class T>
struct Taps {
  const Vec<T> *a, *b;
};

template <class T>
struct TapsOfChunk {
  Vec<T> a[2], b[3];
};

template <class T>
struct TapsOfTile {
  Vec<T> a[2 * kShortTile + kLanes<T>], b[3 * kShortTile + kLanes<T>];
};

// The lanes, and how they reach the arrays of a call.
template <class E>
struct Rows : Lanes<E> {
  using T = Arithmetic<E>;
  using Lanes<E>::W, Lanes<E>::batch, Lanes<E>::channel, Lanes<E>::count, Lanes<E>::span;
  const IirScan<E>& p;
  const bool neighbours;  // channels of one batch entry, and no lane is idle
  const bool short_chunks;

  Rows(const IirScan<E>& p, int64_t index)
      : Lanes<E>(p, index), p(p), neighbours(count == W && batch[0] == batch[W - 1]),
        short_chunks(p.chunk < kShortChunk) {}

  Reader<E> reader(const Signal<const E>& signal, int64_t ahead) const {
    Reader<E> reader{{}, signal.time, way(!p.channels_last, true), p.stream ? ahead : 0};
    this->point(reader.rows, signal);
    return reader;
  }

  Writer<E> writer(const Signal<E>& signal) const {
    Writer<E> writer{{}, signal.time, way(!p.channels_last, true), count, false};
    this->point(writer.rows, signal);
    writer.streams = may_stream(writer);
    return writer;
  }

  // A bank's states at the tiles' starts: `borders` is dense (B, borders, F, 2, C); of a tile, columns are 2 a filter.
  Reader<T> borders(const T* states) const {
    Reader<T> reader{{}, p.channels, way(false, true)};
    for (int i = 0; i < W; ++i) reader.rows[i] = states + border_row(i);
    return reader;
  }
  Writer<T> borders(T* states) const {
    Writer<T> writer{{}, p.channels, way(false, true), count, false};
    for (int i = 0; i < W; ++i) writer.rows[i] = states + border_row(i);
    return writer;
  }
  int64_t border_row(int i) const {
    return p.border_batch(batch[i]) * p.borders() * p.filters * 2 * p.channels + channel[i];
  }
  int64_t border(const Tile& tile) const {
    return p.border(span.begin + tile.t, span.first_chunk + tile.k) * p.filters * 2 * p.channels;
  }

  Pair<T> state(const T* states, int64_t filters = 1, int64_t f = 0) const {
    return {{this->gather(p, states, 0, filters, f), this->gather(p, states, 1, filters, f)}};
  }
  void set_state(T* states, const Pair<T>& state, int64_t filters = 1, int64_t f = 0) const {
    for (int i = 0; i < 2; ++i) this->scatter(p, states, i, state.v[i], filters, f);
  }

  Way way(bool columns, bool rows) const {
    return columns ? Way::squares : rows && neighbours ? Way::vectors : Way::scalars;
  }

  template <class U>
  bool may_stream(const Writer<U>& writer) const {
    if (!p.stream || count < W || writer.rows[0] == nullptr) return false;
    if (writer.way == Way::vectors) return W == kLine<U> && writer.stride % W == 0 && on_line(writer.rows[0]);
    for (const U* row : writer.rows) {
      if (!on_line(row)) return false;
    }
    return true;
  }
};

// Coefficients (kTaps 2: a, 3: b) of a unit's rows. Where those of one filter's short chunks follow one another,
// columns are the taps of each; else they are chunks, one tap at a time.
template <class E, int kTaps>
struct TapsReader {
  using T = Arithmetic<E>;
  int64_t filter, tap;
  int step;
  Reader<T> reader;

  TapsReader(const Rows<E>& rows, const Coefficients<T>& c, int64_t ahead) : filter(c.filter), tap(c.tap) {
    if (c.data == nullptr) return;
    const bool one = rows.p.filters == 1 && rows.short_chunks && c.tap == 1 && c.chunk == kTaps;
    step = one ? 1 : kTaps;
    reader = {{}, c.chunk, rows.way(one, c.channel == 1), 0};
    if (rows.p.stream && rows.short_chunks) reader.ahead = ahead / rows.p.chunk * (kTaps / step);
    for (int i = 0; i < Rows<E>::W; ++i) {
      reader.rows[i] = c.at(rows.batch[i], rows.channel[i]) + rows.span.first_chunk * c.chunk;
    }
  }

  void read(Vec<T>* out, int64_t f, const Tile& tile) const {
    const int times = kTaps / step;
    for (int i = 0; i < step; ++i) {
      reader.read(out + i, tile.k * times, tile.chunks * times, step, f * filter + i * tap);
    }
  }
};

// Likewise their gradients, dense (B, C, K, F, taps).
template <class E, int kTaps>
struct TapsWriter {
  using T = Arithmetic<E>;
  int step;
  Writer<T> writer;

  TapsWriter(const Rows<E>& rows, T* gradients) {
    if (gradients == nullptr) return;
    const int64_t filters = rows.p.filters;
    const bool one = filters == 1 && rows.short_chunks;
    step = one ? 1 : kTaps;
    writer = {{}, filters * kTaps, rows.way(one, false), rows.count, false};
    for (int i = 0; i < Rows<E>::W; ++i) {
      const int64_t chunk = rows.p.row(rows.batch[i], rows.channel[i]) * rows.p.chunks + rows.span.first_chunk;
      writer.rows[i] = gradients + chunk * filters * kTaps;
    }
    writer.streams = rows.may_stream(writer);
  }

  void write(const Vec<T>* in, int64_t f, const Tile& tile) const {
    const int times = kTaps / step;
    for (int i = 0; i < step; ++i) {
      writer.write(in + i, tile.k * times, tile.chunks * times, step, f * kTaps + i);
    }
  }
};

// A unit's coefficients, brought to `of_chunk` where a tile is part of a chunk, else to `of_tile`.
template <class E, bool kNumerator>
struct AllTaps {
  using T = Arithmetic<E>;
  const bool short_chunks;
  TapsReader<E, 2> a;
  TapsReader<E, 3> b;

  AllTaps(const Rows<E>& rows, int64_t ahead)
      : short_chunks(rows.short_chunks), a(rows, rows.p.a, ahead), b(rows, rows.p.b, ahead) {}

  Taps<T> of(const Tile& tile, int64_t f, bool enters, TapsOfChunk<T>& of_chunk, TapsOfTile<T>& of_tile) const {
    Vec<T>* const to_a = short_chunks ? of_tile.a : of_chunk.a;
    Vec<T>* const to_b = short_chunks ? of_tile.b : of_chunk.b;
    if (enters) {
      a.read(to_a, f, tile);
      if constexpr (kNumerator) b.read(to_b, f, tile);
    }
    return {to_a, to_b};
  }
};

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
    Vec<T>* const y = p_.cascade || p_.filters == 1 ? room.x.at() : room.y.at();
    Pair<T> before_x = before_x_;
    for (int64_t f = 0; f < p_.filters; ++f) {
      Filter& filter = filters_[f];
      const Taps<T> taps = taps_.of(tile, f, tile.opens, filter.taps, room.taps);
      const Pair<T> before_y = filter.y;
      Pair<T> input = before_x;
      if (f == 0 || p_.cascade) {
        recur<T, kNumerator>(tile, p_.carry, taps, room.x.at(), input, filter.y,
                             [&](int s, Vec<T> v) __attribute__((always_inline)) { y[s] = v; });
      } else {
        recur<T, kNumerator>(tile, p_.carry, taps, room.x.at(), input, filter.y,
                             [&](int s, Vec<T> v) __attribute__((always_inline)) { y[s] += v; });
      }
      if (f == 0) before_x_ = input;
      if (p_.cascade) before_x = before_y;  // a filter's output is the next one's input
    }
    y_.write(y, tile.t, tile.n);
  }

  void finish() {
    rows.set_state(p_.end_x, before_x_);
    for (int64_t f = 0; f < p_.filters; ++f) rows.set_state(p_.end_y, filters_[f].y, p_.filters, f);
  }

  const Rows<E> rows;

 private:
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
    Pair<T> s;  // owed to gy of the present sample and of the one before it
    TapsOfChunk<T> taps;
    double a[2][W], b[3][W];  // gradients of a chunk's coefficients so far
  };
  struct Room {
    Buffer<T> x, y, gy, gx;
    TapsOfTile<T> taps, sums;
  };
  static constexpr bool kFromTheEnd = true;

  Backward(const Call& p, int64_t index, Filter* filters)
      : rows(p, index), p_(p), filters_(filters), gy_(rows.reader(p.gy, -kAhead)), x_(rows.reader(p.x, -kAhead)),
        y_(rows.reader(p.y, -kAhead)), gx_(rows.writer(p.gx)), taps_(rows, -kAhead), ga_(rows, p.ga), gb_(rows, p.gb) {
    r_ = rows.state(p.gend_x);
    for (int64_t f = 0; f < p.filters; ++f) filters_[f].s = rows.state(p.gend_y, p.filters, f);
  }

  void visit(const Tile& tile, Room& room) {
    const bool bank = p_.filters > 1;
    gy_.read(room.gy.at(), tile.t, tile.n);
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
  static int most(const IirScan<E>& p) { return p.channels_last ? kMost : 1; }
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
  typename Walker::Room room;
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
constexpr IirScanFunctions<E> tiles = {Unit<E>::units, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_tiles = {tiles<float>, tiles<double>, tiles<BFloat16>, tiles<Half>};

}  // namespace fastkit::FASTKIT_ISA
