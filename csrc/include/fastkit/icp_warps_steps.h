// The steps of icp_epoch on the GPU: in which order rows are visited, and Adam on both maps of a restart. Plain
// functors of a team of warps (common/warp.h), which tests also run on the host.
//
// Kernels    Order   sorts the rows of a restart and a side by their random words;
//            Steps   all steps of a restart.
// Parallel   a team to each; of Steps each thread owns the same kTile x kTile entries of all matrices.
// Order      a bitonic merge sort, in shared memory up to kChunk rows, beyond that in global memory where it must.
//            Words have their row behind them: no two are equal, and the order is that of a stable sort.
// Steps      adds up a batch's four moments in registers, from 16 rows at a time, which asynchronous copies bring while
//            those before are worked on; then four rounds of two products. Moments of the gradients stay in registers,
//            maps in shared memory, as they are and turned, so that every product runs along the rows of both factors.
// Room       of D = 64: 96 KB, which a block has on every GPU since sm_80.
// Numerics   sums in fp32, in a fixed order; what depends on the count of steps alone in double.
#pragma once

#include <cmath>

#include "common/warp.h"
#include "fastkit/icp_warps_search.h"
#include "fastkit/philox.h"

namespace fastkit::icp_warps {

// A unit is a side of a restart.
struct Order {
  static constexpr int kWarps = 16, kThreads = kWarps * kWarpLanes;
  static constexpr uint32_t kChunk = 4096;
  struct Room {
    uint64_t items[kChunk];
  };

  Sides sides;
  const int64_t* seeds = nullptr;
  uint32_t epoch = 0;
  bool mutual_only = false;
  uint64_t* visits = nullptr;  // (R, n + m): rows, and their nearest in the upper half

  FASTKIT_DEVICE uint64_t* visits_of(int64_t restart, int side) const {
    const int64_t n = sides.of[0].count, m = sides.of[1].count;
    return visits + restart * (n + m) + (side == 0 ? 0 : n);
  }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const int side = static_cast<int>(unit % 2);
    const int64_t restart = unit / 2;
    const auto count = static_cast<uint32_t>(sides.of[side].count);
    const auto seed = static_cast<uint64_t>(seeds[restart]);
    uint64_t* const all = visits_of(restart, side);

    const auto word = [&](uint32_t row) {
      const auto at = static_cast<int32_t>(row);
      const bool left_out = mutual_only && !sides.returns(side, restart, at, sides.nearest(side, restart, at));
      return left_out ? ~uint64_t{0} : uint64_t{philox_word(seed, row, epoch, static_cast<uint32_t>(side))} << 32 | row;
    };
    in_chunks(team, room, count, word, all, [&](uint32_t size) {
      for (uint32_t length = 2; length / 2 < size; length *= 2) merge(team, room.items, size, length);
    });
    for (uint64_t length = 2 * kChunk; length / 2 < count; length *= 2) {
      mirror(team, all, count, length);
      for (uint64_t stride = length / 4; stride >= kChunk; stride /= 2) halve(team, all, count, stride);
      in_chunks(team, room, count, [&](uint32_t k) { return all[k]; }, all, [&](uint32_t size) {
        for (uint32_t stride = kChunk / 2; stride > 0; stride /= 2) halve(team, room.items, size, stride);
      });
    }
    team.each([&](int thread) {
      for (uint32_t k = thread; k < count; k += kThreads) {
        const auto row = static_cast<uint32_t>(all[k]);
        if (all[k] == ~uint64_t{0}) continue;  // left out
        const auto at = static_cast<uint32_t>(sides.nearest(side, restart, static_cast<int32_t>(row)));
        all[k] = uint64_t{at} << 32 | row;
      }
    });
  }

  // What item(k) gives for each k < count, a chunk at a time: sort(size) orders the room's items, and they go to `to`.
  template <class Team, class Item, class Sort>
  static FASTKIT_DEVICE void in_chunks(Team& team, Room& room, uint32_t count, Item&& item, uint64_t* to, Sort&& sort) {
    for (uint32_t first = 0; first < count; first += kChunk) {
      const uint32_t size = count - first < kChunk ? count - first : kChunk;
      team.each([&](int thread) {
        for (uint32_t k = thread; k < size; k += kThreads) room.items[k] = item(first + k);
      });
      team.sync();
      sort(size);
      team.each([&](int thread) {
        for (uint32_t k = thread; k < size; k += kThreads) to[first + k] = room.items[k];
      });
      team.sync();
    }
  }

