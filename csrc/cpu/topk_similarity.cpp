// topk_similarity on the CPU.
//
// What       the product of two tables, or the squares of differences, of which no score is ever stored: kTile queries
//            by kWide keys are summed in registers, and compared there with the worst score of each query's list, and
//            of each key's where keys seek queries too. What is not below is entered: of keys in a random order, few.
// Order      kWide keys at a time are copied, columns first, into the first-level cache; all queries of a sweep are
//            led past them. Their rows stay in the second- or last-level cache (of some thousand columns, keys do too).
// Parallel   a thread has queries or, where these are few, keys of its own; lists of the other side are merged.
// Bytes      keys are read once a sweep, queries once for kWide keys.
// Numerics   a score is a sum over the columns, one after another: the order is the same for every pair, wherever it
//            lies. So equal rows have equal scores, and neither blocks nor threads change a bit.
#include "fastkit/topk_similarity.h"

#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kVectors = 2;
constexpr int kTile = kManyRegisters ? 8 : 6;  // kTile kVectors sums, and kVectors vectors of keys, in registers
template <class E>
constexpr int kWide = kVectors * kLanes<E>;
static_assert(kTopKPadding % kWide<float> == 0 && kTopKPadding % kWide<double> == 0);
template <class T>
constexpr T kNaN = __builtin_nan("");

// --- rows ------------------------------------------------------------------------------------------------------------

template <class T>
FASTKIT_INLINE T sum_of(Vec<T> v) {
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// The sum of term(load, column) over all columns.
template <class E, class Term>
FASTKIT_INLINE Arithmetic<E> sum_columns(int64_t columns, Term&& term) {
  using T = Arithmetic<E>;
  constexpr int kSums = 4, L = kLanes<E>;
  const auto whole = [](const auto* p) { return load(p); };
  Vec<T> sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * L <= columns; d += kSums * L) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sums[i] = term(whole, d + i * L, sums[i]);
  }
  int i = 0;
  for (; d + L <= columns; d += L, ++i) sums[i] = term(whole, d, sums[i]);
  if (d < columns) sums[3] = term([&](const auto* p) { return load(p, columns - d); }, d, sums[3]);
  return sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Each row over its largest element and then over its norm: 0 of a row of zeros, NaN of one with inf or NaN.
template <class E>
void unit_rows(const TopKTable<E>& table, int64_t columns, Arithmetic<E>* to, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  constexpr int L = kLanes<E>;
  ExactScope scope;
  for (int64_t i = begin; i < end; ++i) {
    const E* row = table.row(i);
    T* unit = to + i * columns;
    Vec<T> most{}, nothing{};  // nothing: 0, or NaN
    const auto look = [&](Vec<T> x) {
      const Vec<T> size = x < Vec<T>{} ? -x : x;
      most = size > most ? size : most;
      nothing += x - x;
    };
    int64_t d = 0;
    for (; d + L <= columns; d += L) look(load(row + d));
    if (d < columns) look(load(row + d, columns - d));
    T largest = 0;
    for (int k = 0; k < L; ++k) largest = most[k] > largest ? most[k] : largest;
    const T empty = sum_of<T>(nothing);
    const bool regular = largest > 0 && empty == 0;
    const auto divide = [&](auto&& term) {
      int64_t at = 0;
      for (; at + L <= columns; at += L) store(unit + at, term(at));
      for (; at < columns; ++at) unit[at] = term(at, int64_t{1})[0];
    };
    divide([&](int64_t at, auto... n) {
      return regular ? load(row + at, n...) / broadcast(largest) : broadcast(empty);
    });
    if (!regular) continue;
    const T squares = sum_columns<T>(columns, [&](auto&& get, int64_t at, Vec<T> sum) {
      const Vec<T> x = get(unit + at);
      return fma<T>(x, x, sum);
    });
    const Vec<T> norm = broadcast<T>(IsSame<T, float> ? __builtin_sqrtf(squares) : __builtin_sqrt(squares));
    divide([&](int64_t at, auto... n) { return load(static_cast<const T*>(unit + at), n...) / norm; });
  }
}

// --- lists -----------------------------------------------------------------------------------------------------------

