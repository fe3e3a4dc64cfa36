// iir_scan on the GPU: what its warps do. Plain functors of a warp (common/warp.h), which tests also run on the host.
//
// What       forward and backward of second-order recursions, coefficients per (row, chunk, filter), chunks of any
//            length, either stride, packed sequences, states.
// Parallel   rows are cut along time into segments, a warp to each. Where time has stride 1 a warp has one row: a tile
//            is kRun samples of every lane; each lane composes its run to an affine map of the state (y[t-1], y[t-2]),
//            a scan over the lanes gives what enters each run, and the run is walked again from there. Where channels
//            have stride 1 a lane has a row of its own, and walks. Rows enough to fill the GPU are one segment each.
//            Otherwise Segments reduces each segment to its map, Enter follows the maps of a row, and then Segments
//            walks them all.
// Bytes      per fp32 sample: forward reads x, writes y (8), and reads x once more for each filter where rows are cut.
//            Backward reads gy, writes l (8, cut 12), then reads l, x, y and writes gx (16, without b 12). Per chunk
//            the coefficients, and of their gradients 20 bytes a piece, written and read again.
// Numerics   y = (u - a2 y2) - a1 y1; maps in the type of arithmetic, from segment to segment in double. Coefficient
//            gradients: sums of at most kPiece samples of a lane in the type of arithmetic, then over lanes, then in
//            double. No atomics: the same call gives the same bits. Of an unstable filter, whose powers overflow
//            within a tile or segment, NaN may come earlier than the plain recursion has it.
// Backward   l, the gradient of the numerator's output, in transposed form from the end: l = gy + s1,
//            s1 = s2 - a1 l, s2 = -a2 l, the same walk. Then gx and the coefficients' sums are read off l, x and y.
//            A bank is walked filter by filter, its y computed again.
#pragma once

#include <type_traits>

#include "common/convert.h"
#include "common/warp.h"
#include "fastkit/iir_scan.h"

namespace fastkit::iir_scan_warps {

template <class T>
inline constexpr int kRun = 64 / sizeof(T);  // samples of a lane in a tile
inline constexpr int64_t kSegments = 512;    // of a row, at most: Enter follows them one by one
inline constexpr int kPiece = 128;           // samples of a chunk that one lane sums, at most

template <class T>
struct Two {
  T v1 = 0, v2 = 0;  // the newest first, or what is owed to the next sample first
};

// One sample: a signal filtered by 1 / A, or by its transpose from the end.
template <bool kReverse, class T>
FASTKIT_DEVICE T step(Two<T>& s, T in, T a1, T a2) {
  if constexpr (kReverse) {
    const T l = in + s.v1;
    s = {s.v2 - a1 * l, -a2 * l};
    return l;
  } else {
    const T y = (in - a2 * s.v2) - a1 * s.v1;
    s = {y, s.v1};
    return y;
  }
}

// s -> s.v1 first + s.v2 second + rest; where it forgets, s is not looked at: it may be NaN.
template <class T>
struct Map {
  Two<T> first{1, 0}, second{0, 1}, rest{0, 0};
  uint32_t forgets = 0;

  template <class U>
  FASTKIT_DEVICE Two<U> linear(Two<U> s) const {
    return {first.v1 * s.v1 + second.v1 * s.v2, first.v2 * s.v1 + second.v2 * s.v2};
  }
  template <class U>
  FASTKIT_DEVICE Two<U> operator()(Two<U> s) const {
    if (forgets) return {rest.v1, rest.v2};
    const Two<U> image = linear(s);
    return {image.v1 + rest.v1, image.v2 + rest.v2};
  }
  FASTKIT_DEVICE Map after(const Map& before) const {
    if (forgets) return *this;
    return {linear(before.first), linear(before.second), (*this)(before.rest), before.forgets};
  }
};

// A call as the warps see it. Element types of its signals: E; l and everything else: T.
template <class E, bool kReverse>
struct Walk {
  using T = Arithmetic<E>;
  IirScan<E> p;
  Signal<const E> in;  // x, or gy
  Signal<std::conditional_t<kReverse, T, E>> out;
  const T* initial = nullptr;  // of each row and filter, dense (rows, all_filters, 2); null: zero
  T* final = nullptr;          // likewise; null: not wanted
  int64_t first_filter = 0, all_filters = 1;  // p.filters of them, from first_filter on
  int64_t segments = 1, length = 0;           // of a row; samples of a segment
  T* states = nullptr;     // what enters a segment, pairs by (filter, segment, row); what leaves it, once it is walked
  Map<T>* maps = nullptr;  // of each segment; null: history never crosses from one to the next

