// iir_scan's gradients on the GPU, once iir_scan_warps.h has walked. Plain functors of a warp, like those.
//
// What       with l the gradient of the numerator's output, which a walk in transposed form from the end gives
//            (l = gy + s1, s1 = s2 - a1 l, s2 = -a2 l): gx, the coefficients' gradients and those of the states.
//            A bank is walked filter by filter, its y computed again.
// Parallel   ReadOff takes a piece of a chunk of a row to a warp, whose lanes take turns where time has stride 1 and
//            have a row each where channels have; chunks shorter than a warp are a lane's. Finish sums the pieces.
// Bytes      per fp32 sample and filter: reads gy, writes l (8, cut 12), then reads l, x, y and writes gx (16, without
//            b 12). Per chunk 20 bytes a piece, written and read again.
// Numerics   coefficient gradients: sums of at most kPiece samples of a lane in the type of arithmetic, then over
//            lanes, then in double. No atomics.
#pragma once

#include "fastkit/iir_scan_warps.h"

namespace fastkit::iir_scan_warps {

inline constexpr int kPiece = 128;  // samples of a chunk that one lane sums, at most

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
  static constexpr int kWarps = 1;
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
          const int left = p.carry ? time - t : left_in(taps, time, t, at);  // what comes later may be NaN
          if (1 < left) g += owed<1>(row, taps, t, at) * ls[(t + 1) * l.time];
          if (2 < left) g += owed<2>(row, taps, t, at) * ls[(t + 2) * l.time];
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

  // Samples of a chunk from t on, which is `at` in it.
  FASTKIT_DEVICE static int left_in(const Taps<E>& taps, int time, int t, int at) {
    return time - t < taps.chunk - at ? time - t : static_cast<int>(taps.chunk) - at;
  }

  // What sample t, `at` in its chunk, is multiplied with `lag` samples later.
  template <int lag>
  FASTKIT_DEVICE T owed(const Row<E>& row, const Taps<E>& taps, int t, int at) const {
    if (at < taps.chunk - lag) return lag == 1 ? taps.b1 : taps.b2;
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
  static constexpr int kWarps = 1;
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
  static constexpr int kWarps = 1;
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

}  // namespace fastkit::iir_scan_warps