template <class T>
FASTKIT_INLINE bool better(const TopKEntry<T>& a, const TopKEntry<T>& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// Puts an entry at the front of a heap of n, of which the front is free, and restores its order: the worst in front.
template <class Entry>
FASTKIT_INLINE void sift_down(Entry* heap, int64_t n, const Entry& entry) {
  int64_t at = 0;
  for (int64_t child = 1; child < n; child = 2 * at + 1) {
    if (child + 1 < n && better(heap[child], heap[child + 1])) ++child;
    if (!better(entry, heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = entry;
}

// Adds an entry to a heap of n.
template <class Entry>
FASTKIT_INLINE void sift_up(Entry* heap, int64_t n, const Entry& entry) {
  int64_t at = n;
  while (at > 0) {
    const int64_t parent = (at - 1) / 2;
    if (!better(heap[parent], entry)) break;
    heap[at] = heap[parent];
    at = parent;
  }
  heap[at] = entry;
}

// Keeps the k best in a heap of n; whether there is one more.
template <class Entry>
FASTKIT_INLINE bool keep_best(Entry* heap, int64_t n, int64_t k, const Entry& entry) {
  if (n < k) {
    sift_up(heap, n, entry);
  } else if (better(entry, heap[0])) {
    sift_down(heap, k, entry);
  }
  return n < k;
}

// The least number that is greater: rows come to a list in the order of their indices, and of equal scores the first
// stay.
template <class T>
FASTKIT_INLINE T next_above(T x) {
  if (x == kInfinity<T>) return x;
  decltype(typename VectorOf<T>::index{}[0] + 0) bits = 1;
  if (x != 0) {
    __builtin_memcpy(&bits, &x, sizeof(T));
    bits += x > 0 ? 1 : -1;
  }
  __builtin_memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
FASTKIT_INLINE void enter(const TopKLists<T>& lists, int64_t row, const TopKEntry<T>& entry) {
  TopKEntry<T>* const heap = lists.entries + row * lists.k;
  lists.counts[row] += keep_best(heap, lists.counts[row], lists.k, entry);
  if (lists.counts[row] == lists.k) lists.thresholds[row] = next_above(heap[0].score);
}

template <class T>
void begin(const TopKLists<T>& lists, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) lists.counts[i] = 0, lists.thresholds[i] = -kInfinity<T>;
}

template <class T>
void merge(const TopKLists<T>& from, const TopKLists<T>& into, int64_t rows) {
  ExactScope scope;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < from.counts[i]; ++c) enter(into, i, from.entries[i * from.k + c]);
  }
}

template <class T>
void finish(const TopKLists<T>& lists, int64_t rows, bool l2, T* values, int64_t* indices) {
  ExactScope scope;
  for (int64_t i = 0; i < rows; ++i, values += lists.k, indices += lists.k) {
    TopKEntry<T>* const heap = lists.entries + i * lists.k;
    const int64_t n = lists.counts[i];
    for (int64_t at = n - 1; at >= 0; --at) {  // the worst first
      values[at] = l2 ? 0 - heap[0].score : heap[0].score;
      indices[at] = heap[0].index;
      sift_down(heap, at, TopKEntry<T>(heap[at]));
    }
    for (int64_t at = n; at < lists.k; ++at) values[at] = kNaN<T>, indices[at] = -1;
  }
}

// --- sweeps ----------------------------------------------------------------------------------------------------------

// A bit for each element that is at least the threshold; none for NaN.
template <class T>
FASTKIT_INLINE uint64_t hits(Vec<T> v, Vec<T> threshold) {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
  if constexpr (IsSame<T, float>) return _mm512_cmp_ps_mask((__m512)v, (__m512)threshold, _CMP_GE_OQ);
  if constexpr (IsSame<T, double>) return _mm512_cmp_pd_mask((__m512d)v, (__m512d)threshold, _CMP_GE_OQ);
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
  if constexpr (IsSame<T, float>) return _mm256_movemask_ps((__m256)(v >= threshold));
  if constexpr (IsSame<T, double>) return _mm256_movemask_pd((__m256d)(v >= threshold));
#elif defined(FASTKIT_X86)
  if constexpr (IsSame<T, float>) return _mm_movemask_ps((__m128)(v >= threshold));
  if constexpr (IsSame<T, double>) return _mm_movemask_pd((__m128d)(v >= threshold));
#elif defined(__aarch64__)
  if constexpr (IsSame<T, float>) return vaddvq_u32((uint32x4_t)(v >= threshold) & uint32x4_t{1, 2, 4, 8});
  if constexpr (IsSame<T, double>) return vaddvq_u64((uint64x2_t)(v >= threshold) & uint64x2_t{1, 2});
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint64_t>(v[i] >= threshold[i]) << i;
  return bits;
#endif
}

// n <= kWide rows as (columns, kWide), zeros beside them.
template <class E>
FASTKIT_INLINE void pack(const TopKTable<E>& table, int64_t n, int64_t columns, Arithmetic<E>* to) {
  using T = Arithmetic<E>;
  constexpr int L = kLanes<E>;
  for (int64_t first = 0; first < kWide<E>; first += L) {
    for (int64_t d = 0; d < columns; d += L) {
      const int64_t left = columns - d;
      Vec<T> rows[L];
      for (int i = 0; i < L; ++i) {
        const E* row = table.row(first + i) + d;
        rows[i] = first + i >= n ? Vec<T>{} : left >= L ? load(row) : load(row, left);
        if (first + i < n) prefetch(row + kWide<E> * table.stride);
      }
      transpose<T>(rows);
      for (int i = 0; i < L && i < left; ++i) store(to + (d + i) * kWide<E> + first, rows[i]);
    }
  }
}

template <class E>
int64_t room(int64_t query_count, int64_t columns) {
  return (kWide<E> + (kIsHalf<E> ? query_count : 0)) * columns;
}

// The scores of kRows queries and kWide keys.
template <int kRows, bool kL2, class T>
FASTKIT_INLINE void scores(const TopKTable<T>& queries, int64_t query, const T* packed, int64_t columns,
                           Vec<T> (&sum)[kRows][kVectors]) {
  const T* rows[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = queries.row(query + r);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  }
  for (int64_t d = 0; d < columns; ++d) {
    Vec<T> x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) x[v] = load(packed + d * kWide<T> + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> q = broadcast(rows[r][d]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> a = kL2 ? q - x[v] : q;
        sum[r][v] = fma<T>(a, kL2 ? a : x[v], sum[r][v]);
      }
    }
  }
}

// Out of line: it is rare, and the loop over tiles needs the registers.
template <class E, class T>
__attribute__((noinline)) void enter_hits(const TopKSweep<E>& s, int64_t query, int64_t key, const T* scores,
                                          uint64_t of_query, uint64_t of_key) {
  for (; of_query != 0; of_query &= of_query - 1) {
    const int lane = __builtin_ctzll(of_query);
    enter<T>(s.of_queries, query, {scores[lane], s.first_key + key + lane});
  }
  for (; of_key != 0; of_key &= of_key - 1) {
    const int lane = __builtin_ctzll(of_key);
    enter<T>(s.of_keys, key + lane, {scores[lane], s.first_query + query});
  }
}

template <int kRows, bool kL2, class E, class T>
FASTKIT_INLINE void sweep_tile(const TopKSweep<E>& s, const TopKTable<T>& queries, int64_t query, int64_t key,
                               const T* packed, const T* addend) {
  Vec<T> sum[kRows][kVectors];
  scores<kRows, kL2>(queries, query, packed, s.columns, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vec<T> threshold = broadcast(s.of_queries.thresholds[query + r]);
    uint64_t of_query = 0, of_key = 0;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> plain = kL2 ? -sum[r][v] : sum[r][v];
      sum[r][v] = plain + load(addend + v * kLanes<T>);
      of_query |= hits<T>(sum[r][v], threshold) << (v * kLanes<T>);
      if (s.of_keys.entries == nullptr) continue;
      of_key |= hits<T>(sum[r][v], load(s.of_keys.thresholds + key + v * kLanes<T>)) << (v * kLanes<T>);
    }
    if ((of_query | of_key) == 0) continue;
    T row[kWide<T>];
    for (int v = 0; v < kVectors; ++v) store(row + v * kLanes<T>, sum[r][v]);
    enter_hits(s, query + r, key, row, of_query, of_key);
  }
}