  FASTKIT_DEVICE int64_t rows() const { return p.batch * p.channels; }
  FASTKIT_DEVICE int64_t place(int64_t filter, int64_t segment, int64_t row) const {
    return (filter * segments + segment) * rows() + row;
  }
  // Groups of rows that one warp walks.
  static FASTKIT_ALWAYS_INLINE int64_t groups(const IirScan<E>& p) {
    return p.batch * (p.channels_last ? (p.channels + kWarpLanes - 1) / kWarpLanes : p.channels);
  }
};

// The row of a lane.
template <class E>
struct Row {
  int64_t batch, channel;
  Span span;
  bool idle;  // a lane beyond the last channel

  FASTKIT_DEVICE Row(const IirScan<E>& p, int64_t group, int lane) {
    if (p.channels_last) {
      const int64_t blocks = (p.channels + kWarpLanes - 1) / kWarpLanes;
      batch = group / blocks, channel = group % blocks * kWarpLanes + lane;
      idle = channel >= p.channels;
      if (idle) channel = p.channels - 1;
    } else {
      batch = group / p.channels, channel = group % p.channels, idle = false;
    }
    span = p.span(batch);
  }
  FASTKIT_DEVICE int64_t index(const IirScan<E>& p) const { return batch * p.channels + channel; }
  template <class U>
  FASTKIT_DEVICE U* first(const Signal<U>& s) const {
    return s.data == nullptr ? nullptr : s.at(batch, channel) + span.begin * s.time;
  }
};

// Coefficients of the chunk that a row's sample is in.
template <class E>
struct Taps {
  using T = Arithmetic<E>;
  const T *a_row, *b_row;
  int64_t a_chunk, b_chunk, a_tap, b_tap, first_chunk, last_chunk;
  int chunk, k = 0, at = 0;  // its length and index; the sample's place in it
  T a1 = 0, a2 = 0, b0 = 1, b1 = 0, b2 = 0;

  FASTKIT_DEVICE Taps(const IirScan<E>& p, const Row<E>& row, int64_t filter)
      : a_row(p.a.at(row.batch, row.channel) + filter * p.a.filter),
        b_row(p.b.data == nullptr ? nullptr : p.b.at(row.batch, row.channel) + filter * p.b.filter),
        a_chunk(p.a.chunk), b_chunk(p.b.chunk), a_tap(p.a.tap), b_tap(p.b.tap), first_chunk(row.span.first_chunk),
        last_chunk(p.chunks - 1), chunk(p.chunk < INT32_MAX ? static_cast<int>(p.chunk) : INT32_MAX) {}

  FASTKIT_DEVICE void seek(int t) {
    k = t / chunk, at = t - k * chunk;
    load();
  }
  template <bool kReverse>
  FASTKIT_DEVICE void next() {
    if (kReverse ? at == 0 : at == chunk - 1) {
      k += kReverse ? -1 : 1, at = kReverse ? chunk - 1 : 0;
      load();
    } else {
      at += kReverse ? -1 : 1;
    }
  }
  FASTKIT_DEVICE bool opens() const { return at == 0 && k > 0; }  // a chunk that has one before it

 private:
  FASTKIT_DEVICE void load() {
    const int64_t which = first_chunk + k < last_chunk ? first_chunk + k : last_chunk;  // K may not fit cu_seqlens
    const T* a = a_row + which * a_chunk;
    a1 = a[0], a2 = a[a_tap];
    if (b_row == nullptr) return;
    const T* b = b_row + which * b_chunk;
    b0 = b[0], b1 = b[b_tap], b2 = b[2 * b_tap];
  }
};

// A signal `lag` samples before a row's sample t; where that is before the first, the row's state.
template <class E>
FASTKIT_DEVICE Arithmetic<E> before(const E* signal, int64_t stride, const Arithmetic<E>* state, int t, int lag) {
  if (t >= lag) return widen_element<E>(signal[(t - lag) * stride]);
  return state == nullptr ? 0 : state[lag - 1 - t];
}

// Walks the rows of a group through one segment; kMaps: only composes what it does to the state.
template <class E, bool kReverse, bool kMaps>
struct Segments {
  using T = Arithmetic<E>;
  static constexpr int R = kRun<T>;
  Walk<E, kReverse> w;

  // A tile: R samples of every lane, a lane's apart from the next one's by one more, for the sake of memory banks.
  struct Room {
    T in[kWarpLanes * (R + 1)], out[kWarpLanes * (R + 1)];
  };

