// The pruning of lora_linear's A on the CPU.
//
// What       column sums of squares of x, and in each row of a matrix A zeros for the entries with the least |A| norm.
// Parallel   sums: kSquareRows rows of a panel of columns are a unit, whose sums stay in the first-level cache while
//            kTogether rows at a time go by. Pruning: threads take rows, of all matrices.
// Selection  the threshold between pruned and kept is bisected: a pass counts the scores below the middle, vector by
//            vector and without a branch, until the middle parts them: after log2(range / gap) passes, of 32 (float64:
//            64) at most. Of scores equal to the threshold as many as are lacking go, the first of them.
// Bytes      sums read x once. Pruning reads A and norm, writes A and the mask (fp32: 13 an entry); the scores of a row
//            stay in the first- or second-level cache, whatever the number of passes.
// Numerics   squares are summed in T over kSquareRows rows, and those sums in double, in order: the number of threads
//            changes nothing. Scores are one product in T; subnormal ones count, as the reference has it.
#include "fastkit/lora_linear_prune.h"

#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

// --- column sums of squares ------------------------------------------------------------------------------------

constexpr int kTogether = 8;  // rows: so many streams that none needs a prefetch of its own

template <class E>
constexpr int64_t kPanel = 16384 / sizeof(Arithmetic<E>);  // columns

template <class E>
int64_t square_units(const ColumnSquares<E>& p) {
  return p.parts() * ((p.columns + kPanel<E> - 1) / kPanel<E>);
}

// sums += the squares of kRows rows of n columns
template <int kRows, class E, class T = Arithmetic<E>>
FASTKIT_INLINE void add_squares(const E* x, int64_t stride, int64_t n, T* sums) {
  int64_t k = 0;
  for (; k + 2 * kLanes<E> <= n; k += 2 * kLanes<E>) {
    Vec<E> first = load(sums + k), second = load(sums + k + kLanes<E>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const E* from = x + i * stride + k;
      const Vec<E> a = load(from), b = load(from + kLanes<E>);
      first = fma<T>(a, a, first), second = fma<T>(b, b, second);
    }
    store(sums + k, first), store(sums + k + kLanes<E>, second);
  }
  for (; k < n; k += kLanes<E>) {
    const int64_t left = n - k;
    for (int i = 0; i < kRows; ++i) {
      const E* from = x + i * stride + k;
      const Vec<E> a = left >= kLanes<E> ? load(from) : load(from, left);
      store(sums + k, fma<T>(a, a, load(const_cast<const T*>(sums + k), left)), left);
    }
  }
}

template <class E>
void square(const ColumnSquares<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  KernelScope scope;
  const int64_t panels = (p.columns + kPanel<E> - 1) / kPanel<E>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / panels, column = unit % panels * kPanel<E>;
    const int64_t first = part * kSquareRows, left = p.columns - column;
    const int64_t last = first + kSquareRows < p.rows ? first + kSquareRows : p.rows;
    const int64_t n = left < kPanel<E> ? left : kPanel<E>;
    T* sums = p.partial + part * p.columns + column;
    for (int64_t k = 0; k < n; ++k) sums[k] = 0;
    int64_t i = first;
    for (; i + kTogether <= last; i += kTogether) {
      add_squares<kTogether>(p.x.row(i) + column, p.x.stride, n, sums);
    }
    for (; i < last; ++i) add_squares<1>(p.x.row(i) + column, p.x.stride, n, sums);
  }
}

template <class E>
void finish_squares(const ColumnSquares<E>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  constexpr int64_t kSome = 256;
  double sums[kSome];
  for (int64_t column = begin; column < end; column += kSome) {
    const int64_t n = end - column < kSome ? end - column : kSome;
    for (int64_t k = 0; k < n; ++k) sums[k] = 0;
    for (int64_t part = 0; part < p.parts(); ++part) {
      const Arithmetic<E>* from = p.partial + part * p.columns + column;
      for (int64_t k = 0; k < n; ++k) sums[k] += from[k];
    }
    for (int64_t k = 0; k < n; ++k) p.sums[column + k] = static_cast<float>(sums[k]);
  }
}

// --- scores ----------------------------------------------------------------------------------------------------

template <class E>
using Scores = typename VectorOf<Arithmetic<E>>::index;
typedef float UnalignedFloats __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));

template <class E>
constexpr int64_t kStep = 4 * kLanes<E>;  // scores that are counted at a time
template <class E>
constexpr Score<E> kAbove = static_cast<Score<E>>(~(uint64_t{1} << (8 * sizeof(Score<E>) - 1)));  // the largest

template <class E>
FASTKIT_INLINE Scores<E> load_scores(const Score<E>* p) {
  return (Scores<E>)load(reinterpret_cast<const Arithmetic<E>*>(p));
}

template <class E>
FASTKIT_INLINE Vec<E> load_norms(const float* p) {
  if constexpr (IsSame<E, double>) {
    return __builtin_convertvector(*reinterpret_cast<const UnalignedFloats*>(p), Vec<double>);
  } else {
    return load(p);
  }
}

template <class E>
int64_t scores_room(int64_t columns) {
  return (columns + kStep<E> - 1) / kStep<E> * kStep<E>;
}