  // Items whose runs of length / 2 are in order; runs of `length` after it. Items behind `count` count as greater than
  // all, and are where they belong. Index: a number that may be twice the count.
  template <class Team, class Index>
  static FASTKIT_DEVICE void merge(Team& team, uint64_t* items, uint32_t count, Index length) {
    mirror(team, items, count, length);
    for (Index stride = length / 4; stride > 0; stride /= 2) halve(team, items, count, stride);
  }

  // Compares the first of each run of `length` with its last, the second with the last but one, ...
  template <class Team, class Index>
  static FASTKIT_DEVICE void mirror(Team& team, uint64_t* items, uint32_t count, Index length) {
    compare(team, items, count, length / 2, [=](Index base, Index k) { return base + length - 1 - k; });
  }
  // Compares items that are `stride` apart.
  template <class Team, class Index>
  static FASTKIT_DEVICE void halve(Team& team, uint64_t* items, uint32_t count, Index stride) {
    compare(team, items, count, stride, [=](Index base, Index k) { return base + stride + k; });
  }

  // The first `half` items of each run of twice as many with others(run, place in it); the lesser comes first.
  template <class Team, class Index, class Other>
  static FASTKIT_DEVICE void compare(Team& team, uint64_t* items, uint32_t count, Index half, Other&& other) {
    team.each([&](int thread) {
      for (Index pair = thread;; pair += kThreads) {
        const Index k = pair & (half - 1), base = (pair - k) * 2;
        if (base + k >= count) break;
        const Index with = other(base, k);
        if (with >= count) continue;
        const uint64_t a = items[base + k], b = items[with];
        if (a > b) items[base + k] = b, items[with] = a;
      }
    });
    team.sync();
  }
};

// A unit is a restart.
template <int kTile>
struct Steps {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpLanes;
  static constexpr int kResident = kTile == 4 ? 256 : 512;
  static constexpr int kGrid = 16;               // tiles side by side
  static constexpr int kWide = kGrid * kTile;    // columns, at most
  static constexpr int kRows = 16;               // of a piece of a batch
  static constexpr int kTables = 4;              // whose rows a batch has: x, what they are paired with, y, and theirs
  static_assert(kThreads == kGrid * kGrid && kThreads == kGrid * kRows);

  struct alignas(4 * kTile) Strip {
    float at[kTile];
  };
  struct Tile {
    Strip rows[kTile];
  };
  // The strips of a row change places, so that those of a column are in different banks.
  struct alignas(16) Matrix {
    Strip strips[kWide][kGrid];

    FASTKIT_DEVICE Strip& strip(int row, int column) { return strips[row][column ^ (row / kTile)]; }
    FASTKIT_DEVICE const Strip& strip(int row, int column) const { return strips[row][column ^ (row / kTile)]; }
  };
  struct alignas(16) Piece {
    Strip rows[kTables][kRows][kGrid];
  };
  struct Room {
    Matrix maps[2], turned[2];  // W_xy and W_yx
    union {
      Matrix factors[2];
      Piece pieces[2];
    };
    double powers[2];  // of the betas
    float rate, correction;
  };
  static_assert(sizeof(Room) <= 99 * 1024);

  Sides sides;
  const uint64_t* visits = nullptr;
  const float* cost = nullptr;
  const int64_t* mutual = nullptr;  // where these are the only rows
  float* maps[2] = {};
  int64_t batch_size = 0;
  double lr, beta1, beta2;
  float kept1, new1, kept2, new2, eps, cycle_weight;

  explicit Steps(const ICPEpochOnGpu& call)
      : lr(call.lr), beta1(call.beta1), beta2(call.beta2), kept1(static_cast<float>(beta1)),
        new1(static_cast<float>(1 - beta1)), kept2(static_cast<float>(beta2)), new2(static_cast<float>(1 - beta2)),
        eps(static_cast<float>(call.eps)), cycle_weight(static_cast<float>(call.cycle_weight)) {}

  // Whose tile a thread owns.
  struct Own {
    int row, column;
    bool any;

    FASTKIT_DEVICE Own(int thread, int D) : row(thread / kGrid), column(thread % kGrid) {
      any = row * kTile < D && column * kTile < D;
    }
  };