  static int64_t units(const Walk<E, kReverse>& w) {
    return Walk<E, kReverse>::groups(w.p) * w.segments * (kMaps ? w.p.filters : 1);
  }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room& room) const {
    const int64_t groups = Walk<E, kReverse>::groups(w.p);
    const int64_t segment = unit % w.segments, group = unit / w.segments % groups;
    const int64_t filter = kMaps ? unit / w.segments / groups : 0;
    if (w.p.channels_last) {
      walk_lanes(warp, group, segment, filter, room);
    } else {
      walk_tiles(warp, group, segment, filter, room);
    }
  }

 private:
  // Positions count along the walk: from the row's end if kReverse.
  static FASTKIT_DEVICE int sample(int position, int time) { return kReverse ? time - 1 - position : position; }

  FASTKIT_DEVICE void bounds(const Row<E>& row, int64_t segment, int& begin, int& end) const {
    const int64_t time = row.idle ? 0 : row.span.time, from = segment * w.length, to = from + w.length;
    begin = static_cast<int>(from < time ? from : time), end = static_cast<int>(to < time ? to : time);
  }

  // A lane's n samples from position `at` on: composes them to a map, or walks them from s and puts the results.
  template <class State>
  FASTKIT_DEVICE void run(const Row<E>& row, int64_t filter, int at, int n, const T* in, State& s, T* out) const {
    if (n <= 0) return;
    Taps<E> taps(w.p, row, w.first_filter + filter);
    const int t = sample(at, static_cast<int>(row.span.time));
    taps.seek(t);
    const bool carry = w.p.carry, numerator = !kReverse && w.p.b.data != nullptr;
    T x1 = 0, x2 = 0;
    if (numerator) {
      const T* state = w.p.state_x == nullptr ? nullptr : w.p.state_x + 2 * row.index(w.p);
      const E* x = row.first(w.in);
      if (carry || taps.k == 0 || taps.at >= 1) x1 = before<E>(x, w.in.time, state, t, 1);
      if (carry || taps.k == 0 || taps.at >= 2) x2 = before<E>(x, w.in.time, state, t, 2);
    }
    for (int i = 0; i < n; ++i) {
      if (i > 0) taps.template next<kReverse>();
      if (!kReverse && !carry && taps.opens()) forget(s), x1 = x2 = 0;
      T u = in[i];
      if (numerator) {
        const T x0 = u;
        u = taps.b0 * x0 + (taps.b1 * x1 + taps.b2 * x2);
        x2 = x1, x1 = x0;
      }
      one(s, u, taps, out + i, filter);
      if (kReverse && !carry && taps.opens()) forget(s);
    }
  }
  static FASTKIT_DEVICE void one(Two<T>& s, T in, const Taps<E>& taps, T* out, int64_t filter) {
    const T y = step<kReverse>(s, in, taps.a1, taps.a2);
    *out = filter == 0 ? y : *out + y;
  }
  static FASTKIT_DEVICE void one(Map<T>& m, T in, const Taps<E>& taps, T*, int64_t) {
    step<kReverse>(m.first, T{0}, taps.a1, taps.a2), step<kReverse>(m.second, T{0}, taps.a1, taps.a2);
    step<kReverse>(m.rest, in, taps.a1, taps.a2);
  }
  static FASTKIT_DEVICE void forget(Two<T>& s) { s = {}; }
  static FASTKIT_DEVICE void forget(Map<T>& m) { m = {{}, {}, {}, 1}; }

  FASTKIT_DEVICE Two<T> entering(int64_t filter, int64_t segment, int64_t row) const {
    const T* at = w.states + 2 * w.place(filter, segment, row);
    return {at[0], at[1]};
  }
  FASTKIT_DEVICE void leave(int64_t filter, int64_t segment, int64_t row, Two<T> s) const {
    T* at = w.states + 2 * w.place(filter, segment, row);
    at[0] = s.v1, at[1] = s.v2;
  }

