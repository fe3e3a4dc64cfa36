// The search of icp_epoch on the GPU: of each row of a table the nearest mapped row of the other, and what that costs.
// Plain functors of a team of warps (common/warp.h), which tests also run on the host.
//
// Kernels    Layout   both tables column by column, which the search reads, and in rows of whole packs for the steps;
//            Mapped   W t of every row t of a table, column by column, and half its square;
//            Nearest  of each row x the mapped row k with the greatest x k - |k|^2 / 2;
//            Costs    of a restart: the mean square distances, and the count of mutual pairs.
// Parallel   a team to 128 rows in Layout and Mapped, and to 64 rows of a restart in Nearest, where a thread has the
//            scores of 8 x 8 pairs in registers, as in a product of matrices; to a restart in Costs.
// Latency    of Nearest's keys hidden by asynchronous copies of the next 128 keys' columns, 32 at a time.
// Bytes      Nearest reads 4 (D + 1) for a key and 64 queries, from the second-level cache: mapped tables are made for
//            as many restarts as kMappedBytes hold, and looked at at once.
// Numerics   fp32 on CUDA cores: the ten bits of TF32 would change who is nearest. Each pair is summed alike, column by
//            column, so that equal keys have equal scores and the lower index wins. Distances are those of
//            differences, summed in double, in a fixed order.
#pragma once

#include "common/convert.h"
#include "common/warp.h"
#include "fastkit/icp_cuda.h"

#ifdef __CUDACC__  // as often as registers last
#define FASTKIT_UNROLL_BY_2 _Pragma("unroll 2")
#define FASTKIT_UNROLL_BY_4 _Pragma("unroll 4")
#else
#define FASTKIT_UNROLL_BY_2
#define FASTKIT_UNROLL_BY_4
#endif

namespace fastkit::icp_warps {

inline constexpr int kColumns = ICPEpochOnGpu::kColumns;
inline constexpr int kKeys = 128;  // of a tile; tables have room for whole ones
inline constexpr float kInfinity = __builtin_inff();

FASTKIT_DEVICE float nan() { return float_of(0x7fc00000u); }
FASTKIT_DEVICE bool is_finite(float x) { return x - x == 0; }

// A side of the epoch: 0 has the rows of source, which look among those of target, as W_yx maps them; 1 the reverse.
struct Side {
  const float* rows = nullptr;  // (count, D), as given
  float* columns = nullptr;     // (D, room), zeros behind the rows
  float* packed = nullptr;      // (count, wide), zeros behind the columns
  const float* map = nullptr;   // (R, D, D), of the other side's rows
  float* keys = nullptr;        // (R, D + 1, room of the other side), those mapped and halves of their squares
  int64_t* nearest = nullptr;   // (R, count)
  int32_t count = 0;
  int64_t room = 0;  // count, in whole tiles of keys
};

struct Sides {
  Side of[2];
  int32_t columns = 0, wide = 0;

  // Their nearest rows, -1 if there is none.
  FASTKIT_DEVICE int32_t nearest(int side, int64_t restart, int32_t row) const {
    const int64_t at = of[side].nearest[restart * of[side].count + row];
    return at < 0 || at >= of[1 - side].count ? -1 : static_cast<int32_t>(at);
  }
  // Whether a row is the nearest of its nearest, `at`.
  FASTKIT_DEVICE bool returns(int side, int64_t restart, int32_t row, int32_t at) const {
    return at >= 0 && of[1 - side].nearest[restart * of[1 - side].count + at] == row;
  }
  FASTKIT_DEVICE const float* keys(int side, int64_t restart) const {
    return of[side].keys + restart * (columns + 1) * of[1 - side].room;
  }
};

// Units are the tiles of side 0 and then those of side 1, restart after restart.
struct Tiles {
  int32_t of[2] = {0, 0};

  struct Place {
    int64_t restart;
    int side;
    int32_t tile;
  };
  FASTKIT_DEVICE Place place(int64_t unit) const {
    const int32_t all = of[0] + of[1];
    const auto tile = static_cast<int32_t>(unit % all);
    return tile < of[0] ? Place{unit / all, 0, tile} : Place{unit / all, 1, tile - of[0]};
  }