  struct Plan {
    int64_t steps, batch;
    int32_t pieces;
  };
  FASTKIT_DEVICE Plan plan(int64_t restart) const {
    int64_t rows = sides.of[0].count < sides.of[1].count ? sides.of[0].count : sides.of[1].count;
    int64_t batch = batch_size;
    if (mutual != nullptr) {
      rows = mutual[restart];
      if (rows < batch) batch = rows;
    }
    if (batch == 0 || !is_finite(cost[restart])) return {0, 0, 0};
    return {rows / batch, batch, static_cast<int32_t>((batch + kRows - 1) / kRows)};
  }

  // The next rows that a thread copies from; ahead of the copies, which need them.
  struct Visits {
    uint64_t of[2];
    bool any;
  };
  struct Ahead {
    int64_t step = 0;
    int32_t piece = 0;
  };
  FASTKIT_DEVICE Visits visits_of(int thread, int64_t restart, const Plan& plan, const Ahead& ahead) const {
    const int64_t row = int64_t{ahead.piece} * kRows + thread / kGrid;
    if (ahead.step >= plan.steps || row >= plan.batch) return {{0, 0}, false};
    const int64_t n = sides.of[0].count, m = sides.of[1].count;
    const uint64_t* const from = visits + restart * (n + m) + ahead.step * plan.batch + row;
    return {{from[0], from[n]}, true};
  }

  // A thread's part of a row of each table, in packs of 16 bytes.
  template <class Team>
  FASTKIT_DEVICE void copy(Team& team, Piece& to, int thread, const Visits& visits) const {
    constexpr int kPacks = kWide / 4;
    const int row = thread / kGrid;
FASTKIT_UNROLL
    for (int i = 0; i < kTables * kPacks / kGrid; ++i) {
      const int which = i * kGrid + thread % kGrid, table = which / kPacks, pack = which % kPacks;
      if (pack * 4 >= sides.columns) continue;
      float* const at = reinterpret_cast<float*>(to.rows[table][row]) + pack * 4;
      if (visits.any) {
        const uint64_t visit = table < 2 ? visits.of[0] : visits.of[1];
        const auto from = static_cast<uint32_t>(table % 2 == 0 ? visit : visit >> 32);
        const Side& side = sides.of[table == 0 || table == 3 ? 0 : 1];
        team.template copy<16>(at, side.packed + int64_t{from} * kWide + pack * 4);
      } else {
FASTKIT_UNROLL
        for (int j = 0; j < 4; ++j) at[j] = 0;
      }
    }
  }

  // Of W_xy and W_yx: sums of outer products, of x with x, of what it is paired with with x, ...
  struct Moments {
    Tile xx, yx, yy, xy;
  };
  static FASTKIT_DEVICE void add_outer(Tile& sum, const Strip& rows, const Strip& columns) {
FASTKIT_UNROLL
    for (int i = 0; i < kTile; ++i) {
FASTKIT_UNROLL
      for (int j = 0; j < kTile; ++j) sum.rows[i].at[j] += rows.at[i] * columns.at[j];
    }
  }
  static FASTKIT_DEVICE void add_rows(Moments& sum, const Piece& piece, const Own& own) {
FASTKIT_UNROLL_BY_4
    for (int k = 0; k < kRows; ++k) {
      const Strip x = piece.rows[0][k][own.column], y = piece.rows[2][k][own.column];
      add_outer(sum.xx, piece.rows[0][k][own.row], x);
      add_outer(sum.yx, piece.rows[1][k][own.row], x);
      add_outer(sum.yy, piece.rows[2][k][own.row], y);
      add_outer(sum.xy, piece.rows[3][k][own.row], y);
    }
  }

  // left^T right
  FASTKIT_DEVICE void add_product(Tile& sum, const Matrix& left, const Matrix& right, const Own& own) const {
FASTKIT_UNROLL_BY_4
    for (int block = 0; block * kTile < sides.columns; ++block) {
FASTKIT_UNROLL
      for (int k = 0; k < kTile; ++k) {
        const int row = block * kTile + k;
        add_outer(sum, left.strip(row, own.row), right.strip(row, own.column));
      }
    }
  }
  FASTKIT_DEVICE Tile product(const Matrix& left, const Matrix& right, const Own& own) const {
    Tile sum = {};
    add_product(sum, left, right, own);
    return sum;
  }

