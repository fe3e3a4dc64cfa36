// iir_scan on the GPU where runs of kRun samples fit chunks and memory: the same walks as iir_scan_warps.h, by teams of
// warps whose tiles are fetched ahead, and a backward that passes once through its signals.
//
// What       one filter, not packed; chunks of whole runs. Forward, from the end, maps of segments, and all gradients
//            but those of x's states.
// Parallel   a tile is 32 runs of a row, one for each lane of the warp that walks the row. Where time has stride 1 a
//            team is one warp; where channels have, it is a warp for each of the neighbouring channels that fill a
//            sector of 32 bytes, and fetches their tile together. A lane has one filter for its run: it composes the
//            run to a map by its powers and by what the run leaves from zero, and walks it once what enters is known.
// Bytes      per fp32 sample: forward 8, backward 16 (gy, x, y; gx), and per chunk the coefficients and their
//            gradients. Where rows are cut, 4 more for the maps of segments, and backward as in
//            iir_scan_warps_gradients.h.
// Numerics   maps in double, walks in the type of arithmetic. Coefficient gradients: sums of a run, then over the runs
//            of a chunk in a tile, both in the type of arithmetic, then from tile to tile in double.
#pragma once

#include "fastkit/iir_scan_warps_tiles.h"

namespace fastkit::iir_scan_warps {

// Walks a segment, or composes it to its map: Segments of whole runs.
template <class E, bool kReverse, bool kMaps, bool kChannels>
struct WalkTiles {
  using T = Arithmetic<E>;
  using Out = std::conditional_t<kReverse, T, E>;
  static constexpr int R = kRun<T>, kWarps = kRows<E, kChannels>, kStages = 3;
  Walk<E, kReverse> w;

  struct Nothing {};
  struct Room {
    Tile<E, E, kChannels> in[kStages];
    std::conditional_t<kMaps, Nothing, Tile<E, Out, kChannels>> out;
  };

  static int64_t units(const Walk<E, kReverse>& w) {
    return Tiles<E, kReverse, kChannels>::groups(w.p) * w.segments;
  }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const Tiles<E, kReverse, kChannels> tiles(w.p, unit, w.segments, w.length);
    const int count = tiles.count();
    const bool numerator = !kReverse && w.p.b.data != nullptr;
    const auto row_of = [&](int thread) {
      return tiles.batch * w.p.channels + tiles.channel + thread / kWarpLanes;
    };
    const auto there = [&](int thread) { return tiles.channel + thread / kWarpLanes < w.p.channels; };

