// topk_similarity on the CPU: all but the products of blocks of two tables, which are the library's.
//
// What       a scan of each block of scores, which compares them with a threshold for each list and keeps what is not
//            below; each that is kept may raise the threshold. In the end the candidates of a list are decided.
// Parallel   by lists: a thread scans its rows of a block, or its columns, and no other touches their lists.
// Bytes      each score is written and read once, by rows, and a second time by columns: blocks fit a last-level cache.
//            Deciding gathers k rows of the other table for each list.
// Numerics   library's and exact score of a pair differ by no more than e, which follows from the sizes of both rows
//            (margin_of). Where k scores are at least f, k exact ones are at least f - e; of a score below f - 2 e the
//            exact one is below f - e, and not among the k best, not even by its index. The exact score is a sum over
//            the columns in an order that the number of columns alone decides.
// Worst      where more than k + 32 scores lie within 2 e of each other, as those of equal rows do, and where no e is
//            finite, candidates are decided early, at the price of a gathered row each.
#include "fastkit/topk_similarity.h"

#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double roundoff = 0x1p-24, tiny = 0x1p-126, largest = 0x1.fffffep127;
  static constexpr float least_square = 1e-25f;  // a smaller sum of squares may have lost some to underflow
};
template <>
struct Limits<double> {
  static constexpr double roundoff = 0x1p-53, tiny = 0x1p-1022, largest = 0x1.fffffffffffffp1023;
  static constexpr double least_square = 1e-285;
};
template <class T>
constexpr T kInfinity = __builtin_inf();
template <class T>
constexpr T kNaN = __builtin_nan("");

constexpr bool is_finite(double x) { return x - x == 0; }

// Subnormal numbers are kept within its scope, whatever the mode of the thread: every thread gives the same bits.
class ExactScope {
 public:
#ifdef FASTKIT_X86
  ExactScope() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~ExactScope() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  ExactScope() {}
#endif
};

template <class T>
FASTKIT_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// --- sums over the columns -------------------------------------------------------------------------------------------

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

template <class E>
FASTKIT_INLINE Arithmetic<E> exact_score(const TopKSearch<E>& s, int64_t seeker, int64_t found) {
  using T = Arithmetic<E>;
  const E *q = s.seekers.row(seeker), *x = s.found.row(found);
  if (s.l2) {
    return -sum_columns<E>(s.columns, [&](auto&& get, int64_t d, Vec<T> sum) {
      const Vec<T> difference = get(q + d) - get(x + d);
      return fma<T>(difference, difference, sum);
    });
  }
  const T product = sum_columns<E>(
      s.columns, [&](auto&& get, int64_t d, Vec<T> sum) { return fma<T>(get(q + d), get(x + d), sum); });
  return s.bias == nullptr ? product : product + s.bias[found];
}

// --- preparation -----------------------------------------------------------------------------------------------------

template <class E>
void center(const TopKTable<E>& table, int64_t n, int64_t columns, Arithmetic<E>* center) {
  using T = Arithmetic<E>;
  const int64_t some = n < 512 ? n : 512;
  for (int64_t d = 0; d < columns; ++d) center[d] = 0;
  for (int64_t i = 0; i < some; ++i) {
    const E* row = table.row(i * n / some);
    for (int64_t d = 0; d < columns; ++d) center[d] += widened(row[d]) / static_cast<T>(some);
  }
  for (int64_t d = 0; d < columns; ++d) center[d] = is_finite(center[d]) ? center[d] : T{0};
}

// The norm where squares over- or underflow, or where there is none. Of products, what is not finite in a row gives
// inf or NaN in any order of summation: the norm is that of the rest.
template <class E>
double careful_norm(const TopKBlock<E>& b, int64_t i) {
  using T = Arithmetic<E>;
  const auto element = [&](int64_t d) -> double {
    const T value = widened(b.table.row(i)[d]);
    return b.center == nullptr ? value : value - b.center[d];
  };
  double largest = 0, sum = 0;
  for (int64_t d = 0; d < b.columns; ++d) {
    const double x = element(d), size = x < 0 ? -x : x;
    if (is_finite(x)) {
      largest = largest < size ? size : largest;
    } else if (b.center != nullptr) {
      sum += size;
    }
  }
  if (sum != 0) return sum;  // inf or NaN
  for (int64_t d = 0; largest > 0 && d < b.columns; ++d) {
    const double x = element(d) / largest;
    if (is_finite(x)) sum += x * x;
  }
  return largest * __builtin_sqrt(sum);
}