template <bool kL2, class E, class T>
void sweep_panel(const TopKSweep<E>& s, const TopKTable<T>& queries, int64_t key, const T* packed, const T* addend) {
  int64_t query = 0;
  for (; query + kTile <= s.query_count; query += kTile) {
    sweep_tile<kTile, kL2>(s, queries, query, key, packed, addend);
  }
  for (; query + kTile / 2 <= s.query_count; query += kTile / 2) {  // fewer rows take as long each as these together
    sweep_tile<kTile / 2, kL2>(s, queries, query, key, packed, addend);
  }
  for (; query < s.query_count; ++query) sweep_tile<1, kL2>(s, queries, query, key, packed, addend);
}

template <class E>
void sweep(const TopKSweep<E>& s) {
  using T = Arithmetic<E>;
  ExactScope scope;
  T* const packed = s.room;
  TopKTable<T> queries;
  if constexpr (kIsHalf<E>) {
    T* const raised = s.room + kWide<E> * s.columns;
    for (int64_t i = 0; i < s.query_count; ++i) {
      for (int64_t d = 0; d < s.columns; ++d) raised[i * s.columns + d] = widened(s.queries.row(i)[d]);
    }
    queries = {raised, s.columns};
  } else {
    queries = s.queries;
  }
  for (int64_t key = 0; key < s.key_count; key += kWide<E>) {
    const int64_t n = s.key_count - key < kWide<E> ? s.key_count - key : int64_t{kWide<E>};
    pack<E>({s.keys.row(key), s.keys.stride}, n, s.columns, packed);
    T addend[kWide<E>];  // beyond the last key no score is a number
    for (int i = 0; i < kWide<E>; ++i) addend[i] = i >= n ? kNaN<T> : s.bias == nullptr ? T{0} : s.bias[key + i];
    if (s.l2) {
      sweep_panel<true>(s, queries, key, packed, addend);
    } else {
      sweep_panel<false>(s, queries, key, packed, addend);
    }
  }
}

template <class E>
constexpr TopKFunctions<E> kFunctions = {
    room<E>, begin<Arithmetic<E>>, sweep<E>, merge<Arithmetic<E>>, finish<Arithmetic<E>>, unit_rows<E>};

}  // namespace

const TopKKernels topk_kernels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