  // Time has stride 1: a run to each lane.
  template <class Warp>
  FASTKIT_DEVICE void walk_tiles(Warp& warp, int64_t group, int64_t segment, int64_t filter, Room& room) const {
    const Row<E> row(w.p, group, 0);
    const int64_t index = row.index(w.p);
    const int time = static_cast<int>(row.span.time);
    int begin, end;
    bounds(row, segment, begin, end);
    const E* const in = row.first(w.in);
    auto* const out = row.first(w.out);
    typename Warp::template PerLane<Map<T>> total{};
    for (int tile = begin; tile < end; tile += kWarpLanes * R) {
      const auto samples = [&](int lane) { return end - tile - lane * R < R ? end - tile - lane * R : R; };
      const auto whole_tile = [&](auto&& move) {  // neighbouring lanes move neighbouring samples
        warp.each([&](int lane) {
FASTKIT_UNROLL
          for (int i = 0; i < R; ++i) {
            const int q = i * kWarpLanes + lane, position = tile + q;
            if (position < end) move(sample(position, time), q + q / R);
          }
        });
        warp.sync();
      };
      whole_tile([&](int t, int q) { room.in[q] = widen_element<E>(in[t * w.in.time]); });
      for (int64_t f = filter; f < (kMaps ? filter + 1 : w.p.filters); ++f) {
        typename Warp::template PerLane<Map<T>> map{};
        warp.each([&](int lane) {
          const int first = lane * (R + 1);
          run(row, f, tile + lane * R, samples(lane), room.in + first, map[lane], room.out + first);
        });
FASTKIT_UNROLL
        for (int distance = 1; distance < kWarpLanes; distance *= 2) {
          auto lower = warp.up(map, distance);
          warp.each([&](int lane) {
            if (lane >= distance) map[lane] = map[lane].after(lower[lane]);
          });
        }
        if constexpr (kMaps) {  // the last lane's is the tile's
          warp.each([&](int lane) { total[lane] = map[lane].after(total[lane]); });
          warp.sync();
        } else {
          auto lower = warp.up(map, 1);
          typename Warp::template PerLane<Two<T>> leaves;
          warp.each([&](int lane) {
            const int first = lane * (R + 1);
            Two<T> s = entering(f, segment, index);
            if (lane > 0) s = lower[lane](s);
            run(row, f, tile + lane * R, samples(lane), room.in + first, s, room.out + first);
            leaves[lane] = s;
          });
          warp.sync();
          warp.each([&](int lane) {
            if (lane == kWarpLanes - 1) leave(f, segment, index, leaves[lane]);
          });
          warp.sync();
        }
      }
      if constexpr (!kMaps) whole_tile([&](int t, int q) { put(out[t * w.out.time], room.out[q]); });
    }
    warp.each([&](int lane) {
      if (kMaps && lane == kWarpLanes - 1) w.maps[w.place(filter, segment, index)] = total[lane];
      if (!kMaps && lane == 0) finish(row, segment);
    });
  }

  // Channels have stride 1: a row to each lane.
  template <class Warp>
  FASTKIT_DEVICE void walk_lanes(Warp& warp, int64_t group, int64_t segment, int64_t filter, Room& room) const {
    warp.each([&](int lane) {
      const Row<E> row(w.p, group, lane);
      if (row.idle) return;
      const int64_t index = row.index(w.p);
      const int time = static_cast<int>(row.span.time);
      int begin, end;
      bounds(row, segment, begin, end);
      const E* const in = row.first(w.in);
      auto* const out = row.first(w.out);
      T *const from = room.in + lane * (R + 1), *const to = room.out + lane * (R + 1);
      Map<T> total;
      for (int at = begin; at < end; at += R) {
        const int n = end - at < R ? end - at : R;
FASTKIT_UNROLL
        for (int i = 0; i < R; ++i) {
          if (i < n) from[i] = widen_element<E>(in[sample(at + i, time) * w.in.time]);
        }
        if constexpr (kMaps) {
          run(row, filter, at, n, from, total, to);
        } else {
          for (int64_t f = 0; f < w.p.filters; ++f) {
            Two<T> s = entering(f, segment, index);
            run(row, f, at, n, from, s, to);
            leave(f, segment, index, s);
          }
          for (int i = 0; i < n; ++i) put(out[sample(at + i, time) * w.out.time], to[i]);
        }
      }
      if constexpr (kMaps) {
        w.maps[w.place(filter, segment, index)] = total;
      } else {
        finish(row, segment);
      }
    });
  }

  static FASTKIT_DEVICE void put(std::conditional_t<kReverse, T, E>& to, T value) {
    if constexpr (kReverse) {
      to = value;
    } else {
      to = round_element<E>(value);
    }
  }

  // The row's last segment tells its final state.
  FASTKIT_DEVICE void finish(const Row<E>& row, int64_t segment) const {
    const int64_t time = row.span.time, last = time == 0 ? 0 : (time - 1) / w.length;
    if (w.final == nullptr || segment != last) return;
    for (int64_t f = 0; f < w.p.filters; ++f) {
      const Two<T> s = entering(f, segment, row.index(w.p));
      T* to = w.final + 2 * (row.index(w.p) * w.all_filters + w.first_filter + f);
      to[0] = s.v1, to[1] = s.v2;
    }
  }
};

// What enters each segment, from the initial state on: a row and filter to each lane.
template <class E, bool kReverse>
struct Enter {
  using T = Arithmetic<E>;
  Walk<E, kReverse> w;
  struct Room {};

