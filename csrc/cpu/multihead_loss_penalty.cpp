// orthogonality_penalty on the CPU: the products of all pairs of heads, rho of each, and the gradient, of which no more
// than a block of rows is in memory.
//
// What       By class: its rows, packed columns first. Then, for a block of rows of the Gram matrix, from the diagonal
//            to the right: products in registers, rho of each added to its row's sum, the slopes S stored, in both
//            triangles of the block's own square. Then S W is added to the gradient of the block's rows, and S^T W to
//            that of later ones. Each product of a pair is formed once: 3 K^2 D operations a class, of which S W has 2.
// Parallel   rows of the block, kTile at a time; then columns of the gradient, kWide at a time; classes in both.
// Bytes      W is read and the gradient written once a block of some 200 rows; all else stays in the second-level cache
//            for some hundred heads, in the last-level one for thousands.
// Numerics   a product is a sum over the features in order, the gradient one over heads, some 200 at a time. A row's sum
//            of rho is over the lanes of vectors first, then over those. The number of threads changes no bit.
#include "fastkit/multihead_loss_penalty.h"

#include "cpu/products.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kTile = kManyRegisters ? 12 : 6;
constexpr int64_t kBlock = 192;                    // rows of a Gram matrix at most, a multiple of kWide
constexpr int64_t kDepth = 192;                    // rows that are packed for a tile of the gradient at a time
constexpr int64_t kRoomBytes = int64_t{4} << 20;   // of classes that are worked on together
static_assert(kBlock % kWide<float> == 0 && kBlock % kWide<double> == 0);

FASTKIT_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// --- how the work is cut ---------------------------------------------------------------------------------------------

template <class T>
struct Plan {
  int64_t block;                 // rows of a Gram matrix at a time
  int64_t packed, slopes, size;  // numbers of a class: its packed rows, its slopes, both
  int64_t together;              // classes

  explicit Plan(const PenaltyCall<T>& p) {
    const int64_t blocks = (p.heads + kBlock - 1) / kBlock;
    block = blocks == 0 ? 0 : up_to((p.heads + blocks - 1) / blocks, kWide<T>);
    packed = up_to(p.heads, kWide<T>) * p.columns;
    slopes = p.gradient == nullptr ? 0 : up_to(least(block, p.heads) * p.heads, kLine<T>);
    size = packed + slopes;
    const int64_t fit = kRoomBytes / static_cast<int64_t>(sizeof(T)) / (size + 1);
    together = fit < 1 ? 1 : least(fit, p.classes);
  }
};

template <class T>
int64_t room(const PenaltyCall<T>& p) {
  const Plan<T> plan(p);
  return plan.together * plan.size;
}

// --- a class ---------------------------------------------------------------------------------------------------------

template <class T>
struct Class {
  const PenaltyCall<T>& p;
  const T* rows;  // of the class
  T* packed;      // (tiles, columns, kWide), zeros behind the last row
  T* slopes;      // (block, heads from the block on)
  T* sums;        // (heads)
  T* gradient;    // of the class, heads of_head apart

  Class(const PenaltyCall<T>& call, const Plan<T>& plan, int64_t first, int64_t c)
      : p(call),
        rows(call.rows + c * call.of_class),
        packed(call.room + (c - first) * plan.size),
        slopes(packed + plan.packed),
        sums(call.sums + c * call.heads),
        gradient(call.gradient == nullptr ? nullptr : call.gradient + c * call.columns) {}

  int64_t of_head() const { return p.classes * p.columns; }

  void pack(int64_t tile) const;
  template <PenaltyKind Kind>
  void gram(int64_t begin, int64_t end, int64_t unit) const;
  template <PenaltyKind Kind, int kRows>
  void gram_tile(int64_t begin, int64_t end, int64_t row) const;
  void add_columns(int64_t begin, int64_t end, int64_t first) const;
};