  // On the host.
  static Tiles over(const Sides& sides, int rows) {
    return {{(sides.of[0].count + rows - 1) / rows, (sides.of[1].count + rows - 1) / rows}};
  }
  int64_t units() const { return int64_t{of[0]} + of[1]; }
};

// A unit is a tile of a table.
struct Layout {
  struct Room {};
  static constexpr int kWarps = kKeys / kWarpLanes;

  Sides sides;
  Tiles tiles;

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room&) const {
    const auto place = tiles.place(unit);
    const Side& side = sides.of[place.side];
    const int32_t first = place.tile * kKeys, D = sides.columns, wide = sides.wide;
    team.each([&](int thread) {
      const int64_t row = int64_t{first} + thread;
      for (int32_t d = 0; d < D; ++d) {
        side.columns[d * side.room + row] = row < side.count ? side.rows[row * D + d] : 0.0f;
      }
      for (int32_t k = thread; k < kKeys * wide; k += kKeys) {
        const int64_t at = int64_t{first} + k / wide;
        const int32_t d = k % wide;
        if (at < side.count) side.packed[at * wide + d] = d < D ? side.rows[at * D + d] : 0.0f;
      }
    });
  }
};

// A unit is a tile of a restart's keys; the tiles of a side are those of the other's rows.
struct Mapped {
  static constexpr int kWarps = kKeys / kWarpLanes;
  static constexpr int kTogether = 8;  // columns of a key
  struct Room {
    float turned[kColumns][kColumns];  // the map, column by column
  };

  Sides sides;
  Tiles tiles;

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const auto place = tiles.place(unit);
    const int side = 1 - place.side;
    const Side& from = sides.of[place.side];
    const int32_t D = sides.columns;
    const float* const map = sides.of[side].map + place.restart * D * D;
    team.each([&](int thread) {
      const int32_t width = (D + kTogether - 1) / kTogether * kTogether;
      for (int32_t k = thread; k < D * width; k += kKeys) {
        const int32_t e = k / width, d = k % width;
        room.turned[e][d] = d < D ? map[d * D + e] : 0.0f;
      }
    });
    team.sync();
    float* const keys = const_cast<float*>(sides.keys(side, place.restart));
    team.each([&](int thread) {
      const int64_t row = int64_t{place.tile} * kKeys + thread;
      float square = 0;
      for (int32_t first = 0; first < D; first += kTogether) {
        float sums[kTogether] = {};
        for (int32_t e = 0; e < D; ++e) {
          const float x = from.columns[e * from.room + row];
FASTKIT_UNROLL
          for (int j = 0; j < kTogether; ++j) sums[j] += room.turned[e][first + j] * x;
        }
FASTKIT_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          if (first + j < D) keys[(first + j) * from.room + row] = sums[j];
          square += sums[j] * sums[j];
        }
      }
      keys[D * from.room + row] = row < from.count ? square / 2 : nan();  // which is never chosen
    });
  }
};

// A unit is kQueries rows of a restart.
struct Nearest {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpLanes;
  static constexpr int kQueries = 64, kSlice = 32, kOwn = 8;  // columns of keys at a time; queries and keys of a thread
  static constexpr int kSharers = kKeys / kOwn;               // threads with the same queries
  static constexpr int kPack = 4;

  struct alignas(16) Pack {
    float at[kPack];
  };
  struct Chosen {
    float score[kOwn];
    int32_t index[kOwn];
  };
  struct Scores {
    float at[kOwn][kOwn];
  };
  struct Room {
    Pack queries[kColumns][kQueries / kPack];
    struct Keys {
      Pack columns[kSlice][kKeys / kPack];
      Pack halves[kKeys / kPack];
    };
    union {
      Keys keys[2];
      struct {
        float score[kSharers][kQueries];
        int32_t index[kSharers][kQueries];
      } chosen;
    };
  };