  static int64_t units(const Walk<E, kReverse>& w) {
    return (w.p.batch * w.p.channels * w.p.filters + kWarpLanes - 1) / kWarpLanes;
  }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room&) const {
    warp.each([&](int lane) {
      const int64_t which = unit * kWarpLanes + lane, row = which % w.rows(), f = which / w.rows();
      if (f >= w.p.filters) return;
      Two<double> s;
      if (w.initial != nullptr) {
        const T* from = w.initial + 2 * (row * w.all_filters + w.first_filter + f);
        s = {from[0], from[1]};
      }
      for (int64_t segment = 0; segment < w.segments; ++segment) {
        T* to = w.states + 2 * w.place(f, segment, row);
        to[0] = static_cast<T>(s.v1), to[1] = static_cast<T>(s.v2);
        if (w.maps == nullptr) {
          s = {};
        } else {
          s = w.maps[w.place(f, segment, row)](s);
        }
      }
    });
  }
};

// x after the last sample, as a state: a row to each lane.
template <class E>
struct EndOfX {
  using T = Arithmetic<E>;
  IirScan<E> p;
  T* end_x;
  struct Room {};

  static int64_t units(const IirScan<E>& p) { return (p.batch * p.channels + kWarpLanes - 1) / kWarpLanes; }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room&) const {
    warp.each([&](int lane) {
      const int64_t index = unit * kWarpLanes + lane;
      if (index >= p.batch * p.channels) return;
      const int64_t batch = index / p.channels, channel = index % p.channels;
      const Span span = p.span(batch);
      const int time = static_cast<int>(span.time);
      const E* x = p.x.data == nullptr ? nullptr : p.x.at(batch, channel) + span.begin * p.x.time;
      const T* state = p.state_x == nullptr ? nullptr : p.state_x + 2 * index;
      end_x[2 * index] = before<E>(x, p.x.time, state, time, 1);
      const bool forgets = !p.carry && time > 1 && (time - 1) % p.chunk == 0;
      end_x[2 * index + 1] = forgets ? T{0} : before<E>(x, p.x.time, state, time, 2);
    });
  }
};

// Backward once l is there: gx, and the sums of a chunk's coefficients over pieces of it.
template <class E>
struct ReadOff {
  using T = Arithmetic<E>;
  IirScanBackward<E> p;
  Signal<const T> l;
  Signal<const E> y;           // of the filter
  int64_t filter = 0, pieces = 1;
  bool adds = false;           // to gx, what filters before this one have left there
  T* sums = nullptr;           // (piece, row, chunk, 5): -l y1, -l y2, l x0, l x1, l x2; null: not wanted
  struct Room {};

