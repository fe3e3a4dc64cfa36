// phrase_scores and select_phrases on the CPU.
//
// What       Directions u of all candidates, then u^T scatter u: tiles of u scatter in registers, multiplied by u there
//            and summed, of which nothing is stored. Overlaps with chosen phrases are products of rows; a selection adds
//            those of its last pick to what is there, so that a pick costs m D, and with deflation, where directions
//            change, the variances anew.
// Parallel   candidates; or image sets, by the caller.
// Bytes      of a candidate 4 D read and 8 D written, then 4 D a pick; the scatter, packed, in a cache.
// Numerics   the arithmetic of the candidates; sums over D in order in a tile, over the lanes of vectors first in rows;
//            O^2 in double. The number of threads changes no bit.
#include "fastkit/phrase_scores.h"

#include <cmath>

#include "cpu/products.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kTile = kManyRegisters ? 8 : 6;

template <class T>
FASTKIT_INLINE T sum_of(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
FASTKIT_INLINE T dot(const T* a, const T* b, int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> one{}, other{};
  int64_t d = 0;
  for (; d + 2 * L <= n; d += 2 * L) {
    one = fma<T>(load(a + d), load(b + d), one);
    other = fma<T>(load(a + d + L), load(b + d + L), other);
  }
  for (; d + L <= n; d += L) one = fma<T>(load(a + d), load(b + d), one);
  if (d < n) other = fma<T>(load(a + d, n - d), load(b + d, n - d), other);
  return sum_of<T>(one + other);
}

// to[d] = f(load, d) for n numbers, where load(p) reads as many as are written.
template <class T, class F>
FASTKIT_INLINE void for_lanes(T* to, int64_t n, F&& f) {
  constexpr int L = kLanes<T>;
  int64_t d = 0;
  for (; d + L <= n; d += L) store(to + d, f([](const T* p) { return load(p); }, d));
  if (d < n) store(to + d, f([&](const T* p) { return load(p, n - d); }, d), n - d);
}

// A row to unit length: first over its largest number, so that no square overflows or vanishes.
template <class T>
FASTKIT_INLINE void unit_row(T* to, const T* row, int64_t n) {
  Vec<T> most{};
  const auto look = [&](Vec<T> x) {
    const Vec<T> size = x < Vec<T>{} ? -x : x;
    most = size > most ? size : most;
  };
  int64_t d = 0;
  for (; d + kLanes<T> <= n; d += kLanes<T>) look(load(row + d));
  if (d < n) look(load(row + d, n - d));
  T largest = 0;
  for (int i = 0; i < kLanes<T>; ++i) largest = most[i] > largest ? most[i] : largest;
  const Vec<T> large = broadcast(largest > 0 ? 1 / largest : T(1));
  for_lanes(to, n, [&](auto&& get, int64_t at) { return large * get(row + at); });
  const T length = std::sqrt(dot(static_cast<const T*>(to), static_cast<const T*>(to), n));
  const Vec<T> scale = broadcast(length > 0 ? 1 / length : T(1));
  for_lanes(to, n, [&](auto&& get, int64_t at) { return scale * get(to + at); });
}

template <class T>
struct Room {
  T* unit;      // (m, D): t
  T* u;         // (m, D): directions
  T* packed;    // (panels, D, kWide): the scatter, zeros behind the last column
  T* chosen;    // (S, D): F
  T* centroid;  // (D): a
  T* pick;      // (D): with deflation, the last pick's direction
  T* variance;  // (m)
  T* overlap;   // (m)
  T* part;      // (m): with deflation, how much of a direction is left
  T* taken;     // (m): 1 of one that has been chosen, else 0
  T* score;     // (m)
  int64_t bytes = 0;

  static Room of(const PhraseSet<T>& p, int64_t chosen) {  // of null room: only its size is asked for
    Room room{};
    const auto take = [&](T*& pointer, int64_t count) {
      pointer = p.room == nullptr ? nullptr : reinterpret_cast<T*>(p.room + room.bytes);
      room.bytes += up_to(count * static_cast<int64_t>(sizeof(T)), kLineBytes);
    };
    take(room.unit, p.count * p.columns), take(room.u, p.count * p.columns);
    take(room.packed, p.columns * up_to(p.columns, kWide<T>)), take(room.chosen, chosen * p.columns);
    take(room.centroid, p.columns), take(room.pick, p.columns);
    take(room.variance, p.count), take(room.overlap, p.count), take(room.part, p.count), take(room.taken, p.count);
    take(room.score, p.count);
    return room;
  }
};

template <class T>
int64_t room(const PhraseSet<T>& p, int64_t chosen) {
  PhraseSet<T> none = p;
  none.room = nullptr;
  return Room<T>::of(none, chosen).bytes;
}

// A row to unit length, or zeros where that times `part` is kLeastLength at most; returns that.
template <class T>
FASTKIT_INLINE T direction(T* row, T part, int64_t n) {
  const T length = std::sqrt(dot(static_cast<const T*>(row), static_cast<const T*>(row), n));
  const Vec<T> scale = broadcast(part * length > static_cast<T>(kLeastLength) ? 1 / length : T(0));
  for_lanes(row, n, [&](auto&& get, int64_t at) { return scale * get(row + at); });
  return part * length;
}

// Unit rows, directions, and the packed scatter.
template <class T>
void prepare(const PhraseSet<T>& p, const Room<T>& room, ParallelRanges parallel) {
  const int64_t n = p.columns;
  unit_row(room.centroid, p.centroid, n);
  in_ranges(parallel, (n + kWide<T> - 1) / kWide<T>, 2 * kWide<T> * n, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kWide<T>; first < end * kWide<T>; first += kWide<T>) {
      for (int64_t d = 0; d < n; ++d) {
        const T* from = p.scatter + d * n + first;
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = v * kLanes<T>, here = n - first - at;
          store(room.packed + first * n + d * kWide<T> + at,
                here >= kLanes<T> ? load(from + at) : here > 0 ? load(from + at, here) : Vec<T>{});
        }
      }
    }
  });
  in_ranges(parallel, p.count, 8 * n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* unit = room.unit + i * n;
      unit_row(unit, p.candidates + i * n, n);
      T* u = room.u + i * n;
      for_lanes(u, n, [&](auto&& get, int64_t at) { return get(unit + at) - get(room.centroid + at); });
      direction(u, T(1), n);
    }
  });
}

