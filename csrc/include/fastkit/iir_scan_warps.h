// iir_scan on the GPU: what its warps do. Plain functors of a warp (common/warp.h), which tests also run on the host.
//
// What       second-order recursions, forward and from the end, coefficients per (row, chunk, filter), chunks of any
//            length, either stride, packed sequences, states.
// Parallel   rows are cut along time into segments, a warp to each. Where time has stride 1 a warp has one row: a tile
//            is kRun samples of every lane; each lane composes its run to an affine map of the state (y[t-1], y[t-2]),
//            a scan over the lanes gives what enters each run, and the run is walked again from there. Where channels
//            have stride 1 a lane has a row of its own, and walks. Rows enough to fill the GPU are one segment each.
//            Otherwise Segments reduces each segment to its map, Enter follows the maps of a row, and then Segments
//            walks them all. Where runs fit chunks and memory, iir_scan_warps_walks.h does all this faster.
// Bytes      per fp32 sample: reads x, writes y (8), and reads x once more for each filter where rows are cut. Per
//            chunk the coefficients.
// Numerics   y = (u - a2 y2) - a1 y1; maps in double. No atomics: the same call gives the same bits. Of an unstable
//            filter, whose powers overflow within a tile or segment, NaN may come earlier than the plain recursion has
//            it.
// Backward   the same walk from the end gives l; what is read off it then is in iir_scan_warps_gradients.h.
#pragma once

#include <type_traits>

#include "common/convert.h"
#include "common/warp.h"
#include "fastkit/iir_scan.h"

namespace fastkit::iir_scan_warps {

template <class T>
inline constexpr int kRun = 64 / sizeof(T);  // samples of a lane in a tile
inline constexpr int64_t kSegments = 512;    // of a row, at most: Enter follows them one by one

// One sample: a signal filtered by 1 / A, or by its transpose from the end, where s is owed to the samples that follow.
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

// s -> s.v1 first + s.v2 second + rest. In double: a map over hundreds of samples is a product of as many, which float
// would leave with four digits.
struct Affine {
  Two<double> first{1, 0}, second{0, 1}, rest{0, 0};

  FASTKIT_DEVICE Two<double> linear(Two<double> s) const {
    return {first.v1 * s.v1 + second.v1 * s.v2, first.v2 * s.v1 + second.v2 * s.v2};
  }
  FASTKIT_DEVICE Two<double> operator()(Two<double> s) const {
    return {first.v1 * s.v1 + (second.v1 * s.v2 + rest.v1), first.v2 * s.v1 + (second.v2 * s.v2 + rest.v2)};
  }
  FASTKIT_DEVICE Affine after(const Affine& before) const {
    return {linear(before.first), linear(before.second), (*this)(before.rest)};
  }
};

// Where it forgets, s is not looked at: it may be NaN.
struct Map : Affine {
  uint32_t forgets = 0;

  FASTKIT_DEVICE Two<double> operator()(Two<double> s) const { return forgets ? rest : Affine::operator()(s); }
  FASTKIT_DEVICE Map after(const Map& before) const {
    if (forgets) return *this;
    return {Affine::after(before), before.forgets};
  }
};

template <class T>
FASTKIT_DEVICE Two<T> narrowed(Two<double> s) {
  return {static_cast<T>(s.v1), static_cast<T>(s.v2)};
}

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
  Map* maps = nullptr;  // of each segment; null: history never crosses from one to the next