  // Chunks shorter than a warp: of one row where time has stride 1, a chunk to each lane.
  static FASTKIT_ALWAYS_INLINE bool chunk_to_lane(const IirScan<E>& p) {
    return !p.channels_last && p.chunk < kWarpLanes;
  }
  // Samples of a piece: lanes share it where time has stride 1.
  static FASTKIT_ALWAYS_INLINE int64_t piece_length(const IirScan<E>& p) {
    return p.channels_last ? kPiece : kPiece * (kWarpLanes / 2);
  }
  static FASTKIT_ALWAYS_INLINE int64_t rows(const IirScan<E>& p) {  // with chunks of their own
    return (p.offsets == nullptr ? p.batch : 1) * p.channels;
  }
  static FASTKIT_ALWAYS_INLINE int64_t groups(const IirScan<E>& p) {
    const int64_t batch = p.offsets == nullptr ? p.batch : 1;
    return batch * (p.channels_last ? (p.channels + kWarpLanes - 1) / kWarpLanes : p.channels);
  }
  static FASTKIT_ALWAYS_INLINE int64_t chunks_to_walk(const IirScan<E>& p) {
    return chunk_to_lane(p) ? (p.chunks + kWarpLanes - 1) / kWarpLanes : p.chunks;
  }
  static int64_t units(const ReadOff& r) { return groups(r.p) * chunks_to_walk(r.p) * r.pieces; }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room&) const {
    const int64_t piece = unit % pieces, chunk = unit / pieces % chunks_to_walk(p);
    const int64_t group = unit / pieces / chunks_to_walk(p);
    struct Sums {
      T v[5];
    };
    typename Warp::template PerLane<Sums> total;
    warp.each([&](int lane) {
      Sums& sum = total[lane];
      for (int q = 0; q < 5; ++q) sum.v[q] = 0;
      const bool to_lane = chunk_to_lane(p);
      const int64_t k = to_lane ? chunk * kWarpLanes + lane : chunk;
      if (k >= p.chunks) return;
      Row<E> row(p, group, lane);
      if (row.idle) return;
      if (p.offsets != nullptr) {  // the sequence whose chunk k is: the last that begins at or before it
        int64_t low = 0, high = p.batch;
        while (high - low > 1) {
          const int64_t middle = (low + high) / 2;
          (p.first_chunks[middle] <= k ? low : high) = middle;
        }
        row.batch = low, row.span = p.span(low);
      }
      const int64_t own = k - row.span.first_chunk, begin = own * (own == 0 ? 0 : p.chunk);
      const int64_t end = p.chunk < row.span.time - begin ? begin + p.chunk : row.span.time;
      const int64_t from = begin + piece * piece_length(p);
      const int64_t to = from + piece_length(p) < end ? from + piece_length(p) : end;
      const bool strided = !p.channels_last && !to_lane;  // lanes take turns
      if (own < row.span.chunks && from < end) {
        const int first = static_cast<int>(strided ? from + lane : from), stride = strided ? kWarpLanes : 1;
        read_off(row, first, static_cast<int>(to), stride, sum);
      }
      if (!strided && sums != nullptr) store(piece, p.row(row.batch, row.channel), k, sum);
    });
    if (p.channels_last || chunk_to_lane(p) || sums == nullptr) return;
FASTKIT_UNROLL
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {  // the last lane gets them all
      auto lower = warp.up(total, distance);
      warp.each([&](int lane) {
        for (int q = 0; q < 5; ++q) total[lane].v[q] += lane >= distance ? lower[lane].v[q] : T{0};
      });
    }
    warp.each([&](int lane) {
      if (lane == kWarpLanes - 1) store(piece, p.offsets == nullptr ? group : group % p.channels, chunk, total[lane]);
    });
  }

 private:
  template <class Sums>
  FASTKIT_DEVICE void store(int64_t piece, int64_t row, int64_t k, const Sums& sum) const {
    T* to = sums + ((piece * rows(p) + row) * p.chunks + k) * 5;
    for (int q = 0; q < 5; ++q) to[q] = sum.v[q];
  }

  template <class Sums>
  FASTKIT_DEVICE void read_off(const Row<E>& row, int from, int to, int stride, Sums& sum) const {
    const int time = static_cast<int>(row.span.time);
    const bool numerator = p.b.data != nullptr;
    const T* const ls = row.first(l);
    const E *const xs = row.first(p.x), *const ys = row.first(y);
    E* const gx = row.first(p.gx);
    const int64_t state = 2 * row.index(p), state_f = 2 * (row.index(p) * p.filters + filter);
    const T* const state_x = p.state_x == nullptr ? nullptr : p.state_x + state;
    if (from >= to) return;
    Taps<E> taps(p, row, filter);
    taps.seek(from);
    const int begin = from - taps.at;
    const bool meets = p.carry || taps.k == 0;  // what is before its chunk
    for (int t = from; t < to; t += stride) {
      const int at = t - begin;
      const T l0 = ls[t * l.time];
      if (gx != nullptr) {
        T g = taps.b0 * l0;
        if (filter == 0 && p.gend_x != nullptr) {
          if (t == time - 1) g += p.gend_x[state];
          if (t == time - 2 && (p.carry || at + 1 < taps.chunk)) g += p.gend_x[state + 1];
        }
        if (numerator) {
          if (t + 1 < time) g += owed<1>(row, taps, t, at) * ls[(t + 1) * l.time];
          if (t + 2 < time) g += owed<2>(row, taps, t, at) * ls[(t + 2) * l.time];
        }
        E& put = gx[t * p.gx.time];
        put = round_element<E>(adds ? g + widen_element<E>(put) : g);
      }
      if (sums == nullptr) continue;
      const T* const state_y = p.state_y == nullptr ? nullptr : p.state_y + state_f;
      const T y1 = meets || at >= 1 ? before<E>(ys, y.time, state_y, t, 1) : T{0};
      const T y2 = meets || at >= 2 ? before<E>(ys, y.time, state_y, t, 2) : T{0};
      sum.v[0] -= l0 * y1, sum.v[1] -= l0 * y2;
      if (!numerator) continue;
      const T x1 = meets || at >= 1 ? before<E>(xs, p.x.time, state_x, t, 1) : T{0};
      const T x2 = meets || at >= 2 ? before<E>(xs, p.x.time, state_x, t, 2) : T{0};
      sum.v[2] += l0 * widen_element<E>(xs[t * p.x.time]), sum.v[3] += l0 * x1, sum.v[4] += l0 * x2;
    }
  }

  // What sample t, `at` in its chunk, is multiplied with `lag` samples later.
  template <int lag>
  FASTKIT_DEVICE T owed(const Row<E>& row, const Taps<E>& taps, int t, int at) const {
    if (at < taps.chunk - lag) return lag == 1 ? taps.b1 : taps.b2;
    if (!p.carry) return 0;
    Taps<E> later(p, row, filter);
    later.seek(t + lag);
    return lag == 1 ? later.b1 : later.b2;
  }
};

