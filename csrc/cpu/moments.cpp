// moments on the CPU.
//
// What       p = sqrt(w) (x - s), with a shift s near the mean of the rows nearby; scatter = p^T p, less what s is off
//            by. Both sides of the product are p, so that it is packed once, and of the product the lower half is
//            computed.
// Parallel   segments of rows, each with a count, mean and scatter of its own, which finish() merges in order; where
//            they are fewer than threads, groups of panels too, each of which packs what it takes of the rows.
//            kBlock rows at a time are packed, as panels (panel, row, kWide) that stay in the second-level cache. A
//            tile of the product is kRows columns of a panel, broadcast, by the kWide of another; on the diagonal it
//            ends with the vector that holds the diagonal.
// Bytes      x is read once: a block is fetched while the one before it is multiplied. A segment has the lower half
//            twice, in T, which is read and written once a block, and in double, once a span: 6 (float64: 8) D^2.
// Numerics   sums in T over a block, which are added up in T over a span of kSpan rows, and those in double. A span
//            has a shift of its own, the mean of kSample rows at equal steps of the sum of its weights, so that it is
//            near the mean also where most weights are zero, or rows are sorted, or drift. What it is off by is known
//            from t = sum of w (x - s): with n the sum of w the mean is s + t / n, and p^T p - t t^T / n the scatter.
//            The shift is refined once: that of a constant column is the constant, and p is zero.
//            Units follow the number of threads, and so may the last bits.
#include "fastkit/moments.h"

#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int64_t kBlock = 96;
constexpr int64_t kSpan = 20 * kBlock;
constexpr int kSample = 16;
constexpr int kVectors = 3;
template <class T>
constexpr int kWide = kVectors * kLanes<T>;
template <class T>  // so that the sums of a tile, 12, 18 or 24 vectors, leave registers for what they are made of
constexpr int kRows = kVectorBytes == 64 ? 8 : kManyRegisters ? 6 : kLanes<T> < 4 ? kLanes<T> : 4;

FASTKIT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
FASTKIT_INLINE void zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// --- where things lie ------------------------------------------------------------------------------------------

template <class T>
FASTKIT_INLINE int64_t panels_of(int64_t columns) {
  return (columns + kWide<T> - 1) / kWide<T>;
}

// Of a lower half, where a panel begins: (rows, kWide), from the row of its first column on.
template <class T>
FASTKIT_INLINE int64_t half(int64_t columns, int64_t panel) {
  return kWide<T> * (panel * up_to(columns, kRows<T>) - kWide<T> * (panel * (panel - 1) / 2));
}

// The first panel of a group; groups have about equal shares of the lower half.
template <class T>
FASTKIT_INLINE int64_t first_panel(int64_t columns, int64_t groups, int64_t group) {
  const int64_t panels = panels_of<T>(columns);
  int64_t panel = 0;
  while ((panels - panel) * (panels - panel) * groups > panels * panels * (groups - group)) ++panel;
  return panel;
}

// In doubles, each array on a cache line.
template <class E>
struct Room {
  using T = Arithmetic<E>;
  int64_t wide, half_double, half_t, wide_t, sums, roots, packed, unit;
  const Moments<E>& call;

  FASTKIT_ALWAYS_INLINE static int64_t of_t(int64_t n) { return up_to(n * static_cast<int64_t>(sizeof(T)), 64) / 8; }

  FASTKIT_ALWAYS_INLINE explicit Room(const Moments<E>& p) : call(p) {
    const int64_t panels = panels_of<T>(p.columns), all = half<T>(p.columns, panels);
    half_double = up_to(all, 8), half_t = of_t(all);
    wide = up_to(panels * kWide<T>, 8), wide_t = of_t(panels * kWide<T>);
    roots = of_t(kSpan), packed = of_t(kBlock * panels * kWide<T>);
    sums = 8 + 3 * wide + 2 * wide_t, unit = sums + roots + packed;
  }
  FASTKIT_ALWAYS_INLINE int64_t all() const { return call.segments * (half_double + half_t) + call.units() * unit; }

