// Tiles of iir_scan on the GPU: how runs of samples lie in shared memory, come and go, and what a lane has of its run.
// The walks over them are in iir_scan_warps_walks.h.
#pragma once

#include "fastkit/iir_scan_warps.h"

namespace fastkit::iir_scan_warps {

// Of signals of E whose channels have stride 1: how many fill a sector.
template <class E, bool kChannels>
inline constexpr int kRows = kChannels ? 32 / static_cast<int>(sizeof(E)) : 1;

// 32 runs of R samples, of kRows<E> rows, in shared memory, and between it and a signal of U. Runs are numbered along
// time, from `run0` on; of them those in [first, last) are there, and of the row `time` samples and `channels`.
// Banks: pieces of a run of one row change places from run to run; runs of several rows are one unit apart.
template <class E, class U, bool kChannels>
struct Tile {
  static constexpr int R = kRun<Arithmetic<E>>, kOfRows = kRows<E, kChannels>;
  static constexpr int kUnit = kChannels ? (sizeof(U) < 4 ? 4 : sizeof(U)) : 16;  // bytes that move together
  static constexpr int kPer = kUnit / sizeof(U);                                  // elements of a unit
  static constexpr int kUnits = R * kOfRows / kPer;                               // of a run
  static constexpr int kPitch = kUnits + (kChannels ? 1 : 0);
  struct alignas(kUnit) Unit {
    U at[kPer];
  };
  Unit units[kWarpLanes * kPitch];

  static FASTKIT_DEVICE int turned(int run, int unit) {
    constexpr int kLines = 8 / (kUnits < 8 ? kUnits : 8);
    return kChannels ? unit : unit ^ (run / kLines % kUnits);
  }
  FASTKIT_DEVICE U& at(int row, int run, int i) {
    if constexpr (kChannels) return units[run * kPitch + i * (kOfRows / kPer) + row / kPer].at[row % kPer];
    return units[run * kPitch + turned(run, i / kPer)].at[i % kPer];
  }
  template <class T>
  FASTKIT_DEVICE void load(int row, int run, T (&v)[R]) {
    if constexpr (kChannels) {
FASTKIT_UNROLL
      for (int i = 0; i < R; ++i) v[i] = widen_element<U>(at(row, run, i));
    } else {
FASTKIT_UNROLL
      for (int j = 0; j < kUnits; ++j) {
        const Unit unit = units[run * kPitch + turned(run, j)];
FASTKIT_UNROLL
        for (int i = 0; i < kPer; ++i) v[j * kPer + i] = widen_element<U>(unit.at[i]);
      }
    }
  }
  template <class T>
  FASTKIT_DEVICE void store(int row, int run, const T (&v)[R]) {
    if constexpr (kChannels) {
FASTKIT_UNROLL
      for (int i = 0; i < R; ++i) at(row, run, i) = round_element<U>(v[i]);
    } else {
FASTKIT_UNROLL
      for (int j = 0; j < kUnits; ++j) {
        Unit unit;
FASTKIT_UNROLL
        for (int i = 0; i < kPer; ++i) unit.at[i] = round_element<U>(v[j * kPer + i]);
        units[run * kPitch + turned(run, j)] = unit;
      }
    }
  }

  // Each unit of this thread that is there: move(unit in the tile, element of the signal). From one to the next is the
  // same distance, in both.
  template <class Signal, class Move>
  FASTKIT_DEVICE void each(int thread, const Signal& s, int64_t batch, int channel, int channels, int run0, int first,
                           int last, int time, Move&& move) {
    constexpr int kThreads = kOfRows * kWarpLanes, kSample = kOfRows / kPer, kTimes = kWarpLanes * kUnits / kThreads;
    constexpr int kSamples = kWarpLanes * R / kTimes, kStep = kThreads / kUnits * kPitch;
    static_assert(kChannels || kThreads / kUnits % 8 == 0);  // turned alike
    const int of_row = kChannels ? thread % kSample * kPer : 0;
    if (channel + of_row >= channels) return;
    const int t = run0 * R + (kChannels ? thread / kSample : thread * kPer);
    const int begin = first * R, end = last * R < time ? last * R : time;
    Unit* const unit = units + thread / kUnits * kPitch + turned(thread / kUnits, thread % kUnits);
    auto* const at = s.at(batch, channel) + (kChannels ? t * s.time + of_row : t);
    const int64_t step = kChannels ? kSamples * s.time : kSamples;
    if (run0 * R >= begin && (run0 + kWarpLanes) * R <= end) {
FASTKIT_UNROLL
      for (int i = 0; i < kTimes; ++i) move(unit[i * kStep], at + i * step);
    } else {
      for (int i = 0; i < kTimes; ++i) {
        if (t + i * kSamples >= begin && t + i * kSamples < end) move(unit[i * kStep], at + i * step);
      }
    }
  }