template <class T>
void variances(const PhraseSet<T>& p, const Room<T>& room, ParallelRanges parallel) {
  constexpr int L = kLanes<T>;
  const int64_t n = p.columns;
  const Left<T> left{room.u, n, 1};
  in_ranges(parallel, (p.count + kTile - 1) / kTile, kTile * n * n, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kTile < p.count ? end * kTile : p.count;
    in_tiles<kTile>(begin * kTile, last, [&]<int kRows>(int64_t row) {
      Vec<T> total[kRows] = {};
      for (int64_t first = 0; first < n; first += kWide<T>) {
        product_tile<kRows>(left, row, static_cast<const T*>(room.packed) + first * n, kWide<T>, n,
                            [&](int r, int v, Vec<T> sum) {
          const T* u = room.u + (row + r) * n + first + v * L;
          const int64_t here = n - first - v * L;
          if (here <= 0) return;
          total[r] = fma<T>(sum, here >= L ? load(u) : load(u, here), total[r]);
        });
      }
      for (int r = 0; r < kRows; ++r) {
        const T sum = sum_of<T>(total[r]);
        room.variance[row + r] = sum < 0 ? T(0) : sum;  // NaN stays
      }
    });
  });
}

// sqrt(before + 2 overlap) - sqrt(before), without the difference.
template <class T>
FASTKIT_INLINE T growth(double before, T overlap) {
  const double both = before + 2 * static_cast<double>(overlap);
  return both == 0 ? T(0) : static_cast<T>(2 * static_cast<double>(overlap) / (std::sqrt(both) + std::sqrt(before)));
}