template <class E>
void prepare_row(const TopKBlock<E>& b, int64_t i) {
  using T = Arithmetic<E>;
  const E* row = b.table.row(i);
  T* const packed = b.packed == nullptr ? nullptr : b.packed + i * b.columns;
  for (int64_t d = 0; packed != nullptr && d < b.columns; d += kLanes<E>) {
    const int64_t left = b.columns - d;
    if (left >= kLanes<E>) {
      const Vec<T> x = load(row + d);
      store(packed + d, b.center == nullptr ? x : x - load(b.center + d));
    } else {
      const Vec<T> x = load(row + d, left);
      store(packed + d, b.center == nullptr ? x : x - load(b.center + d, left), left);
    }
  }
  const auto square = [](auto&& get, const auto* of, Vec<T> sum) {
    const Vec<T> x = get(of);
    return fma<T>(x, x, sum);
  };
  const T squares =
      packed != nullptr
          ? sum_columns<T>(b.columns, [&](auto&& get, int64_t d, Vec<T> s) { return square(get, packed + d, s); })
          : sum_columns<E>(b.columns, [&](auto&& get, int64_t d, Vec<T> s) { return square(get, row + d, s); });
  const bool plain = squares >= Limits<T>::least_square && is_finite(squares);
  const double norm = plain ? __builtin_sqrt(static_cast<double>(squares)) : careful_norm(b, i);
  b.norms[i] = norm;
  if (b.half_squares == nullptr) return;
  b.half_squares[i] = -squares / 2;
  bool regular = is_finite(squares);
  for (int64_t d = 0; !regular && d < b.columns; ++d) {
    if (!is_finite(packed[d])) {
      // Its product may be NaN where its distance is inf: it is last of all by score, and the exact one decides.
      for (int64_t k = 0; k < b.columns; ++k) packed[k] = 0;
      b.norms[i] = 0;
      b.half_squares[i] = -kInfinity<T>;
      break;
    }
  }
}