  Sides sides;
  Tiles tiles;

  // A thread's queries are kOwn in a row; its keys two packs, so that neighbours read what is next to each other.
  struct Own {
    int queries, keys;

    FASTKIT_DEVICE explicit Own(int thread) {
      const int warp = thread / kWarpLanes, lane = thread % kWarpLanes;
      queries = lane / 8 + warp / 2 * 4, keys = lane % 8 + warp % 2 * 8;
    }
    FASTKIT_DEVICE int key(int j) const { return (j < kPack ? 0 : kKeys / 2) + keys * kPack + j % kPack; }
  };

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const auto place = tiles.place(unit);
    const Side& side = sides.of[place.side];
    const Side& other = sides.of[1 - place.side];
    const float* const keys = sides.keys(place.side, place.restart);
    const int32_t D = sides.columns, first = place.tile * kQueries;
    const int32_t slices = (D + kSlice - 1) / kSlice;
    const auto parts = static_cast<int32_t>(other.room / kKeys) * slices;

    const auto width = [&](int32_t slice) { return D - slice * kSlice < kSlice ? D - slice * kSlice : kSlice; };
    const auto copy = [&](int32_t part) {
      if (part < parts) {
        const int32_t slice = part % slices;
        const float* const from = keys + int64_t{part / slices} * kKeys;
        auto& to = room.keys[part % 2];
        team.each([&](int thread) {
          for (int32_t k = thread; k < width(slice) * kWarpLanes; k += kThreads) {
            const int32_t d = k / kWarpLanes, pack = k % kWarpLanes;
            team.template copy<16>(&to.columns[d][pack], from + (slice * kSlice + d) * other.room + pack * kPack);
          }
          if (thread < kWarpLanes) team.template copy<16>(&to.halves[thread], from + D * other.room + thread * kPack);
        });
      }
      team.commit();
    };
    static_assert(kKeys / kPack == kWarpLanes);

    typename Team::template PerLane<Scores> scores;
    typename Team::template PerLane<Chosen> chosen;
    team.each([&](int thread) {
      for (int32_t k = thread; k < D * (kQueries / kPack); k += kThreads) {
        const int32_t d = k / (kQueries / kPack), pack = k % (kQueries / kPack);
        team.template copy<16>(&room.queries[d][pack], side.columns + d * side.room + first + pack * kPack);
      }
FASTKIT_UNROLL
      for (int i = 0; i < kOwn; ++i) chosen[thread].score[i] = -kInfinity, chosen[thread].index[i] = -1;
    });
    copy(0);
    for (int32_t part = 0; part < parts; ++part) {
      copy(part + 1);
      team.template wait<1>();
      team.sync();
      const int32_t slice = part % slices;
      team.each([&](int thread) {
        const Own own(thread);
        Scores& s = scores[thread];
        const auto& of = room.keys[part % 2];
        if (slice == 0) s = {};
        add(s, room.queries[slice * kSlice] + own.queries * (kOwn / kPack), of.columns[0] + own.keys, width(slice));
        if (slice == slices - 1) choose(chosen[thread], s, of.halves, part / slices * kKeys, own);
      });
      team.sync();
    }
    team.template wait<0>();