// Of a row; behind them, up to a whole step, what is never counted.
template <class E>
FASTKIT_INLINE void score_row(const PruneMatrix<E>& m, const E* row, Score<E>* scores) {
  using S = Score<E>;
  using T = Arithmetic<E>;
  int64_t k = 0;
  for (; m.column == 1 && k + kLanes<E> <= m.columns; k += kLanes<E>) {
    const Scores<E> bits = (Scores<E>)(load(row + k) * load_norms<E>(m.norm + k)) & kAbove<E>;
    const Scores<E> nan = bits >= kNanScore<S>;
    store(reinterpret_cast<T*>(scores + k), (Vec<E>)((bits & ~nan) | (kNanScore<S> & nan)));
  }
  for (; k < m.columns; ++k) {
    const T score = widened<E>(row[k * m.column]) * static_cast<T>(m.norm[k]);
    S bits;
    __builtin_memcpy(&bits, &score, sizeof(bits));
    bits &= kAbove<E>;
    scores[k] = bits < kNanScore<S> ? bits : kNanScore<S>;
  }
  for (; k % kStep<E> != 0; ++k) scores[k] = kAbove<E>;
}

template <class E>
FASTKIT_INLINE int64_t count_below(const Score<E>* scores, int64_t n, Score<E> bound) {
  Scores<E> count[4] = {};  // negative
  for (int64_t k = 0; k < n; k += kStep<E>) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) count[v] += load_scores<E>(scores + k + v * kLanes<E>) < bound;
  }
  const Scores<E> all = (count[0] + count[1]) + (count[2] + count[3]);
  int64_t total = 0;
  for (int i = 0; i < kLanes<E>; ++i) total -= all[i];
  return total;
}

// Pruned is what is below `score`, and what equals it before column `cut`.
template <class E>
struct Threshold {
  Score<E> score;
  int64_t cut;
};

// The one that prunes `pruned` >= 1 of n scores.
template <class E>
FASTKIT_INLINE Threshold<E> select(const Score<E>* scores, int64_t n, int64_t pruned) {
  Score<E> low = kAbove<E>, high = 0;
  for (int64_t k = 0; k < n; ++k) {
    low = scores[k] < low ? scores[k] : low;
    high = scores[k] > high ? scores[k] : high;
  }
  ++high;
  int64_t below_low = 0, below_high = n;  // below_low < pruned <= below_high
  while (high - low > 1) {
    const Score<E> middle = low + (high - low) / 2;
    const int64_t below = count_below<E>(scores, n, middle);
    if (below == pruned) return {middle, 0};
    if (below < pruned) {
      low = middle, below_low = below;
    } else {
      high = middle, below_high = below;
    }
  }
  if (below_high == pruned) return {high, 0};
  int64_t lacking = pruned - below_low, k = 0;
  for (; lacking > 0; ++k) lacking -= scores[k] == low;
  return {low, k};
}

// --- rows ------------------------------------------------------------------------------------------------------

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  typedef uint16_t type __attribute__((may_alias));
};
template <>
struct BitsOf<4> {
  typedef uint32_t type __attribute__((may_alias));
};
template <>
struct BitsOf<8> {
  typedef uint64_t type __attribute__((may_alias));
};

// Zeroes those of n entries that score `last` or less.
template <class S, class Bits>
FASTKIT_INLINE void write_some(const S* __restrict__ scores, int64_t n, S last, Bits* __restrict__ data, int64_t stride,
                               bool* __restrict__ kept) {
  if (stride == 1) {
    for (int64_t k = 0; k < n; ++k) {
      const bool keep = scores[k] > last;
      kept[k] = keep;
      data[k] = keep ? data[k] : Bits{0};
    }
  } else {
    for (int64_t k = 0; k < n; ++k) {
      kept[k] = scores[k] > last;
      if (!kept[k]) data[k * stride] = 0;
    }
  }
}

template <class E>
void prune(const PruneMatrix<E>* matrices, int64_t begin, int64_t end, Score<E>* scores) {
  using Bits = typename BitsOf<sizeof(E)>::type;
  const PruneMatrix<E>* m = matrices;
  for (int64_t row = begin; row < end; ++row) {
    while (m->end_rows <= row) ++m;
    const int64_t of_m = row - (m == matrices ? 0 : m[-1].end_rows);
    E* data = m->data + of_m * m->row;
    bool* kept = m->kept + of_m * m->columns;
    if (m->pruned == 0) {
      __builtin_memset(kept, 1, m->columns);
      continue;
    }
    score_row(*m, data, scores);
    const Threshold<E> t = select<E>(scores, m->columns, m->pruned);
    auto* bits = reinterpret_cast<Bits*>(data);
    write_some<Score<E>>(scores, t.cut, t.score, bits, m->column, kept);
    write_some<Score<E>>(scores + t.cut, m->columns - t.cut, t.score - 1, bits + t.cut * m->column, m->column,
                         kept + t.cut);
  }
}

template <class E>
constexpr ColumnSquaresFunctions<E> kSquares = {square_units<E>, square<E>, finish_squares<E>};
template <class E>
constexpr PruneRowsFunctions<E> kPrune = {scores_room<E>, prune<E>};

}  // namespace

const ColumnSquaresKernels column_squares_kernels = {kSquares<float>, kSquares<double>, kSquares<BFloat16>,
                                                     kSquares<Half>};
const PruneRowsKernels prune_rows_kernels = {kPrune<float>, kPrune<double>, kPrune<BFloat16>, kPrune<Half>};

}  // namespace fastkit::FASTKIT_ISA