  FASTKIT_DEVICE int64_t rows() const { return p.batch * p.channels; }
  FASTKIT_DEVICE int64_t place(int64_t filter, int64_t segment, int64_t row) const {
    return (filter * segments + segment) * rows() + row;
  }
  // The state before the first segment.
  FASTKIT_DEVICE Two<double> before_all(int64_t filter, int64_t row) const {
    if (initial == nullptr) return {};
    const T* from = initial + 2 * (row * all_filters + first_filter + filter);
    return {from[0], from[1]};
  }
  FASTKIT_DEVICE Two<double> entering(int64_t segment, int64_t row) const {  // of the only filter
    if (states == nullptr) return before_all(0, row);
    const T* from = states + 2 * place(0, segment, row);
    return {from[0], from[1]};
  }
  FASTKIT_DEVICE void leave_all(int64_t row, Two<T> s) const {
    if (final == nullptr) return;
    T* to = final + 2 * (row * all_filters + first_filter);
    to[0] = s.v1, to[1] = s.v2;
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

  static constexpr int kWarps = 1;
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
  static FASTKIT_DEVICE void one(Map& m, T in, const Taps<E>& taps, T*, int64_t) {
    const double a1 = taps.a1, a2 = taps.a2;
    step<kReverse>(m.first, 0.0, a1, a2), step<kReverse>(m.second, 0.0, a1, a2);
    step<kReverse>(m.rest, static_cast<double>(in), a1, a2);
  }
  static FASTKIT_DEVICE void forget(Two<T>& s) { s = {}; }
  static FASTKIT_DEVICE void forget(Map& m) { m = {{{}, {}, {}}, 1}; }

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
    typename Warp::template PerLane<Map> total{};
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
        typename Warp::template PerLane<Map> map{};
        warp.each([&](int lane) {
          const int first = lane * (R + 1);
          run(row, f, tile + lane * R, samples(lane), room.in + first, map[lane], room.out + first);
        });
        scan(warp, map, [](const Map& upper, const Map& lower) { return upper.after(lower); });
        if constexpr (kMaps) {  // the last lane's is the tile's
          warp.each([&](int lane) { total[lane] = map[lane].after(total[lane]); });
          warp.sync();
        } else {
          auto lower = warp.up(map, 1);
          typename Warp::template PerLane<Two<T>> leaves;
          warp.each([&](int lane) {
            const int first = lane * (R + 1);
            Two<T> s = entering(f, segment, index);
            if (lane > 0) s = narrowed<T>(lower[lane]({s.v1, s.v2}));
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
      Map total;
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

// What enters each segment of a row, from the initial state on: a warp for a row and filter, 32 segments at a time.
template <class E, bool kReverse>
struct Enter {
  using T = Arithmetic<E>;
  Walk<E, kReverse> w;
  static constexpr int kWarps = 1;
  struct Room {};

  static int64_t units(const Walk<E, kReverse>& w) { return w.p.batch * w.p.channels * w.p.filters; }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room&) const {
    const int64_t row = unit % w.rows(), f = unit / w.rows();
    typename Warp::template PerLane<Two<double>> state;
    warp.each([&](int lane) { state[lane] = w.before_all(f, row); });
    for (int64_t from = 0; from < w.segments; from += kWarpLanes) {
      typename Warp::template PerLane<Map> map;
      warp.each([&](int lane) {
        map[lane] = Map{};
        if (w.maps == nullptr) {
          map[lane].forgets = 1;
        } else if (from + lane < w.segments) {
          map[lane] = w.maps[w.place(f, from + lane, row)];
        }
      });
      scan(warp, map, [](const Map& upper, const Map& lower) { return upper.after(lower); });
      auto lower = warp.up(map, 1), last = warp.lane(map, kWarpLanes - 1);
      warp.each([&](int lane) {
        if (from + lane < w.segments) {
          const Two<T> s = narrowed<T>(lane == 0 ? state[lane] : lower[lane](state[lane]));
          T* to = w.states + 2 * w.place(f, from + lane, row);
          to[0] = s.v1, to[1] = s.v2;
        }
        state[lane] = last[lane](state[lane]);
      });
    }
  }
};

// x after the last sample, as a state: a row to each lane.
template <class E>
struct EndOfX {
  using T = Arithmetic<E>;
  IirScan<E> p;
  T* end_x;
  static constexpr int kWarps = 1;
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

}  // namespace fastkit::iir_scan_warps