    team.each([&](int thread) {
      const Own own(thread);
FASTKIT_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        room.chosen.score[own.keys][own.queries * kOwn + i] = chosen[thread].score[i];
        room.chosen.index[own.keys][own.queries * kOwn + i] = chosen[thread].index[i];
      }
    });
    team.sync();
    team.each([&](int thread) {
      if (thread >= kQueries || first + thread >= side.count) return;
      float best = -kInfinity;
      int32_t index = -1;
      for (int i = 0; i < kSharers; ++i) {
        const float score = room.chosen.score[i][thread];
        const int32_t at = room.chosen.index[i][thread];
        if (at >= 0 && (score > best || (score == best && at < index))) best = score, index = at;
      }
      side.nearest[place.restart * side.count + first + thread] = index;
    });
  }

  // So many columns' part in the products.
  static FASTKIT_DEVICE void add(Scores& scores, const Pack* queries, const Pack* keys, int32_t columns) {
FASTKIT_UNROLL_BY_2
    for (int32_t d = 0; d < columns; ++d, queries += kQueries / kPack, keys += kKeys / kPack) {
      const Pack q[] = {queries[0], queries[1]}, k[] = {keys[0], keys[kKeys / kPack / 2]};
FASTKIT_UNROLL
      for (int i = 0; i < kOwn; ++i) {
FASTKIT_UNROLL
        for (int j = 0; j < kOwn; ++j) {
          scores.at[i][j] += q[i / kPack].at[i % kPack] * k[j / kPack].at[j % kPack];
        }
      }
    }
  }
  static_assert(kOwn == 2 * kPack);

  // Keys come in ascending order: the first of equals stays. Neither NaN nor -inf is chosen.
  static FASTKIT_DEVICE void choose(Chosen& chosen, const Scores& scores, const Pack* halves, int32_t first,
                                    const Own& own) {
    Pack half[kOwn / kPack];
FASTKIT_UNROLL
    for (int i = 0; i < kOwn / kPack; ++i) half[i] = halves[own.key(i * kPack) / kPack];
FASTKIT_UNROLL
    for (int j = 0; j < kOwn; ++j) {
      const int32_t index = first + own.key(j);
FASTKIT_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const float score = scores.at[i][j] - half[j / kPack].at[j % kPack];
        if (score > chosen.score[i]) chosen.score[i] = score, chosen.index[i] = index;
      }
    }
  }
};

// A unit is a restart.
struct Costs {
  static constexpr int kWarps = 16, kThreads = kWarps * kWarpLanes;
  struct Sums {
    double distances[2];
    int64_t mutual;
  };
  struct Room {
    Sums of_warp[kWarps];
  };

  Sides sides;
  float* cost = nullptr;
  int64_t* mutual = nullptr;

  FASTKIT_DEVICE double distance(int side, const float* keys, int32_t row, int32_t at) const {
    const Side &own = sides.of[side], &other = sides.of[1 - side];
    double sum = 0;
FASTKIT_UNROLL
    for (int32_t d = 0; d < sides.columns; ++d) {
      const double difference = own.columns[d * own.room + row] - keys[d * other.room + at];
      sum += difference * difference;
    }
    return sum;
  }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    typename Team::template PerLane<Sums> sums;
    team.each([&](int thread) {
      Sums own{{0, 0}, 0};
FASTKIT_UNROLL
      for (int side = 0; side < 2; ++side) {
        const float* const keys = sides.keys(side, unit);
        for (int32_t row = thread; row < sides.of[side].count; row += kThreads) {
          const int32_t at = sides.nearest(side, unit, row);
          own.distances[side] += at < 0 ? kInfinity : distance(side, keys, row, at);
          if (side == 0) own.mutual += sides.returns(side, unit, row, at);
        }
      }
      sums[thread] = own;
    });
    const auto added = [](const Sums& upper, const Sums& lower) {
      return Sums{{upper.distances[0] + lower.distances[0], upper.distances[1] + lower.distances[1]},
                  upper.mutual + lower.mutual};
    };
    scan(team, sums, added);
    team.each([&](int thread) {
      if (thread % kWarpLanes == kWarpLanes - 1) room.of_warp[thread / kWarpLanes] = sums[thread];
    });
    team.sync();
    team.each([&](int thread) {
      if (thread != 0) return;
      Sums all = room.of_warp[0];
      for (int w = 1; w < kWarps; ++w) all = added(room.of_warp[w], all);
      const auto of_x = static_cast<float>(all.distances[0] / sides.of[0].count);
      const auto of_y = static_cast<float>(all.distances[1] / sides.of[1].count);
      cost[unit] = !is_finite(of_x) || !is_finite(of_y) ? kInfinity : of_x < of_y ? of_x : of_y;
      mutual[unit] = all.mutual;
    });
  }
};

}  // namespace fastkit::icp_warps