    struct Pair {
      T v1 = 0, v2 = 0;
    };
    struct Values {
      T v[R];
    };
    typename Team::template PerLane<Cursor<E, kReverse>> cursor;
    typename Team::template PerLane<Run<E, kReverse>> own, next;
    typename Team::template PerLane<Two<T>> enters;
    typename Team::template PerLane<Map> map, total{};
    typename Team::template PerLane<Pair> edge, lower_edge, tail;  // x's last two of a run, of the run before; of a tile
    typename Team::template PerLane<Values> values;

    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < count) tiles.fetch(team, room.in[stage], w.in, w.p, stage);
      team.commit();
    }
    team.each([&](int thread) {
      total[thread] = Map{};
      cursor[thread] = tiles.cursor(w.p, w.first_filter, thread);
      next[thread] = tiles.run(w.p, cursor[thread], thread);
      if (!there(thread)) return;
      const int64_t row = row_of(thread);
      enters[thread] = {};
      if (!kMaps) enters[thread] = narrowed<T>(w.entering(tiles.segment, row));
      if (numerator && count > 0) {
        const E* x = w.in.at(tiles.batch, tiles.channel + thread / kWarpLanes);
        const T* state = w.p.state_x == nullptr ? nullptr : w.p.state_x + 2 * row;
        const int t = tiles.begin * R;
        tail[thread] = {before<E>(x, w.in.time, state, t, 1), before<E>(x, w.in.time, state, t, 2)};
      }
    });
    for (int tile = 0; tile < count; ++tile) {
      auto& in = room.in[tile % kStages];
      team.template wait<kStages - 2>();
      team.sync();
      const int ahead = tile + kStages - 1;
      if (ahead < count) tiles.fetch(team, room.in[ahead % kStages], w.in, w.p, ahead);
      team.commit();
      team.each([&](int thread) {
        own[thread] = next[thread];
        cursor[thread].advance(tiles.length);
        next[thread] = tiles.run(w.p, cursor[thread], thread);
        T(&v)[R] = values[thread].v;
        in.load(thread / kWarpLanes, tiles.place(thread % kWarpLanes), v);
        edge[thread] = {v[R - 1], v[R - 2]};
      });
      if (numerator) lower_edge = team.turned(edge);
      team.each([&](int thread) {
        const Run<E, kReverse>& run = own[thread];
        T(&v)[R] = values[thread].v;
        if (numerator) {
          Pair x = thread % kWarpLanes == 0 ? tail[thread] : lower_edge[thread];
          tail[thread] = lower_edge[thread];
          if (run.forgets) x = {};
FASTKIT_UNROLL
          for (int i = R - 1; i >= 0; --i) {
            const T x1 = i >= 1 ? v[i >= 1 ? i - 1 : 0] : x.v1, x2 = i >= 2 ? v[i >= 2 ? i - 2 : 0] : i == 1 ? x.v1 : x.v2;
            v[i] = run.b0 * v[i] + (run.b1 * x1 + run.b2 * x2);
          }
        }
        Two<T> s;
        run.walk([&](int i) { step<kReverse>(s, v[i], run.a1, run.a2); });
        map[thread] = run.map(s);
      });
      auto lower = chain(team, map, w.p.carry);
      if constexpr (kMaps) {
        auto last = team.lane(map, kWarpLanes - 1);
        team.each([&](int thread) { total[thread] = last[thread].after(total[thread]); });
      } else {
        typename Team::template PerLane<Two<T>> leaves;
        team.each([&](int thread) {
          const Run<E, kReverse>& run = own[thread];
          T(&v)[R] = values[thread].v;
          const int lane = thread % kWarpLanes;
          Two<T> s = lane == 0 ? enters[thread] : after(lower[thread], enters[thread]);
          if (!kReverse && run.forgets) s = {};
          run.walk([&](int i) { v[i] = step<kReverse>(s, v[i], run.a1, run.a2); });
          if (kReverse && run.forgets) s = {};
          leaves[thread] = s;
          room.out.store(thread / kWarpLanes, tiles.place(lane), v);
        });
        auto last = team.lane(leaves, tiles.last_lane(tile));
        enters = last;
        team.sync();
        tiles.put(team, room.out, w.out, w.p, tile);
      }
    }
    team.each([&](int thread) {
      if (thread % kWarpLanes != 0 || !there(thread)) return;
      if constexpr (kMaps) {
        w.maps[w.place(0, tiles.segment, row_of(thread))] = total[thread];
      } else {
        if (tiles.end == tiles.runs) w.leave_all(row_of(thread), enters[thread]);
      }
    });
  }
};

// All of backward, of rows that are one segment: gx and the gradients of a, b and y's state.
template <class E, bool kChannels>
struct BackwardTiles {
  using T = Arithmetic<E>;
  static constexpr int R = kRun<T>, kWarps = kRows<E, kChannels>, kStages = 2;
  static constexpr int kResident = sizeof(T) == 8 ? 384 : 512;
  IirScanBackward<E> p;

  struct Room {
    Tile<E, E, kChannels> gy[kStages], x[kStages], y[kStages];  // gx replaces gy
    double pending[2][kWarps][5];  // sums of a chunk that goes on in the next tile, of even tiles and of odd ones
    T before[kWarps][4];  // y's two samples before the tile, and x's: for one lane of a warp, which lacks registers
  };

  static int64_t units(const IirScan<E>& p) { return Tiles<E, true, kChannels>::groups(p); }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const Tiles<E, true, kChannels> tiles(p, unit, 1, p.time);
    const int count = tiles.count();
    const bool numerator = p.b.data != nullptr, sums = p.ga != nullptr;
    const auto channel_of = [&](int thread) { return tiles.channel + thread / kWarpLanes; };
    const auto row_of = [&](int thread) { return tiles.batch * p.channels + channel_of(thread); };
    const auto there = [&](int thread) { return channel_of(thread) < p.channels; };
    const auto fetch = [&](int tile) {
      const int stage = tile % kStages;
      if (tile < count) {
        tiles.fetch(team, room.gy[stage], p.gy, p, tile);
        if (sums) tiles.fetch(team, room.y[stage], p.y, p, tile);
        if (sums && numerator) tiles.fetch(team, room.x[stage], p.x, p, tile);
      }
      team.commit();
    };