  static FASTKIT_DEVICE void put(Matrix& to, const Tile& tile, const Own& own) {
FASTKIT_UNROLL
    for (int i = 0; i < kTile; ++i) to.strip(own.row * kTile + i, own.column) = tile.rows[i];
  }
  static FASTKIT_DEVICE void put_turned(Matrix& to, const Tile& tile, const Own& own) {
FASTKIT_UNROLL
    for (int j = 0; j < kTile; ++j) {
      Strip strip;
FASTKIT_UNROLL
      for (int i = 0; i < kTile; ++i) strip.at[i] = tile.rows[i].at[j];
      to.strip(own.column * kTile + j, own.row) = strip;
    }
  }
  static FASTKIT_DEVICE Tile get(const Matrix& from, const Own& own) {
    Tile tile;
FASTKIT_UNROLL
    for (int i = 0; i < kTile; ++i) tile.rows[i] = from.strip(own.row * kTile + i, own.column);
    return tile;
  }

  // combine(entry of a, entry of b), in a.
  template <class Combine>
  static FASTKIT_DEVICE void combine(Tile& a, const Tile& b, Combine&& combine) {
FASTKIT_UNROLL
    for (int i = 0; i < kTile; ++i) {
FASTKIT_UNROLL
      for (int j = 0; j < kTile; ++j) a.rows[i].at[j] = combine(a.rows[i].at[j], b.rows[i].at[j]);
    }
  }

  // In the room of a thread, who is the only one.
  FASTKIT_DEVICE void start_of_step(Room& room) const {
    room.powers[0] *= beta1, room.powers[1] *= beta2;
    room.rate = static_cast<float>(lr / (1 - room.powers[0]));
    room.correction = static_cast<float>(1 / sqrt(1 - room.powers[1]));
  }

  // Moments of the gradients of a thread's entries of a map.
  struct Adam {
    Tile mean, square;
  };
  FASTKIT_DEVICE void step(Tile& map, Adam& adam, const Tile& gradient, const Room& room, const Own& own) const {
    const float rate = room.rate, correction = room.correction;
FASTKIT_UNROLL
    for (int i = 0; i < kTile; ++i) {
FASTKIT_UNROLL
      for (int j = 0; j < kTile; ++j) {
        if (own.row * kTile + i >= sides.columns || own.column * kTile + j >= sides.columns) continue;
        const float g = gradient.rows[i].at[j];
        float &mean = adam.mean.rows[i].at[j], &square = adam.square.rows[i].at[j];
        mean = kept1 * mean + new1 * g;
        square = kept2 * square + new2 * g * g;
        map.rows[i].at[j] -= rate * mean / (sqrt(square) * correction + eps);
      }
    }
  }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const int32_t D = sides.columns;
    const Plan plan = this->plan(unit);
    const float* const given[2] = {sides.of[1].map + unit * D * D, sides.of[0].map + unit * D * D};
    typename Team::template PerLane<Visits> visits;
    typename Team::template PerLane<Moments> moments;
    typename Team::template PerLane<Tile> ac, bc;
    typename Team::template PerLane<Adam> of_xy, of_yx;
    Ahead ahead;

    // The piece that is ahead; its rows are known, and the next ones are looked up.
    const auto copy_next = [&](Piece& to) {
      Ahead next = ahead;
      if (++next.piece == plan.pieces) ++next.step, next.piece = 0;
      team.each([&](int thread) {
        copy(team, to, thread, visits[thread]);
        visits[thread] = visits_of(thread, unit, plan, next);
      });
      ahead = next;
    };
    const auto each_own = [&](auto&& phase) {
      team.each([&](int thread) {
        const Own own(thread, D);
        if (own.any) phase(thread, own);
      });
      team.sync();
    };