template <class T>
FASTKIT_INLINE T score_of(const PhraseSet<T>& p, int64_t i, T variance, T increment) {
  const double score = p.variance_weight * static_cast<double>(variance) -
                       p.orthogonality_weight * static_cast<double>(increment);
  return static_cast<T>(p.prior == nullptr ? score : score + p.prior_weight * static_cast<double>(p.prior[i]));
}

template <class T>
void score(const PhraseScoring<T>& p, ParallelRanges parallel) {
  const int64_t n = p.columns, count = p.chosen_count;
  Room<T> room = Room<T>::of(p, count);
  room.variance = p.variance;
  prepare<T>(p, room, parallel);
  variances<T>(p, room, parallel);
  double before = 0;
  for (int64_t s = 0; s < count; ++s) {
    T* f = room.chosen + s * n;
    unit_row(f, p.chosen + s * n, n);
    for (int64_t r = 0; r < s; ++r) {
      const double product = dot(static_cast<const T*>(f), static_cast<const T*>(room.chosen) + r * n, n);
      before += 2 * product * product;
    }
  }
  in_ranges(parallel, p.count, (count + 1) * n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T overlap = 0;
      for (int64_t s = 0; s < count; ++s) {
        const T product = dot(static_cast<const T*>(room.unit) + i * n, static_cast<const T*>(room.chosen) + s * n, n);
        overlap += product * product;
      }
      p.increment[i] = growth(before, overlap);
      p.score[i] = score_of<T>(p, i, p.variance[i], p.increment[i]);
    }
  });
}

template <class T>
void select(const PhraseChoice<T>& p, ParallelRanges parallel) {
  const int64_t n = p.columns;
  const Room<T> room = Room<T>::of(p, 0);
  prepare<T>(p, room, parallel);
  variances<T>(p, room, parallel);
  for (int64_t i = 0; i < p.count; ++i) room.overlap[i] = 0, room.part[i] = 1, room.taken[i] = 0;
  double before = 0;
  for (int64_t j = 0; j < p.k; ++j) {
    int64_t best = -1;
    for (int64_t i = 0; i < p.count; ++i) {
      if (room.taken[i] != 0) continue;
      const T increment = p.deflate ? T(0) : growth(before, room.overlap[i]);
      room.score[i] = score_of<T>(p, i, room.variance[i], increment);
      if (best < 0 || room.score[i] > room.score[best]) best = i;
    }
    p.indices[j] = best, p.scores[j] = room.score[best], p.variances[j] = room.variance[best];
    before += 2 * static_cast<double>(room.overlap[best]);
    room.taken[best] = 1;
    if (j + 1 == p.k) break;
    const T* from = p.deflate ? room.pick : room.unit + best * n;
    for (int64_t d = 0; p.deflate && d < n; ++d) room.pick[d] = room.u[best * n + d];  // which is about to change
    in_ranges(parallel, p.count, 4 * n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!p.deflate) {
          const T product = dot(static_cast<const T*>(room.unit) + i * n, from, n);
          room.overlap[i] += product * product;
          continue;
        }
        T* u = room.u + i * n;
        for (int pass = 0; pass < 2; ++pass) {
          const Vec<T> along = broadcast(dot(static_cast<const T*>(u), from, n));
          for_lanes(u, n, [&](auto&& get, int64_t at) { return fnma<T>(along, get(from + at), get(u + at)); });
        }
        room.part[i] = direction(u, room.part[i], n);
      }
    });
    if (p.deflate) variances<T>(p, room, parallel);
  }
}

template <class T>
constexpr PhraseFunctions<T> functions = {room<T>, score<T>, select<T>};

}  // namespace

const PhraseScoresKernels phrase_scores_kernels = {functions<float>, functions<double>};

}  // namespace fastkit::FASTKIT_ISA