template <class E>
void prepare(const TopKBlock<E>& b, int64_t begin, int64_t end) {
  ExactScope scope;
  for (int64_t i = begin; i < end; ++i) prepare_row(b, i);
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
    divide([&](int64_t at, auto... n) { return regular ? load(row + at, n...) / broadcast(largest) : broadcast(empty); });
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

// 2 e: how far a score may lie below the k-th best and yet be of one of the k best. inf: any distance. NaN: the seeker
// has NaN in it, and no distance to anything.
//
// With u the roundoff, D columns, sizes |q| and |x| and any orders of summation:
//   products   both sums err by (D + 2) u |q| |x|, adding a bias by u (|q| |x| + |b|)
//   distances  both err by (D + 5) u of (|q| + |x|)^2 together, in units of q . x - |x|^2 / 2
// and a few u are added for what is computed here. An arithmetic that takes subnormal numbers as zero errs by `tiny`
// for each term. What could overflow, in some order, has no bound.
template <class E>
FASTKIT_INLINE Arithmetic<E> margin_of(const TopKSearch<E>& s, int64_t seeker) {
  using T = Arithmetic<E>;
  using Is = Limits<T>;
  const double q = s.norms[seeker], x = s.reach, columns = static_cast<double>(s.columns);
  const double size = s.l2 ? (q + x) * (q + x) : q * x + s.bias_reach;
  if (size != size) return kNaN<T>;
  const double terms = s.l2 ? (columns + 12) * size : (2 * columns + 8) * q * x + 4 * s.bias_reach;
  const double e = Is::roundoff * terms + s.product_error * q * x + 4 * Is::tiny * columns * (1 + q + x);
  return size < Is::largest / 4 && 2 * e < Is::largest ? static_cast<T>(2 * e) : kInfinity<T>;
}

FASTKIT_INLINE bool better(float a, float b) { return a > b; }
FASTKIT_INLINE bool better(double a, double b) { return a > b; }
template <class T>
FASTKIT_INLINE bool better(const TopKCandidate<T>& a, const TopKCandidate<T>& b) {
  return a.exact > b.exact || (a.exact == b.exact && a.found < b.found);
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

// Leaves the k best of a list, exact.
template <class E>
void decide(const TopKSearch<E>& s, int64_t seeker) {
  using T = Arithmetic<E>;
  TopKList<T>& list = s.lists[seeker];
  TopKCandidate<T>* const heap = s.candidates + seeker * topk_room(s.k);
  for (int64_t c = list.decided; c < list.count; ++c) {
    TopKCandidate<T> candidate = heap[c];
    if (c + 1 < list.count) {
      const char* next = reinterpret_cast<const char*>(s.found.row(heap[c + 1].found));
      const int64_t bytes = s.columns * static_cast<int64_t>(sizeof(E));
      for (int64_t b = 0; b < bytes && b < 4096; b += kLineBytes) prefetch_near(next + b);
    }
    candidate.exact = exact_score(s, seeker, candidate.found);
    if (candidate.exact != candidate.exact) continue;
    list.decided += keep_best(heap, list.decided, s.k, candidate);
  }
  list.count = list.decided;
}

// Drops what lies too far below the floor; where too much is left, decides, which may raise the floor.
template <class E>
void narrow(const TopKSearch<E>& s, int64_t seeker, Arithmetic<E> margin) {
  using T = Arithmetic<E>;
  TopKList<T>& list = s.lists[seeker];
  TopKCandidate<T>* const candidates = s.candidates + seeker * topk_room(s.k);
  const T threshold = is_finite(margin) ? list.floor - margin : -kInfinity<T>;
  int32_t kept = list.decided;
  for (int32_t c = list.decided; c < list.count; ++c) {
    candidates[kept] = candidates[c];
    kept += candidates[c].score >= threshold;
  }
  list.count = kept;
  if (kept <= (s.k + topk_room(s.k)) / 2) return;
  decide(s, seeker);
  if (list.decided < s.k || !is_finite(margin)) return;
  double kth = candidates[0].exact;
  if (s.l2) kth = (s.norms[seeker] * s.norms[seeker] + kth) / 2;  // in the units of scores
  const T floor = static_cast<T>(kth - margin);
  if (floor > list.floor) list.floor = floor;
}

template <class E>
FASTKIT_INLINE bool append(const TopKSearch<E>& s, int64_t seeker, Arithmetic<E> score, int64_t found) {
  TopKList<Arithmetic<E>>& list = s.lists[seeker];
  s.candidates[seeker * topk_room(s.k) + list.count++] = {score, 0, static_cast<int32_t>(found)};
  return list.count == topk_room(s.k);
}

// Takes a candidate; the threshold for others.
template <class E>
FASTKIT_INLINE Arithmetic<E> take(const TopKSearch<E>& s, int64_t seeker, Arithmetic<E> margin, Arithmetic<E> score,
                                  int64_t found) {
  using T = Arithmetic<E>;
  TopKList<T>& list = s.lists[seeker];
  T* const best = s.best + seeker * s.k;
  list.known += keep_best(best, list.known, s.k, score);
  if (list.known == s.k && best[0] > list.floor) list.floor = best[0];
  if (append(s, seeker, score, found)) narrow(s, seeker, margin);
  return list.floor - margin;
}

// Where scores say nothing: n rows are candidates.
template <class E>
void take_all(const TopKSearch<E>& s, int64_t seeker, int64_t first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (append(s, seeker, Arithmetic<E>{0}, first + i)) narrow(s, seeker, kInfinity<Arithmetic<E>>);
  }
}

template <class E>
void begin_lists(const TopKSearch<E>& s, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) s.lists[i] = {-kInfinity<Arithmetic<E>>, 0, 0, 0};
}

// --- scans -----------------------------------------------------------------------------------------------------------

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
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint64_t>(v[i] >= threshold[i]) << i;
  return bits;
#endif
}

constexpr int kVectors = 4;  // that are looked at together
template <class T>
constexpr int kStep = kVectors * kLanes<T>;
static_assert(kStep<float> <= 64);  // bits

