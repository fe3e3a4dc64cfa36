// The pruning of lora_linear's A on the GPU: what its warps do. Plain functors of a warp (common/warp.h), which tests
// also run on the host.
//
// What       in each row of each matrix zeros for the `pruned` entries with the least |A| norm, and a mask of the rest.
// Parallel   a warp to each row, rows of up to kPruneMatrices matrices to a launch: their table is a parameter of the
//            kernel, so nothing is allocated or copied. Neighbouring lanes have neighbouring entries.
// Selection  bisects the threshold, as the CPU does: a pass counts the scores below the middle. The first passes score
//            the row again, from the caches; once no more than kFew scores lie between the bounds, those alone are
//            counted, from shared memory. Where the threshold is shared by more entries than are lacking, the column
//            before which they go is bisected likewise.
// Bytes      fp32, per entry: reads A and norm, writes the mask and, where it is pruned, A.
// Numerics   scores are one product in T; integers else. No atomics: the same call gives the same bits.
#pragma once

#include "common/convert.h"
#include "common/warp.h"
#include "fastkit/lora_linear_prune.h"

namespace fastkit::lora_linear_warps {

inline constexpr int kPruneMatrices = 500;  // 64 bytes each, of the 32764 of a kernel's parameters since CUDA 12.1

template <class E>
struct PruneRows {
  using T = Arithmetic<E>;
  using S = Score<E>;
  static constexpr int kFew = 4096 / sizeof(S);
  static constexpr int kWarps = 1;
  struct Room {
    S few[kFew];
    S bounds[2];
    uint32_t total[2];
  };

  PruneMatrix<E> matrices[kPruneMatrices];
  int32_t count = 0;
  int64_t first_rows = 0;  // rows before those of the first matrix

  FASTKIT_ALWAYS_INLINE int64_t units() const { return count == 0 ? 0 : matrices[count - 1].end_rows - first_rows; }

  // A row of a matrix.
  struct Row {
    E* data;
    int64_t step;
    const float* norm;
    bool* kept;
    int32_t columns, pruned;

    FASTKIT_DEVICE S score(int32_t k) const {
      const T score = widen_element(data[k * step]) * static_cast<T>(norm[k]);
      S bits;
      memcpy(&bits, &score, sizeof(bits));
      bits &= static_cast<S>(~(uint64_t{1} << (8 * sizeof(S) - 1)));
      return bits < kNanScore<S> ? bits : kNanScore<S>;
    }
  };

  FASTKIT_DEVICE Row find(int64_t row) const {
    int32_t i = 0, end = count - 1;  // the first whose end_rows is beyond the row
    while (i < end) {
      const int32_t middle = (i + end) / 2;
      if (matrices[middle].end_rows > row) {
        end = middle;
      } else {
        i = middle + 1;
      }
    }
    const PruneMatrix<E>& m = matrices[i];
    const int64_t of_m = row - (i == 0 ? first_rows : matrices[i - 1].end_rows);
    return {m.data + of_m * m.row, m.column, m.norm, m.kept + of_m * m.columns, static_cast<int32_t>(m.columns),
            static_cast<int32_t>(m.pruned)};
  }

  // Sums what lanes count by turns: a total is read before the other one is written.
  template <class Warp>
  struct Counter {
    Warp& warp;
    Room& room;
    int turn = 0;

    template <class Count>
    FASTKIT_DEVICE uint32_t operator()(Count&& count) {
      typename Warp::template PerLane<uint32_t> sum;
      warp.each([&](int lane) { sum[lane] = count(lane); });
      scan(warp, sum, [](uint32_t upper, uint32_t lower) { return upper + lower; });
      turn = 1 - turn;
      warp.each([&](int lane) {
        if (lane == kWarpLanes - 1) room.total[turn] = sum[lane];
      });
      warp.sync();
      return room.total[turn];
    }
  };

  // Of n items, those that `counts`; lanes take them by turns.
  template <class Counts>
  static FASTKIT_DEVICE uint32_t count_of_lane(int lane, int32_t n, Counts&& counts) {
    uint32_t sum = 0;
FASTKIT_UNROLL
    for (int32_t k = lane; k < n; k += kWarpLanes) sum += counts(k) ? 1 : 0;
    return sum;
  }