// The sums of a chunk's pieces: a row and chunk to each lane.
template <class E>
struct Finish {
  using T = Arithmetic<E>;
  IirScanBackward<E> p;
  const T* sums;
  int64_t filter, pieces;
  struct Room {};

  static int64_t count(const IirScan<E>& p) { return ReadOff<E>::rows(p) * p.chunks; }
  static int64_t units(const Finish& f) { return (count(f.p) + kWarpLanes - 1) / kWarpLanes; }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room&) const {
    warp.each([&](int lane) {
      const int64_t which = unit * kWarpLanes + lane, batch = p.offsets == nullptr ? p.batch : 1;
      const int64_t all = batch * p.channels * p.chunks;
      if (which >= all) return;
      double total[5] = {};
      for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int q = 0; q < 5; ++q) total[q] += static_cast<double>(sums[(piece * all + which) * 5 + q]);
      }
      const int64_t at = which * p.filters + filter;
      for (int q = 0; q < 2; ++q) p.ga[2 * at + q] = static_cast<T>(total[q]);
      for (int q = 0; p.gb != nullptr && q < 3; ++q) p.gb[3 * at + q] = static_cast<T>(total[2 + q]);
    });
  }
};

// The gradient of x's initial state: a row to each lane.
template <class E>
struct StateOfX {
  using T = Arithmetic<E>;
  IirScanBackward<E> p;
  Signal<const T> l;
  int64_t filter;
  struct Room {};

  static int64_t units(const IirScan<E>& p) { return EndOfX<E>::units(p); }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room&) const {
    warp.each([&](int lane) {
      const int64_t index = unit * kWarpLanes + lane;
      if (index >= p.batch * p.channels) return;
      const int64_t batch = index / p.channels, channel = index % p.channels;
      Two<T> g;
      if (filter > 0) g = {p.gstate_x[2 * index], p.gstate_x[2 * index + 1]};
      const Span span = p.span(batch);
      if (filter == 0 && p.gend_x != nullptr) {
        const T *end = p.gend_x + 2 * index;
        if (span.time == 0) g = {end[0], end[1]};
        if (span.time == 1) g = {end[1], 0};
      }
      if (span.time > 0 && p.b.data != nullptr) {
        Row<E> row(p, 0, 0);
        row.batch = batch, row.channel = channel, row.span = span;
        const T* ls = row.first(l);
        Taps<E> taps(p, row, filter);
        taps.seek(0);
        g.v1 += taps.b1 * ls[0], g.v2 += taps.b2 * ls[0];
        if (span.time > 1) {
          taps.seek(1);
          if (p.carry || taps.k == 0) g.v1 += taps.b2 * ls[l.time];
        }
      }
      p.gstate_x[2 * index] = g.v1, p.gstate_x[2 * index + 1] = g.v2;
    });
  }
};

// Where packed sequences and their chunks begin, from cu_seqlens, made to fit what there is: one warp.
template <class Index>
struct Unpack {
  const Index* cu_seqlens;
  int64_t sequences, total, chunk;
  bool one_chunk;               // of every sequence, also of an empty one
  int64_t *offsets, *first_chunks;  // sequences + 1 each
  struct Room {};

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t, Room&) const {
    warp.each([&](int lane) {
      for (int64_t s = lane; s <= sequences; s += kWarpLanes) {
        const int64_t at = static_cast<int64_t>(cu_seqlens[s]);
        offsets[s] = at < 0 ? 0 : at < total ? at : total;
      }
    });
    warp.sync();
    warp.each([&](int lane) {
      for (int64_t s = 1; lane == 0 && s <= sequences; ++s) {
        if (offsets[s] < offsets[s - 1]) offsets[s] = offsets[s - 1];
      }
    });
    warp.sync();
    warp.each([&](int lane) {
      for (int64_t s = lane; s < sequences; s += kWarpLanes) {
        first_chunks[s + 1] = one_chunk ? 1 : (offsets[s + 1] - offsets[s] + chunk - 1) / chunk;
      }
      if (lane == 0) first_chunks[0] = 0;
    });
    warp.sync();
    warp.each([&](int lane) {
      for (int64_t s = 1; lane == 0 && s <= sequences; ++s) first_chunks[s] += first_chunks[s - 1];
    });
  }
};

// --- calls -----------------------------------------------------------------------------------------------------
//
// Stream: run(body, units), T* allocate<T>(count), warps(): how many fill the GPU.