  // Of a segment.
  FASTKIT_ALWAYS_INLINE double* scatter(int64_t s) const { return call.room + s * (half_double + half_t); }
  FASTKIT_ALWAYS_INLINE T* product(int64_t s) const { return reinterpret_cast<T*>(scatter(s) + half_double); }
  // Of a unit: the count, and in each column the mean; what a span takes.
  FASTKIT_ALWAYS_INLINE double* count(int64_t u) const { return scatter(call.segments) + u * unit; }
  FASTKIT_ALWAYS_INLINE double* mean(int64_t u) const { return count(u) + 8; }
  FASTKIT_ALWAYS_INLINE double* t(int64_t u) const { return mean(u) + wide; }
  FASTKIT_ALWAYS_INLINE double* apart(int64_t u) const { return t(u) + wide; }
  FASTKIT_ALWAYS_INLINE T* shift(int64_t u) const { return reinterpret_cast<T*>(apart(u) + wide); }
  FASTKIT_ALWAYS_INLINE T* of_sums(int64_t u) const { return reinterpret_cast<T*>(apart(u) + wide + wide_t); }
  FASTKIT_ALWAYS_INLINE T* of_roots(int64_t u) const { return reinterpret_cast<T*>(apart(u) + wide + 2 * wide_t); }
  FASTKIT_ALWAYS_INLINE T* of_packed(int64_t u) const {
    return reinterpret_cast<T*>(apart(u) + wide + 2 * wide_t + roots);
  }
};

template <class E>
int64_t moments_panels(const Moments<E>& p) {
  return panels_of<Arithmetic<E>>(p.columns);
}

template <class E>
int64_t moments_room(const Moments<E>& p) {
  return Room<E>(p).all();
}

// --- a span: weights and shift ---------------------------------------------------------------------------------

// The first of n rows whose weight is negative or not finite, or -1; outside of KernelScope, for signs of subnormals.
template <class E>
FASTKIT_INLINE int64_t refused_row(const Moments<E>& p, int64_t row, int64_t n) {
  if (p.weights == nullptr) return -1;
  for (int64_t i = row; i < row + n; ++i) {
    if (!(p.weights[i] >= 0 && __builtin_isfinite(p.weights[i]))) return i;
  }
  return -1;
}

// Square roots of the weights of n rows, and the rows at which the sum of the weights makes kSample equal steps.
template <class E>
struct Weights {
  using T = Arithmetic<E>;
  double sum = 0;
  int64_t sample[kSample];
  int sampled = 0;  // none where there is no weight

  FASTKIT_ALWAYS_INLINE Weights(const Moments<E>& p, int64_t row, int64_t n, T* roots) {
    const auto weight = [&](int64_t i) { return p.weights == nullptr ? T{1} : p.weights[row + i]; };
    for (int64_t i = 0; i < n; ++i) {
      roots[i] = sizeof(T) == 4 ? __builtin_sqrtf(weight(i)) : __builtin_sqrt(weight(i));
      sum += weight(i);
    }
    double until = 0;
    for (int64_t i = 0; i < n; ++i) {
      until += weight(i);
      while (sampled < kSample && until > (sampled + 0.5) / kSample * sum) sample[sampled++] = row + i;
    }
  }
};

// A vector of a row; behind the last column zeros.
template <class E>
FASTKIT_INLINE Vec<E> read(const E* row, int64_t column, int64_t columns) {
  const int64_t left = columns - column;
  return left >= kLanes<E> ? load(row + column) : load(row + column, left);
}

template <class E, class T = Arithmetic<E>>
FASTKIT_INLINE void choose_shift(const Moments<E>& p, const Weights<E>& weights, int64_t first, T* shift) {
  constexpr T kShare = T{1} / kSample;
  for (int64_t column = first; column < p.columns; column += kLanes<T>) {
    Vec<T> mean{}, rest{};
    if (weights.sampled == kSample) {
      for (int64_t row : weights.sample) mean += kShare * read(p.x + row * p.stride, column, p.columns);
      for (int64_t row : weights.sample) rest += kShare * (read(p.x + row * p.stride, column, p.columns) - mean);
    }
    store(shift + column, mean + rest);
  }
}