// Calls hit(j) for each element of [begin, end) with score(j) at least threshold(j).
template <class T, class Scores, class Thresholds, class Hit>
FASTKIT_INLINE void each_hit(int64_t begin, int64_t end, Scores&& scores, Thresholds&& thresholds, Hit&& hit) {
  int64_t j = begin;
  const auto whole = [](const T* p) { return load(p); };
  for (; j + kStep<T> <= end; j += kStep<T>) {
    uint64_t bits = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = j + i * kLanes<T>;
      bits |= hits<T>(scores(whole, at), thresholds(whole, at)) << (i * kLanes<T>);
    }
    for (; bits != 0; bits &= bits - 1) hit(j + __builtin_ctzll(bits));
  }
  for (; j < end; j += kLanes<T>) {
    const int64_t left = end - j < kLanes<T> ? end - j : int64_t{kLanes<T>};
    const auto part = [&](const T* p) { return left == kLanes<T> ? load(p) : load(p, left); };
    uint64_t bits = hits<T>(scores(part, j), thresholds(part, j)) & ((uint64_t{1} << left) - 1);
    for (; bits != 0; bits &= bits - 1) hit(j + __builtin_ctzll(bits));
  }
}

template <class E>
void scan_rows(const TopKSearch<E>& s, const TopKScores<Arithmetic<E>>& block, int64_t first, int64_t begin,
               int64_t end) {
  using T = Arithmetic<E>;
  ExactScope scope;
  for (int64_t i = begin; i < end; ++i) {
    const T margin = margin_of(s, i);
    if (margin != margin) continue;
    if (!is_finite(margin)) {
      take_all(s, i, first, block.columns);
      continue;
    }
    const T* const row = block.data + i * block.stride;
    const auto scores = [&](auto&& get, int64_t j) {
      return block.bias == nullptr ? get(row + j) : get(row + j) + get(block.bias + j);
    };
    Vec<T> threshold = Vec<T>{} + (s.lists[i].floor - margin);
    each_hit<T>(0, block.columns, scores, [&](auto&&, int64_t) { return threshold; }, [&](int64_t j) {
      const T score = block.bias == nullptr ? row[j] : row[j] + block.bias[j];
      threshold = Vec<T>{} + take(s, i, margin, score, first + j);
    });
  }
}

template <class E>
void scan_columns(const TopKSearch<E>& s, const TopKScores<Arithmetic<E>>& block, int64_t first, int64_t begin,
                  int64_t end) {
  using T = Arithmetic<E>;
  ExactScope scope;
  for (int64_t j = begin; j < end; ++j) {
    const T margin = margin_of(s, j);
    s.thresholds[j] = is_finite(margin) ? s.lists[j].floor - margin : kNaN<T>;
    if (!is_finite(margin)) take_all(s, j, first, block.rows);
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    const T* const row = block.data + i * block.stride;
    const auto scores = [&](auto&& get, int64_t j) { return get(row + j); };
    const auto thresholds = [&](auto&& get, int64_t j) { return get(static_cast<const T*>(s.thresholds + j)); };
    each_hit<T>(begin, end, scores, thresholds, [&](int64_t j) {
      s.thresholds[j] = take(s, j, margin_of(s, j), row[j], first + i);
    });
  }
}

template <class E>
void finish(const TopKSearch<E>& s, int64_t begin, int64_t end, Arithmetic<E>* values, int64_t* indices) {
  using T = Arithmetic<E>;
  ExactScope scope;
  for (int64_t i = begin; i < end; ++i) {
    const T margin = margin_of(s, i);
    narrow(s, i, margin == margin ? margin : kInfinity<T>);
    decide(s, i);
    TopKCandidate<T>* const heap = s.candidates + i * topk_room(s.k);
    const int64_t n = s.lists[i].decided;
    for (int64_t at = n - 1; at >= 0; --at) {  // the worst first
      values[i * s.k + at] = s.l2 ? -heap[0].exact : heap[0].exact;
      indices[i * s.k + at] = heap[0].found;
      sift_down(heap, at, TopKCandidate<T>(heap[at]));
    }
    for (int64_t at = n; at < s.k; ++at) values[i * s.k + at] = kNaN<T>, indices[i * s.k + at] = -1;
  }
}

template <class E>
constexpr TopKFunctions<E> kFunctions = {center<E>, prepare<E>, begin_lists<E>, scan_rows<E>, scan_columns<E>,
                                         finish<E>, unit_rows<E>};

}  // namespace

const TopKKernels topk_kernels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