// Into how many segments the rows of a walk are cut.
template <class E, bool kReverse, class Stream>
void cut(Walk<E, kReverse>& w, Stream& stream) {
  const IirScan<E>& p = w.p;
  const int64_t groups = w.groups(p), time = p.time > 0 ? p.time : 1, wanted = stream.warps();
  const int64_t tile = (p.channels_last ? 4 : kWarpLanes) * kRun<Arithmetic<E>>;
  w.segments = 1, w.length = time;
  if (groups > 0 && groups < wanted / 2 && time > tile) {
    w.segments = wanted / groups + 1 < kSegments ? wanted / groups + 1 : kSegments;
    w.length = ((time + w.segments - 1) / w.segments + tile - 1) / tile * tile;
    if (!p.carry && p.chunk < time) w.length = (w.length + p.chunk - 1) / p.chunk * p.chunk;
    w.segments = (time + w.length - 1) / w.length;
  }
  const bool whole_chunks = !kReverse || (p.offsets == nullptr && time % p.chunk == 0);
  const bool apart = !p.carry && w.length % p.chunk == 0 && whole_chunks;
  const int64_t count = p.filters * w.segments * p.batch * p.channels;
  w.states = stream.template allocate<Arithmetic<E>>(2 * count);
  if (w.segments > 1 && !apart) w.maps = stream.template allocate<Map<Arithmetic<E>>>(count);
}

template <class E, bool kReverse, class Stream>
void walk(Walk<E, kReverse> w, Stream& stream) {
  cut(w, stream);
  using Reduce = Segments<E, kReverse, true>;
  using Apply = Segments<E, kReverse, false>;
  if (w.maps != nullptr) stream.run(Reduce{w}, Reduce::units(w));
  stream.run(Enter<E, kReverse>{w}, Enter<E, kReverse>::units(w));
  stream.run(Apply{w}, Apply::units(w));
}

// Memory for a signal in float arithmetic, laid out like the call's.
template <class E, class Stream>
Signal<Arithmetic<E>> like(const IirScan<E>& p, Stream& stream) {
  const int64_t batch = p.offsets == nullptr ? p.batch : 1;
  auto* data = stream.template allocate<Arithmetic<E>>(batch * p.channels * p.time);
  const int64_t whole = p.offsets == nullptr ? p.channels * p.time : 0;
  if (p.channels_last) return {data, whole, 1, p.channels};
  return {data, whole, p.time, 1};
}

template <class E, class Stream>
void forward(const IirScanForward<E>& p, Stream& stream) {
  walk<E, false>({p, p.x, p.y, p.state_y, p.end_y, 0, p.filters}, stream);
  if (p.end_x != nullptr) stream.run(EndOfX<E>{p, p.end_x}, EndOfX<E>::units(p));
}

template <class E, class Stream>
void backward(const IirScanBackward<E>& p, Stream& stream) {
  using T = Arithmetic<E>;
  IirScan<E> one = p;
  one.filters = 1;
  const Signal<T> l = like<E>(p, stream);
  const Signal<const T> l_in{l.data, l.batch, l.channel, l.time};
  ReadOff<E> read{p, l_in, p.y};
  Signal<T> y{};
  if constexpr (IsSame<E, T>) {
    if (p.filters > 1) y = like<E>(p, stream), read.y = {y.data, y.batch, y.channel, y.time};
  }
  const int64_t longest = p.chunk < p.time ? p.chunk : p.time, of_piece = ReadOff<E>::piece_length(p);
  read.pieces = longest > of_piece ? (longest + of_piece - 1) / of_piece : 1;
  if (p.ga != nullptr) read.sums = stream.template allocate<T>(read.pieces * Finish<E>::count(p) * 5);
  for (int64_t f = 0; f < p.filters; ++f) {
    if constexpr (IsSame<E, T>) {
      if (p.filters > 1 && p.ga != nullptr) walk<E, false>({one, p.x, y, p.state_y, nullptr, f, p.filters}, stream);
    }
    walk<E, true>({one, p.gy, l, p.gend_y, p.gstate_y, f, p.filters}, stream);
    read.filter = f, read.adds = f > 0;
    if (p.gx.data != nullptr || p.ga != nullptr) stream.run(read, ReadOff<E>::units(read));
    const Finish<E> finish{p, read.sums, f, read.pieces};
    if (p.ga != nullptr) stream.run(finish, Finish<E>::units(finish));
    if (p.gstate_x != nullptr) stream.run(StateOfX<E>{p, l_in, f}, StateOfX<E>::units(p));
  }
}

}  // namespace fastkit::iir_scan_warps