    team.each([&](int thread) {
      for (int k = thread; k < kWide * kWide; k += kThreads) {
        const int i = k / kWide, j = k % kWide;
FASTKIT_UNROLL
        for (int w = 0; w < 2; ++w) {
          const float value = i < D && j < D ? given[w][i * D + j] : 0.0f;
          room.maps[w].strip(i, j / kTile).at[j % kTile] = value;
          room.turned[w].strip(j, i / kTile).at[i % kTile] = value;
        }
      }
      if (thread == 0) room.powers[0] = room.powers[1] = 1;
      of_xy[thread] = of_yx[thread] = {};
      visits[thread] = visits_of(thread, unit, plan, ahead);
    });
    if (plan.steps > 0) copy_next(room.pieces[0]);
    team.commit();
    for (int64_t t = 0; t < plan.steps; ++t) {
      team.each([&](int thread) { moments[thread] = {}; });
      for (int32_t piece = 0; piece < plan.pieces; ++piece) {
        if (piece + 1 < plan.pieces) copy_next(room.pieces[(piece + 1) % 2]);
        team.commit();
        team.template wait<1>();
        team.sync();
        each_own([&](int thread, const Own& own) { add_rows(moments[thread], room.pieces[piece % 2], own); });
      }
      const float share = 1.0f / static_cast<float>(plan.batch);
      each_own([&](int thread, const Own& own) {
        if (thread == 0) start_of_step(room);
        Moments& c = moments[thread];
        const auto shared = [&](float a, float) { return a * share; };
        combine(c.xx, c.xx, shared), combine(c.yx, c.yx, shared);
        combine(c.yy, c.yy, shared), combine(c.xy, c.xy, shared);
        put(room.factors[0], c.xx, own), put(room.factors[1], c.yy, own);
      });
      each_own([&](int thread, const Own& own) {
        ac[thread] = product(room.turned[0], room.factors[0], own);
        bc[thread] = product(room.turned[1], room.factors[1], own);
      });
      const auto minus = [](float a, float b) { return a - b; };
      const auto turned_minus = [](float a, float b) { return b - a; };
      each_own([&](int thread, const Own& own) {
        put(room.factors[0], ac[thread], own), put(room.factors[1], bc[thread], own);
        combine(moments[thread].yx, ac[thread], turned_minus);  // the gradients without the cycles
        combine(moments[thread].xy, bc[thread], turned_minus);
      });
      each_own([&](int thread, const Own& own) {
        Tile p = product(room.turned[1], room.factors[0], own), q = product(room.turned[0], room.factors[1], own);
        combine(p, moments[thread].xx, minus), combine(q, moments[thread].yy, minus);
        moments[thread].xx = p, moments[thread].yy = q;
      });
      each_own([&](int thread, const Own& own) {
        put(room.factors[0], moments[thread].xx, own), put(room.factors[1], moments[thread].yy, own);
      });
      each_own([&](int thread, const Own& own) {
        ac[thread] = product(room.maps[1], room.factors[0], own);  // W_yx^T P and W_xy^T Q
        bc[thread] = product(room.maps[0], room.factors[1], own);
      });
      each_own([&](int thread, const Own& own) {
        put_turned(room.factors[0], moments[thread].xx, own), put_turned(room.factors[1], moments[thread].yy, own);
      });
      each_own([&](int thread, const Own& own) {
        add_product(ac[thread], room.factors[1], room.turned[1], own);  // Q W_yx^T and P W_xy^T
        add_product(bc[thread], room.factors[0], room.turned[0], own);
        const auto with_cycle = [&](float g, float of_cycle) { return g + cycle_weight * of_cycle; };
        combine(moments[thread].yx, ac[thread], with_cycle), combine(moments[thread].xy, bc[thread], with_cycle);
        Tile w = get(room.maps[0], own);
        step(w, of_xy[thread], moments[thread].yx, room, own);
        put(room.maps[0], w, own);  // which nobody else reads now
        ac[thread] = w;
        w = get(room.maps[1], own);
        step(w, of_yx[thread], moments[thread].xy, room, own);
        put(room.maps[1], w, own);
        bc[thread] = w;
      });
      if (t + 1 < plan.steps) copy_next(room.pieces[0]);
      team.commit();
      each_own([&](int thread, const Own& own) {
        put_turned(room.turned[0], ac[thread], own), put_turned(room.turned[1], bc[thread], own);
      });
    }
    team.template wait<0>();
    team.sync();
    team.each([&](int thread) {
      for (int k = thread; k < D * D; k += kThreads) {
        const int i = k / D, j = k % D;
FASTKIT_UNROLL
        for (int w = 0; w < 2; ++w) maps[w][unit * D * D + k] = room.maps[w].strip(i, j / kTile).at[j % kTile];
      }
    });
  }
};

}  // namespace fastkit::icp_warps