  static bool fits(const Signal<U>& s, const IirScan<E>& p) {
    const int64_t unit = kPer;
    const bool strides = kChannels ? s.channel == 1 && s.time % unit == 0 && p.channels % unit == 0
                                   : s.time == 1 && s.channel % unit == 0 && p.time % unit == 0;
    return strides && s.batch % unit == 0 && reinterpret_cast<uintptr_t>(s.data) % kUnit == 0;
  }
  static bool fits(const Signal<const U>& s, const IirScan<E>& p) {
    return fits(Signal<U>{const_cast<U*>(s.data), s.batch, s.channel, s.time}, p);
  }
};

template <class E>
bool fits_runs(const IirScan<E>& p) {
  constexpr int R = kRun<Arithmetic<E>>;
  return p.offsets == nullptr && p.filters == 1 && p.time > 0 && (p.chunk % R == 0 || p.chunk >= p.time);
}
template <class E, class U>
bool fits_tiles(const IirScan<E>& p, const Signal<U>& s) {
  using Element = std::remove_const_t<U>;
  return p.channels_last ? Tile<E, Element, true>::fits(s, p) : Tile<E, Element, false>::fits(s, p);
}

// Where a lane is in its row, and in the coefficients: from tile to tile 32 runs on, without a division.
template <class E, bool kReverse>
struct Cursor {
  using T = Arithmetic<E>;
  const T *a = nullptr, *b = nullptr;
  int run = 0, k = 0, at = 0;  // k: the chunk; at: the run in it

  FASTKIT_DEVICE void advance(int length) {  // runs of a chunk
    const int chunks = kWarpLanes / length, runs = kWarpLanes % length;
    run += kReverse ? -kWarpLanes : kWarpLanes;
    k += kReverse ? -chunks : chunks, at += kReverse ? -runs : runs;
    if (kReverse ? at < 0 : at >= length) k += kReverse ? -1 : 1, at += kReverse ? length : -length;
  }
};

// A lane's run in a tile, and its filter.
template <class E, bool kReverse>
struct Run {
  using T = Arithmetic<E>;
  static constexpr int R = kRun<T>;
  T a1 = 0, a2 = 0, b0 = 1, b1 = 0, b2 = 0;
  int t = 0, n = 0, k = 0;               // its first sample, how many there are, their chunk
  bool opens = false, forgets = false;  // it is the first of its chunk; and what was before it does not count

  FASTKIT_DEVICE Run() = default;
  FASTKIT_DEVICE Run(const IirScan<E>& p, const Cursor<E, kReverse>& cursor) {
    const int time = static_cast<int>(p.time);
    t = cursor.run * R, n = time - t < R ? time - t : R, k = cursor.k;
    opens = cursor.at == 0, forgets = opens && k > 0 && !p.carry;
    const T* a = cursor.a + k * p.a.chunk;
    a1 = a[0], a2 = a[p.a.tap];
    if (p.b.data == nullptr) return;
    const T* b = cursor.b + k * p.b.chunk;
    b0 = b[0], b1 = b[p.b.tap], b2 = b[2 * p.b.tap];
  }

  // Its samples in the order of the walk, of a whole run without a look at n.
  template <class Sample>
  FASTKIT_DEVICE void walk(Sample&& sample) const {
    if (n == R) {
FASTKIT_UNROLL
      for (int i = 0; i < R; ++i) sample(kReverse ? R - 1 - i : i);
    } else {
FASTKIT_UNROLL
      for (int i = 0; i < R; ++i) {
        const int at = kReverse ? R - 1 - i : i;
        if (at < n) sample(at);
      }
    }
  }

  // What the run does to the state, where it leaves `rest` from zero. The matrix of n steps has the impulse response h
  // of 1 / A in it, which doubles: h[2n] = h[n]^2 - a2 h[n-1]^2, h[2n-1] = h[n-1] (2 h[n] + a1 h[n-1]).
  FASTKIT_DEVICE Map map(Two<T> rest) const {
    Map m;
    if (n == 0) return m;
    const double a = a1, c = a2;
    double h = -a, before = 1;
    if (n == R) {
FASTKIT_UNROLL
      for (int i = 1; i < R; i *= 2) {
        const double next = h * h - c * (before * before);
        before = before * (2 * h + a * before), h = next;
      }
    } else {
      for (int i = 1; i < n; ++i) {
        const double next = -a * h - c * before;
        before = h, h = next;
      }
    }
    const double down = kReverse ? -c * before : before, up = kReverse ? before : -c * before;
    m.first = {h, down}, m.second = {up, h + a * before}, m.rest = {rest.v1, rest.v2};
    if (forgets) {
      m.forgets = 1;
      if (kReverse) m.rest = {};  // its first sample is the last of the walk
    }
    return m;
  }
};

// Each lane's map after those of the lanes below it; returns that of the lanes below alone. Where history is carried
// no map forgets.
template <class Team>
FASTKIT_DEVICE auto chain(Team& team, typename Team::template PerLane<Map>& map, bool carry) {
  if (!carry) {
    scan(team, map, [](const Map& upper, const Map& lower) { return upper.after(lower); });
    return team.up(map, 1);
  }
  typename Team::template PerLane<Affine> plain;
  team.each([&](int thread) { plain[thread] = map[thread]; });
  scan(team, plain, [](const Affine& upper, const Affine& lower) { return upper.after(lower); });
  auto below = team.up(plain, 1);
  typename Team::template PerLane<Map> result;
  team.each([&](int thread) { map[thread] = {plain[thread], 0}, result[thread] = {below[thread], 0}; });
  return result;
}

template <class T>
FASTKIT_DEVICE Two<T> after(const Map& map, Two<T> s) {
  return narrowed<T>(map({s.v1, s.v2}));
}

// Of a team: its rows, its segment, and the tiles of it.
template <class E, bool kReverse, bool kChannels>
struct Tiles {
  static constexpr int R = kRun<Arithmetic<E>>, kOfRows = kRows<E, kChannels>;
  int64_t batch, segment;
  int channel, runs, begin, end;  // the first channel; runs of a row; positions of the segment, in runs
  int length;                     // runs of a chunk