template <class T>
void Class<T>::pack(int64_t tile) const {
  constexpr int L = kLanes<T>;
  T* to = packed + tile * kWide<T> * p.columns;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t head = tile * kWide<T> + v * L;
    const auto row = [&](int64_t i) { return rows + (head + i) * p.of_head; };
    for (int64_t d = 0; d < p.columns; d += L) {
      const int64_t n = least(p.columns - d, L);
      Vec<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        square[i] = head + i >= p.heads ? Vec<T>{} : n == L ? load(row(i) + d) : load(row(i) + d, n);
      }
      transpose<T>(square);
      if (n == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(to + (d + i) * kWide<T> + v * L, square[i]);
      } else {
        for (int i = 0; i < n; ++i) store(to + (d + i) * kWide<T> + v * L, square[i]);
      }
    }
  }
}

template <class T>
struct Rho {
  Vec<T> value, slope;
};

template <class T, PenaltyKind Kind>
FASTKIT_INLINE Rho<T> rho_of(Vec<T> t, T width) {
  const Vec<T> one = broadcast<T>(1), zero{};
  const Vec<T> sign = t > zero ? one : (t < zero ? -one : t);  // 0 and NaN are their own
  const Vec<T> size = t * sign;
  if constexpr (Kind == PenaltyKind::abs) return {size, sign};
  if constexpr (Kind == PenaltyKind::squared) return {t * t, t + t};
  const Vec<T> inside = size * (size / broadcast(2 * width)), beyond = size - broadcast(width / 2);
  const auto is_inside = size <= broadcast(width);
  return {is_inside ? inside : beyond, is_inside ? t / broadcast(width) : sign};
}

// kRows rows of the Gram matrix, from `row` on: sums of rho right of the diagonal, and the slopes.
template <class T>
template <PenaltyKind Kind, int kRows>
void Class<T>::gram_tile(int64_t begin, int64_t end, int64_t row) const {
  constexpr int L = kLanes<T>;
  const Left<T> left{rows, p.of_head, 1};
  const int64_t wide = p.heads - begin;
  Vec<T> total[kRows] = {};
  for (int64_t column = row / kWide<T> * kWide<T>; column < p.heads; column += kWide<T>) {
    const bool inside = column >= row + kRows && column + kWide<T> <= p.heads;  // right of the diagonal, and whole
    T tile[kRows][kWide<T>];
    product_tile<kRows>(left, row, packed + column * p.columns, kWide<T>, p.columns, [&](int r, int v, Vec<T> t) {
      const int64_t at = column + v * L;
      if (!inside) {
        for (int i = 0; i < L; ++i) t[i] = at + i > row + r && at + i < p.heads ? t[i] : 0;  // where rho and rho' are 0
      }
      const Rho<T> rho = rho_of<T, Kind>(t, p.width);
      total[r] += rho.value;
      store(&tile[r][v * L], rho.slope);
    });
    if (gradient == nullptr) continue;
    for (int r = 0; r < kRows; ++r) {
      T* to = slopes + (row + r - begin) * wide;
      if (inside) {
        for (int v = 0; v < kVectors; ++v) store(to + column - begin + v * L, load(&tile[r][v * L]));
      } else {
        for (int64_t j = column > row + r ? column : row + r; j < least(column + kWide<T>, p.heads); ++j) {
          to[j - begin] = tile[r][j - column];
        }
      }
    }
    for (int64_t j = column; j < least(column + kWide<T>, end); ++j) {  // the other triangle of the square
      T* to = slopes + (j - begin) * wide + row - begin;
      for (int r = 0; r < kRows; ++r) {
        if (j > row + r) to[r] = tile[r][j - column];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T sum = 0;
    for (int i = 0; i < L; ++i) sum += total[r][i];
    sums[row + r] = sum;
  }
}

// A unit is kTile rows of the block; those with many columns and with few take turns, so that threads have as much to
// do as each other.
template <class T>
template <PenaltyKind Kind>
void Class<T>::gram(int64_t begin, int64_t end, int64_t unit) const {
  const int64_t units = (end - begin + kTile - 1) / kTile;
  const int64_t which = unit % 2 == 0 ? unit / 2 : units - 1 - unit / 2;
  const int64_t row = begin + which * kTile;
  in_tiles<kTile>(row, least(row + kTile, end), [&]<int kRows>(int64_t r) { gram_tile<Kind, kRows>(begin, end, r); });
}

// Columns [first, first + kWide) of the gradient: what the slopes of rows [begin, end) add.
template <class T>
void Class<T>::add_columns(int64_t begin, int64_t end, int64_t first) const {
  constexpr int L = kLanes<T>;
  const int64_t wide = p.heads - begin, n = p.columns - first;
  alignas(kLineBytes) T right[kDepth * kWide<T>];
  // gradient[to_begin, to_end) += the left side times W[from, from + depth).
  const auto add = [&](const Left<T>& left, int64_t to_begin, int64_t to_end, int64_t from, int64_t depth, bool adds) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = rows + (from + k) * p.of_head + first;
      for (int v = 0; v < kVectors; ++v) {
        T* to = right + k * kWide<T> + v * L;
        store(to, n >= (v + 1) * L ? load(row + v * L) : n > v * L ? load(row + v * L, n - v * L) : Vec<T>{});
      }
    }
    in_tiles<kTile>(0, to_end - to_begin, [&]<int kRows>(int64_t r) {
      T* to = gradient + (to_begin + r) * of_head() + first;
      product_tile<kRows>(left, r, right, kWide<T>, depth, [&](int i, int v, Vec<T> sum) {
        T* at = to + i * of_head() + v * L;
        if (n >= (v + 1) * L) {
          store(at, adds ? load(at) + sum : sum);
        } else if (n > v * L) {
          store(at, adds ? load(at, n - v * L) + sum : sum, n - v * L);
        }
      });
    });
  };
  for (int64_t from = begin; from < p.heads; from += kDepth) {
    add({slopes + from - begin, wide, 1}, begin, end, from, least(kDepth, p.heads - from), begin > 0 || from > begin);
  }
  if (end < p.heads) {
    for (int64_t from = begin; from < end; from += kDepth) {
      add({slopes + (from - begin) * wide + end - begin, 1, wide}, end, p.heads, from, least(kDepth, end - from),
          begin > 0 || from > begin);
    }
  }
}

