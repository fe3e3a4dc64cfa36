// Tiles of iir_scan_tiles.cpp, and how they come from the arrays of a call to the first-level cache and back: signals,
// coefficients and their gradients, and the states between tiles.
#pragma once

#include "cpu/iir_scan_kernels.h"
#include "cpu/iir_scan_lanes.h"

namespace fastkit::FASTKIT_ISA {
namespace {  // as if in the file that includes it

constexpr int kShortTile = 16;  // most samples of a tile of short chunks: longer, and memory waits for arithmetic

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

}  // namespace
}  // namespace fastkit::FASTKIT_ISA