// --- a block: pack and multiply --------------------------------------------------------------------------------

// kSome rows, x the first of them, into panels from column `first` on; sums += w (x - s)
template <int kSome, class E, class T = Arithmetic<E>>
FASTKIT_INLINE void pack_some(const Moments<E>& p, const E* x, int64_t first, const T* roots, const T* shift, T* sums,
                              T* packed) {
  Vec<T> root[kSome];
  for (int i = 0; i < kSome; ++i) root[i] = broadcast(roots[i]);
  // A vector of each row at a column; behind the last one are zeros, which reach no result.
  const auto pack = [&](int64_t column, T* to, auto&& read_row) {
    const Vec<T> s = load(const_cast<const T*>(shift + column));
    Vec<T> sum = load(const_cast<const T*>(sums + column));
#pragma GCC unroll 4
    for (int i = 0; i < kSome; ++i) {
      const Vec<T> centred = root[i] * (read_row(x + i * p.stride) - s);
      sum = fma<T>(root[i], centred, sum);
      store(to + i * kWide<T>, centred);
    }
    store(sums + column, sum);
  };
  int64_t column = first;
  for (; column + kWide<T> <= p.columns; column += kWide<T>) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes<T>;
      pack(at, packed + v * kLanes<T>, [&](const E* row) { return load(row + at); });
    }
    packed += kBlock * kWide<T>;
  }
  for (; column < p.columns; column += kLanes<T>) {
    pack(column, packed, [&](const E* row) { return read(row, column, p.columns); });
    packed += kLanes<T>;
  }
}