    struct Pair {
      T v1 = 0, v2 = 0;
    };
    struct Values {
      T v[R];
    };
    struct Sums {  // -l y1, -l y2, l x0, l x1, l x2
      T v[5];
      uint32_t closed;  // later runs are of another chunk
    };
    typename Team::template PerLane<Cursor<E, true>> cursor;
    typename Team::template PerLane<Run<E, true>> own;
    typename Team::template PerLane<Two<T>> enters;
    typename Team::template PerLane<Map> map;
    typename Team::template PerLane<Pair> owed, later, from_later;
    typename Team::template PerLane<Values> values;
    typename Team::template PerLane<Sums> sum;

    fetch(0);
    team.each([&](int thread) {
      for (int q = 0; q < 5; ++q) room.pending[0][thread / kWarpLanes][q] = 0;
      cursor[thread] = tiles.cursor(p, 0, thread);
      from_later[thread] = {};
      enters[thread] = {};
      if (there(thread) && p.gend_y != nullptr) {
        const T* from = p.gend_y + 2 * row_of(thread);
        enters[thread] = {from[0], from[1]};
      }
    });
    for (int tile = 0; tile < count; ++tile) {
      const int stage = tile % kStages;
      team.each([&](int thread) {
        own[thread] = tiles.run(p, cursor[thread], thread);
        cursor[thread].advance(tiles.length);
      });
      team.template wait<0>();
      team.sync();
      fetch(tile + 1);
      team.each([&](int thread) {
        const Run<E, true>& run = own[thread];
        const int place = tiles.place(thread % kWarpLanes);
        if (sums && (place == 0 || run.t == 0) && run.n > 0) {  // what is before the tile
          const int64_t row = row_of(thread);
          const T* of_y = p.state_y == nullptr ? nullptr : p.state_y + 2 * row;
          const T* of_x = p.state_x == nullptr ? nullptr : p.state_x + 2 * row;
          const E* y = p.y.at(tiles.batch, channel_of(thread));
          T* const to = room.before[thread / kWarpLanes];
          for (int lag = 1; lag <= 2; ++lag) to[lag - 1] = before<E>(y, p.y.time, of_y, run.t, lag);
          if (numerator) {
            const E* x = p.x.at(tiles.batch, channel_of(thread));
            for (int lag = 1; lag <= 2; ++lag) to[lag + 1] = before<E>(x, p.x.time, of_x, run.t, lag);
          }
        }
        T(&v)[R] = values[thread].v;
        room.gy[stage].load(thread / kWarpLanes, place, v);
        Two<T> s;
        run.walk([&](int i) { step<true>(s, v[i], run.a1, run.a2); });
        map[thread] = run.map(s);
      });
      auto lower = chain(team, map, p.carry);
      typename Team::template PerLane<Two<T>> leaves;
      team.each([&](int thread) {  // l
        const Run<E, true>& run = own[thread];
        T(&v)[R] = values[thread].v;
        Two<T> s = thread % kWarpLanes == 0 ? enters[thread] : after(lower[thread], enters[thread]);
        run.walk([&](int i) { v[i] = step<true>(s, v[i], run.a1, run.a2); });
        if (run.forgets) s = {};
        leaves[thread] = s;
        if (run.n < R) {
FASTKIT_UNROLL
          for (int i = 0; i < R; ++i) v[i] = i < run.n ? v[i] : T{0};
        }
        owed[thread] = {};
        if (numerator && !run.forgets) owed[thread] = {run.b1 * v[0] + run.b2 * v[1], run.b2 * v[0]};
      });
      auto last = team.lane(leaves, tiles.last_lane(tile));
      if (numerator) later = team.turned(owed);
      team.each([&](int thread) {
        enters[thread] = last[thread];
        const Run<E, true>& run = own[thread];
        const int row = thread / kWarpLanes, lane = thread % kWarpLanes, place = tiles.place(lane);
        T(&v)[R] = values[thread].v;
        if (sums) {
          Sums& to = sum[thread];
          for (int q = 0; q < 5; ++q) to.v[q] = 0;
          to.closed = lane == 0 ? 0 : 1;
          T signal[R];
          const auto products = [&](auto& tile_of, const T* first, T& of1, T& of2, T* of0) {
            if constexpr (!kChannels) tile_of.load(row, place, signal);
            T s1, s2;
            if (place > 0 && run.t > 0) {
              s1 = widen_element<E>(tile_of.at(row, place - 1, R - 1));
              s2 = widen_element<E>(tile_of.at(row, place - 1, R - 2));
            } else {
              s1 = first[0], s2 = first[1];
            }
            if (run.forgets) s1 = s2 = 0;
            Run<E, false> in_time;
            in_time.n = run.n;  // past the row's end the tile holds what was there before
            in_time.walk([&](int i) {
              T s0;
              if constexpr (kChannels) {
                s0 = widen_element<E>(tile_of.at(row, place, i));
              } else {
                s0 = signal[i];
              }
              if (of0 != nullptr) *of0 += v[i] * s0;
              of1 += v[i] * s1, of2 += v[i] * s2;
              s2 = s1, s1 = s0;
            });
          };
          if (run.n > 0) {
            T none1 = 0, none2 = 0;
            products(room.y[stage], room.before[row], none1, none2, nullptr);
            to.v[0] = -none1, to.v[1] = -none2;
            if (numerator) products(room.x[stage], room.before[row] + 2, to.v[3], to.v[4], &to.v[2]);
          }
        }
        if (numerator) {
          const Pair after = lane == 0 ? from_later[thread] : later[thread];
          from_later[thread] = later[thread];
FASTKIT_UNROLL
          for (int i = 0; i < R; ++i) {
            const T l1 = i + 1 < R ? v[i + 1 < R ? i + 1 : 0] : 0, l2 = i + 2 < R ? v[i + 2 < R ? i + 2 : 0] : 0;
            T g = run.b0 * v[i] + (run.b1 * l1 + run.b2 * l2);
            if (i == R - 2) g += after.v2;
            if (i == R - 1) g += after.v1;
            v[i] = g;
          }
        }
        if (p.gx.data != nullptr) room.gy[stage].store(row, place, v);
      });
      if (p.gx.data != nullptr) {
        team.sync();
        tiles.put(team, room.gy[stage], p.gx, p, tile);
      }
      if (sums) add_up(team, tiles, tile, own, sum, room);
    }
    team.each([&](int thread) {
      if (thread % kWarpLanes != 0 || !there(thread) || p.gstate_y == nullptr) return;
      T* to = p.gstate_y + 2 * row_of(thread);
      to[0] = enters[thread].v1, to[1] = enters[thread].v2;
    });
  }

 private:
  // Sums over the runs of each chunk.
  template <class Team, class T1, class Own, class Sum>
  FASTKIT_DEVICE void add_up(Team& team, const T1& tiles, int tile, Own& own, Sum& sum, Room& room) const {
    using Sums = std::remove_reference_t<decltype(sum[0])>;
    typename Team::template PerLane<uint32_t> opens;
    team.each([&](int thread) { opens[thread] = own[thread].opens; });
    auto later_opens = team.turned(opens);  // a run that follows the first of its chunk ends another
    team.each([&](int thread) {
      if (thread % kWarpLanes > 0) sum[thread].closed = later_opens[thread];
    });
    scan(team, sum, [](const Sums& upper, const Sums& lower) {
      if (upper.closed) return upper;
      Sums both = lower;
FASTKIT_UNROLL
      for (int q = 0; q < 5; ++q) both.v[q] += upper.v[q];
      return both;
    });
    const int last = tiles.last_lane(tile);
    team.each([&](int thread) {
      const auto& run = own[thread];
      const int lane = thread % kWarpLanes;
      const double* const pending = room.pending[tile % 2][thread / kWarpLanes];
      double* const next = room.pending[(tile + 1) % 2][thread / kWarpLanes];
      if (run.n == 0 || !(run.opens || lane == last)) return;
      const int64_t row = tiles.batch * p.channels + tiles.channel + thread / kWarpLanes;
      const int64_t at = row * p.chunks + run.k;
FASTKIT_UNROLL
      for (int q = 0; q < 5; ++q) {
        const double total = (sum[thread].closed ? 0 : pending[q]) + static_cast<double>(sum[thread].v[q]);
        if (run.opens && q < 2) p.ga[2 * at + q] = static_cast<T>(total);
        if (run.opens && q >= 2 && p.gb != nullptr) p.gb[3 * at + q - 2] = static_cast<T>(total);
        if (lane == last) next[q] = run.opens ? 0 : total;
      }
    });
  }
};

template <class E, bool kReverse, bool kChannels, class Stream>
void walk_tiles(const Walk<E, kReverse>& w, Stream& stream) {
  using Reduce = WalkTiles<E, kReverse, true, kChannels>;
  using Apply = WalkTiles<E, kReverse, false, kChannels>;
  if (w.maps != nullptr) stream.run(Reduce{w}, Reduce::units(w));
  if (w.segments > 1) stream.run(Enter<E, kReverse>{w}, Enter<E, kReverse>::units(w));
  stream.run(Apply{w}, Apply::units(w));
}

}  // namespace fastkit::iir_scan_warps