  // room.few: the scores in [low, high), of which there are no more.
  template <class Warp>
  static FASTKIT_DEVICE void collect(Warp& warp, Room& room, const Row& row, S low, S high) {
    typename Warp::template PerLane<uint32_t> end, own;
    warp.each([&](int lane) {
      own[lane] = count_of_lane(lane, row.columns, [&](int32_t k) {
        const S score = row.score(k);
        return score >= low && score < high;
      });
      end[lane] = own[lane];
    });
    scan(warp, end, [](uint32_t upper, uint32_t lower) { return upper + lower; });
    warp.each([&](int lane) {
      uint32_t at = end[lane] - own[lane];
      for (int32_t k = lane; k < row.columns; k += kWarpLanes) {
        const S score = row.score(k);
        if (score >= low && score < high) room.few[at++] = score;
      }
    });
    warp.sync();
  }

  template <class Warp>
  static FASTKIT_DEVICE void find_bounds(Warp& warp, Room& room, const Row& row) {
    struct Bounds {
      S low, high;
    };
    typename Warp::template PerLane<Bounds> bounds;
    warp.each([&](int lane) {
      Bounds b{kNanScore<S>, 0};
FASTKIT_UNROLL
      for (int32_t k = lane; k < row.columns; k += kWarpLanes) {
        const S score = row.score(k);
        b = {score < b.low ? score : b.low, score > b.high ? score : b.high};
      }
      bounds[lane] = b;
    });
    scan(warp, bounds, [](Bounds a, Bounds b) {
      return Bounds{a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
    });
    warp.each([&](int lane) {
      if (lane == kWarpLanes - 1) room.bounds[0] = bounds[lane].low, room.bounds[1] = bounds[lane].high;
    });
    warp.sync();
  }

  // Pruned is what is below `score`, and what equals it before column `cut`.
  struct Threshold {
    S score;
    int32_t cut;
  };

  template <class Warp>
  static FASTKIT_DEVICE Threshold select(Warp& warp, Room& room, const Row& row) {
    Counter<Warp> counter{warp, room};
    find_bounds(warp, room, row);
    S low = room.bounds[0], high = room.bounds[1] + 1;
    const auto pruned = static_cast<uint32_t>(row.pruned);
    uint32_t below_low = 0, below_high = static_cast<uint32_t>(row.columns);  // below_low < pruned <= below_high
    uint32_t below_few = 0, few = 0;
    while (high - low > 1) {
      if (few == 0 && below_high - below_low <= kFew) {
        collect(warp, room, row, low, high);
        below_few = below_low, few = below_high - below_low;
      }
      const S middle = low + (high - low) / 2;
      const uint32_t below = counter([&](int lane) {
        if (few == 0) return count_of_lane(lane, row.columns, [&](int32_t k) { return row.score(k) < middle; });
        return count_of_lane(lane, static_cast<int32_t>(few), [&](int32_t i) { return room.few[i] < middle; });
      });
      if (below_few + below == pruned) return {middle, 0};
      if (below_few + below < pruned) {
        low = middle, below_low = below_few + below;
      } else {
        high = middle, below_high = below_few + below;
      }
    }
    if (below_high == pruned) return {high, 0};
    const uint32_t lacking = pruned - below_low;
    int32_t begin = 0, end = row.columns;  // fewer than `lacking` equal ones before begin, as many before end
    while (end - begin > 1) {
      const int32_t middle = begin + (end - begin) / 2;
      const uint32_t before = counter([&](int lane) {
        return count_of_lane(lane, middle, [&](int32_t k) { return row.score(k) == low; });
      });
      if (before < lacking) {
        begin = middle;
      } else {
        end = middle;
      }
    }
    return {low, end};
  }

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t unit, Room& room) const {
    const Row row = find(first_rows + unit);
    Threshold t{0, 0};
    if (row.pruned > 0) t = select(warp, room, row);
    warp.each([&](int lane) {
      for (int32_t k = lane; k < row.columns; k += kWarpLanes) {
        const S score = row.score(k);
        const bool keep = k < t.cut ? score > t.score : score >= t.score;
        row.kept[k] = keep;
        if (!keep) row.data[k * row.step] = E{};
      }
    });
  }
};

// Launches for the rows of all matrices. Stream: run(body, units).
template <class E, class Stream>
void prune_rows(const PruneMatrix<E>* matrices, int64_t count, Stream& stream) {
  for (int64_t first = 0; first < count; first += kPruneMatrices) {
    PruneRows<E> body;
    body.count = static_cast<int32_t>(count - first < kPruneMatrices ? count - first : kPruneMatrices);
    body.first_rows = first == 0 ? 0 : matrices[first - 1].end_rows;
    for (int32_t i = 0; i < body.count; ++i) body.matrices[i] = matrices[first + i];
    stream.run(body, body.units());
  }
}

}  // namespace fastkit::lora_linear_warps