// A tile (kRows, kWide) += a^T b, of n rows of two panels, in its first kOf vectors
template <int kOf, class T>  // a function of its own, so that its sums have all registers
__attribute__((noinline)) void multiply(const T* __restrict__ a, const T* __restrict__ b, int64_t n,
                                        T* __restrict__ tile) {
  constexpr int kSome = kRows<T>;
  Vec<T> sum[kSome][kOf] = {};
  for (int64_t i = 0; i < n; ++i) {
    Vec<T> of_b[kOf];
#pragma GCC unroll 3
    for (int v = 0; v < kOf; ++v) of_b[v] = load(b + i * kWide<T> + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kSome; ++r) {
      const Vec<T> of_a = broadcast(a[i * kWide<T> + r]);
#pragma GCC unroll 3
      for (int v = 0; v < kOf; ++v) sum[r][v] = fma<T>(of_a, of_b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSome; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kOf; ++v) {
      T* to = tile + r * kWide<T> + v * kLanes<T>;
      store(to, load(const_cast<const T*>(to)) + sum[r][v]);
    }
  }
}

// The cache lines of the rows that come next, some at a time.
template <class E>
struct Ahead {
  const char *row, *at, *end;
  int64_t bytes, stride, left;

  FASTKIT_ALWAYS_INLINE Ahead(const Moments<E>& p, int64_t from, int64_t n, int64_t first)
      : row(reinterpret_cast<const char*>(p.x + from * p.stride + first)), at(row),
        bytes((p.columns - first) * static_cast<int64_t>(sizeof(E))),
        stride(p.stride * static_cast<int64_t>(sizeof(E))), left(n) {
    end = row + bytes;
  }
  FASTKIT_ALWAYS_INLINE int64_t lines() const { return left * (bytes / kLineBytes + 1); }
  FASTKIT_ALWAYS_INLINE void fetch(int64_t some) {
    for (; some > 0 && left > 0; --some) {
      prefetch(at);
      at += kLineBytes;
      if (at < end) continue;
      row += stride, at = row, end = row + bytes;
      --left;
    }
  }
};

// product += packed^T packed, of n rows, in the panels [first, last); packed from panel `first` on
template <class E, class T = Arithmetic<E>>
FASTKIT_INLINE void multiply_block(int64_t columns, int64_t first, int64_t last, const T* packed, int64_t n, T* product,
                                   Ahead<E>& ahead) {
  if (first == last) return;  // of few panels some groups have none
  const int64_t panels = panels_of<T>(columns);
  const int64_t pairs = (last - first) * (2 * panels - first - last + 1) / 2;
  const int64_t some = ahead.lines() / pairs + 1;
  T* tile = product + half<T>(columns, first);
  for (int64_t j = first; j < last; ++j) {
    const T* b = packed + (j - first) * kBlock * kWide<T>;
    for (int64_t i = j; i < panels; ++i) {
      ahead.fetch(some);
      const T* a = packed + (i - first) * kBlock * kWide<T>;
      const int64_t rows = least(columns - i * kWide<T>, kWide<T>);
      for (int64_t r = 0; r < rows; r += kRows<T>) {
        const int64_t vectors = i > j ? kVectors : (r + kRows<T> - 1) / kLanes<T> + 1;
        if (vectors == 3) {
          multiply<3>(a + r, b, n, tile);
        } else if (vectors == 2) {
          multiply<2>(a + r, b, n, tile);
        } else {
          multiply<1>(a + r, b, n, tile);
        }
        tile += kRows<T> * kWide<T>;
      }
    }
  }
}

// --- sums of spans and of segments -----------------------------------------------------------------------------

// The pairwise update of Chan, Golub and LeVeque: the shares of a part of weight n beside what has weight `before`.
struct Shares {
  double inverse, share, between;  // 1 / n, n / (before + n), before n / (before + n); 0 where n is

  FASTKIT_ALWAYS_INLINE Shares(double before, double n)
      : inverse(n > 0 ? 1 / n : 0), share(n > 0 ? n / (before + n) : 0), between(before * share) {}
};

// scatter += product - t t^T / n + between d d^T, in a row of a panel; product = 0
template <class T>
FASTKIT_INLINE void add_row(double* __restrict__ scatter, T* __restrict__ product, const double* __restrict__ t,
                            const double* __restrict__ d, double of_t, double of_d) {
  for (int c = 0; c < kWide<T>; ++c) {
    scatter[c] += static_cast<double>(product[c]) - of_t * t[c] + of_d * d[c];
    product[c] = 0;
  }
}

template <class E>
void run_span(const Moments<E>& p, const Room<E>& room, int64_t unit, int64_t row, int64_t n, int64_t end) {
  using T = Arithmetic<E>;
  const int64_t segment = unit / p.groups, group = unit % p.groups;
  const int64_t first = first_panel<T>(p.columns, p.groups, group);
  const int64_t last = first_panel<T>(p.columns, p.groups, group + 1), column = first * kWide<T>;
  T *roots = room.of_roots(unit), *shift = room.shift(unit), *sums = room.of_sums(unit), *packed = room.of_packed(unit);
  T* product = room.product(segment);
  double *t = room.t(unit), *mean = room.mean(unit), *apart = room.apart(unit);
  p.refused[unit] = refused_row(p, row, n);
  if (p.refused[unit] >= 0) return;
  KernelScope scope;
  const Weights<E> weights(p, row, n, roots);
  choose_shift(p, weights, column, shift);
  zero(t + column, p.columns - column);
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t some = least(n - block, kBlock);
    zero(sums + column, p.columns - column);
    const E* x = p.x + (row + block) * p.stride;
    int64_t i = 0;
    for (; i + 4 <= some; i += 4) {
      pack_some<4>(p, x + i * p.stride, column, roots + block + i, shift, sums, packed + i * kWide<T>);
    }
    for (; i < some; ++i) {
      pack_some<1>(p, x + i * p.stride, column, roots + block + i, shift, sums, packed + i * kWide<T>);
    }
    for (int64_t c = column; c < p.columns; ++c) t[c] += sums[c];
    const int64_t next = row + block + some;
    Ahead<E> ahead(p, next, least(end - next, kBlock), column);
    multiply_block(p.columns, first, last, packed, some, product, ahead);
  }
  const Shares shares(*room.count(unit), weights.sum);
  for (int64_t c = column; c < p.columns; ++c) {
    apart[c] = static_cast<double>(shift[c]) + shares.inverse * t[c] - mean[c];
    mean[c] += shares.share * apart[c];
  }
  *room.count(unit) += weights.sum;
  double* scatter = room.scatter(segment);
  for (int64_t panel = first; panel < last; ++panel) {
    int64_t at = half<T>(p.columns, panel);
    const int64_t from = panel * kWide<T>;
    for (int64_t c = from; c < p.columns; ++c) {
      add_row(scatter + at, product + at, t + from, apart + from, shares.inverse * t[c], shares.between * apart[c]);
      at += kWide<T>;
    }
  }
}