  FASTKIT_DEVICE Tiles(const IirScan<E>& p, int64_t unit, int64_t segments, int64_t samples) {
    const int64_t blocks = (p.channels + kOfRows - 1) / kOfRows, group = unit / segments;
    segment = unit % segments, batch = group / blocks, channel = static_cast<int>(group % blocks * kOfRows);
    runs = (static_cast<int>(p.time) + R - 1) / R;
    const int64_t from = segment * ((samples + R - 1) / R), to = from + (samples + R - 1) / R;
    length = p.chunk >= p.time ? runs : static_cast<int>(p.chunk) / R;
    begin = static_cast<int>(from < runs ? from : runs), end = static_cast<int>(to < runs ? to : runs);
  }
  static int64_t groups(const IirScan<E>& p) { return p.batch * ((p.channels + kOfRows - 1) / kOfRows); }

  FASTKIT_DEVICE int count() const { return (end - begin + kWarpLanes - 1) / kWarpLanes; }
  FASTKIT_DEVICE int position(int tile) const { return begin + tile * kWarpLanes; }
  // Along time: the first run of a tile, which may be before the row; the place of a lane's run in it.
  FASTKIT_DEVICE int run0(int tile) const { return kReverse ? runs - kWarpLanes - position(tile) : position(tile); }
  static FASTKIT_DEVICE int place(int lane) { return kReverse ? kWarpLanes - 1 - lane : lane; }
  FASTKIT_DEVICE int first_run() const { return kReverse ? runs - end : begin; }
  FASTKIT_DEVICE int last_run() const { return kReverse ? runs - begin : end; }
  FASTKIT_DEVICE int last_lane(int tile) const {  // that has a run
    return end - position(tile) < kWarpLanes ? end - position(tile) - 1 : kWarpLanes - 1;
  }

  FASTKIT_DEVICE Cursor<E, kReverse> cursor(const IirScan<E>& p, int64_t filter, int thread) const {
    const int own = channel + thread / kWarpLanes, position = begin + thread % kWarpLanes;
    const int run = kReverse ? runs - 1 - position : position;
    return {p.a.at(batch, own) + filter * p.a.filter,
            p.b.data == nullptr ? nullptr : p.b.at(batch, own) + filter * p.b.filter, run, run / length, run % length};
  }
  // None where the segment ends before it, or the row is none.
  FASTKIT_DEVICE Run<E, kReverse> run(const IirScan<E>& p, const Cursor<E, kReverse>& cursor, int thread) const {
    const bool there = kReverse ? cursor.run >= runs - end : cursor.run < end;
    if (!there || (kChannels && channel + thread / kWarpLanes >= p.channels)) return {};
    return {p, cursor};
  }
  template <class Team, class Room, class U>
  FASTKIT_DEVICE void fetch(Team& team, Room& room, const Signal<const U>& s, const IirScan<E>& p, int tile) const {
    team.each([&](int thread) {
      room.each(thread, s, batch, channel, static_cast<int>(p.channels), run0(tile), first_run(), last_run(),
                static_cast<int>(p.time), [&](auto& unit, const U* from) {
                  team.template copy<sizeof(unit)>(&unit, from);
                });
    });
  }
  template <class Team, class Room, class U>
  FASTKIT_DEVICE void put(Team& team, Room& room, const Signal<U>& s, const IirScan<E>& p, int tile) const {
    team.each([&](int thread) {
      room.each(thread, s, batch, channel, static_cast<int>(p.channels), run0(tile), first_run(), last_run(),
                static_cast<int>(p.time), [&](auto& unit, U* to) {
                  *reinterpret_cast<std::remove_reference_t<decltype(unit)>*>(to) = unit;
                });
    });
  }
};

}  // namespace fastkit::iir_scan_warps