// --- all classes -----------------------------------------------------------------------------------------------------

template <class T, PenaltyKind Kind>
void penalty_of(const PenaltyCall<T>& p, ParallelRanges parallel) {
  const Plan<T> plan(p);
  const int64_t tiles = (p.heads + kWide<T> - 1) / kWide<T>, chunks = (p.columns + kWide<T> - 1) / kWide<T>;
  for (int64_t first = 0; first < p.classes; first += plan.together) {
    const int64_t count = least(plan.together, p.classes - first);
    // f(class, unit) of all classes' units, each of so many multiply-adds.
    const auto for_each = [&](int64_t units, int64_t products, auto&& f) {
      in_ranges(parallel, count * units, products, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) f(Class<T>(p, plan, first, first + i / units), i % units);
      });
    };
    for_each(tiles, 8 * kWide<T> * p.columns, [](const Class<T>& c, int64_t tile) { c.pack(tile); });
    for (int64_t begin = 0; begin < p.heads; begin += plan.block) {
      const int64_t end = least(begin + plan.block, p.heads), wide = p.heads - begin;
      for_each((end - begin + kTile - 1) / kTile, kTile * wide * p.columns,
               [&](const Class<T>& c, int64_t unit) { c.template gram<Kind>(begin, end, unit); });
      if (p.gradient == nullptr) continue;
      for_each(chunks, (end - begin) * wide * kWide<T>,
               [&](const Class<T>& c, int64_t chunk) { c.add_columns(begin, end, chunk * kWide<T>); });
    }
  }
}

template <class T>
void penalty(const PenaltyCall<T>& p, ParallelRanges parallel) {
  if (p.kind == PenaltyKind::abs) return penalty_of<T, PenaltyKind::abs>(p, parallel);
  if (p.kind == PenaltyKind::squared) return penalty_of<T, PenaltyKind::squared>(p, parallel);
  penalty_of<T, PenaltyKind::huber>(p, parallel);
}

}  // namespace

const MultiheadLossPenaltyKernels multihead_loss_penalty_kernels = {{room<float>, penalty<float>},
                                                                    {room<double>, penalty<double>}};

}  // namespace fastkit::FASTKIT_ISA