template <class E>
void run_moments(const Moments<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  const Room<E> room(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t segment = unit / p.groups, group = unit % p.groups;
    const int64_t from = half<T>(p.columns, first_panel<T>(p.columns, p.groups, group));
    const int64_t to = half<T>(p.columns, first_panel<T>(p.columns, p.groups, group + 1));
    zero(room.scatter(segment) + from, to - from);
    zero(room.product(segment) + from, to - from);
    zero(room.count(unit), room.sums);
    const int64_t rows = p.rows * (segment + 1) / p.segments;
    for (int64_t row = p.rows * segment / p.segments; row < rows && p.refused[unit] < 0; row += kSpan) {
      run_span(p, room, unit, row, least(rows - row, kSpan), rows);
    }
  }
}

// count, mean and scatter: the sums of segments, of which each is moved to the mean of all.
template <class E>
void finish_moments(const Moments<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  KernelScope scope;
  const Room<E> room(p);
  double count = 0;
  for (int64_t s = 0; s < p.segments; ++s) count += *room.count(s * p.groups);
  if (begin == 0) *p.count = count;
  for (int64_t panel = begin, group = 0; panel < end; ++panel) {
    while (first_panel<T>(p.columns, p.groups, group + 1) <= panel) ++group;
    const auto unit = [&](int64_t s) { return s * p.groups + group; };
    const auto mean_of = [&](int64_t column) {
      const double first = room.mean(unit(0))[column];
      double mean = first;
      for (int64_t s = 1; s < p.segments; ++s) {
        const double share = count > 0 ? *room.count(unit(s)) / count : 0;
        mean += share * (room.mean(unit(s))[column] - first);
      }
      return mean;
    };
    const int64_t from = panel * kWide<T>;
    double mean[kWide<T>];
    for (int c = 0; c < kWide<T>; ++c) mean[c] = mean_of(from + c);
    for (int64_t c = from; c < least(from + kWide<T>, p.columns); ++c) p.mean[c] = static_cast<T>(mean[c - from]);
    for (int64_t row = from; row < p.columns; ++row) {
      const double of_row = mean_of(row);
      double sum[kWide<T>] = {};
      for (int64_t s = 0; s < p.segments; ++s) {
        const double* scatter = room.scatter(s) + half<T>(p.columns, panel) + (row - from) * kWide<T>;
        const double* means = room.mean(unit(s));
        const double apart = *room.count(unit(s)) * (means[row] - of_row);
        for (int c = 0; c < kWide<T>; ++c) sum[c] += scatter[c] + apart * (means[from + c] - mean[c]);
      }
      for (int64_t c = from; c < least(from + kWide<T>, row + 1); ++c) {
        const double value = c == row && sum[c - from] < 0 ? 0 : sum[c - from];
        p.scatter[row * p.columns + c] = p.scatter[c * p.columns + row] = static_cast<T>(value);
      }
    }
  }
}

template <class E>
constexpr MomentsFunctions<E> kFunctions = {moments_panels<E>, moments_room<E>, run_moments<E>, finish_moments<E>};

}  // namespace

const MomentsKernels moments_kernels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
