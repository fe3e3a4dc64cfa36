// multihead_loss on the CPU.
//
// What       Forward: x, packed columns first; then, for some heads at a time, their logits, kTile by kWide of them in
//            registers, and from these, still in a cache, loss, right rows and dz. Backward: dX = dZ^T W and dW = dZ^T X,
//            where dZ is not scaled: W is as it is packed, dW as it is written.
// Parallel   heads; backward columns, kWide at a time.
// Bytes      of a float32 element: z 4 written, 4 read again and with a gradient 12 more, of a cache, dz 4 read twice;
//            the weight is read once forward and backward, its gradient written once.
// Numerics   the arithmetic of the logits. Sums of a product run over its depth in order, dX over some 200 logits at a
//            time; a loss is summed over the lanes of a vector first, then over those; what the losses are divided by is
//            summed in double. e^x to some units in the last place, 0 below e^-87 (e^-708). A row with NaN has NaN, and
//            is not right. The number of threads changes no bit.
#include <cmath>

#include "cpu/exponential.h"
#include "cpu/products.h"
#include "fastkit/multihead_loss.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kTile = kManyRegisters ? 12 : 6;
constexpr int64_t kDepth = 192;  // rows that are packed for a tile of a gradient at a time

template <class T>
FASTKIT_INLINE T sum_of(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// A call, and what its heads share.
template <class T>
struct Call : MultiheadForward<T> {
  T* packed;        // (tiles of rows, columns, kWide)
  T* coefficients;  // (3, rows), of a single label: a, b, c
  T scale;          // of the other two

  bool counts(int64_t row) const { return this->target == nullptr || this->target[row] != this->ignore_index; }
};

// The rows of a batch that lie in one vector: all lanes, or the first n.
template <class T, bool Whole>
struct Lanes {
  int64_t n;
  FASTKIT_ALWAYS_INLINE Vec<T> read(const T* p) const {
    if constexpr (Whole) return fastkit::FASTKIT_ISA::load(p);
    return fastkit::FASTKIT_ISA::load(p, n);
  }
  FASTKIT_ALWAYS_INLINE void write(T* p, Vec<T> v) const {
    if constexpr (Whole) return fastkit::FASTKIT_ISA::store(p, v);
    fastkit::FASTKIT_ISA::store(p, v, n);
  }
};

template <class T>
struct Found {
  Vec<T> loss{};
  int64_t correct = 0;
};

// Rows b .. b + n - 1 of a head, whose logits of a class begin at z + class * rows.
template <class T, bool Whole>
FASTKIT_INLINE void single_label_lanes(const Call<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes,
                                       Found<T>& found) {
  const Vec<T> one = broadcast<T>(1), zero{};
  Vec<T> best = broadcast<T>(-kInfinity<T>), place = broadcast<T>(-1), sum{}, weighted{}, nan{};
  for (int64_t c = 0; c < p.classes; ++c) {
    const Vec<T> v = lanes.read(z + c * p.rows + b);
    const Vec<T> is_more = (place < zero) | (v > best) ? one : zero;
    place = is_more > zero ? broadcast<T>(static_cast<T>(c)) : place;
    best = is_more > zero ? v : best;
    nan += v == v ? zero : one;
  }
  const Vec<T> of_p = lanes.read(p.coefficients + b), of_target = lanes.read(p.coefficients + p.rows + b),
               of_each = lanes.read(p.coefficients + 2 * p.rows + b);
  bool smooths = false;
  Vec<T> target_z{}, counted{};
  for (int i = 0; i < lanes.n; ++i) {
    const int64_t t = p.target[b + i];
    counted[i] = t != p.ignore_index;
    target_z[i] = t >= 0 && t < p.classes ? z[t * p.rows + b + i] : static_cast<T>(__builtin_nan(""));
    smooths |= of_each[i] != 0;
  }
  Vec<T> shift = best;
  for (int i = 0; i < kLanes<T>; ++i) {
    if (!(best[i] > -kInfinity<T> && best[i] < kInfinity<T>)) shift[i] = 0;  // that of NaN too
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    T* at = z + c * p.rows + b;
    const Vec<T> v = lanes.read(at), e = exponential_or_zero<T>(v - shift);
    sum += e;
    if (smooths) weighted += (p.class_weight != nullptr ? broadcast(p.class_weight[c]) : one) * v;
    if (p.gradient) lanes.write(at, e);
  }
  Vec<T> lse{};
  for (int i = 0; i < kLanes<T>; ++i) {
    const bool infinite = best[i] == kInfinity<T>;  // then it is lse, and the shares are NaN
    lse[i] = (infinite ? best[i] : shift[i]) + std::log(sum[i]);
    if (infinite) sum[i] = static_cast<T>(__builtin_nan(""));
  }
  const auto counts = counted > zero;
  found.loss += counts ? of_p * lse - of_target * target_z - of_each * weighted : zero;
  for (int i = 0; i < lanes.n; ++i) {
    found.correct += nan[i] == 0 && counts[i] && place[i] == static_cast<T>(p.target[b + i]);
  }
  if (!p.gradient) return;
  const Vec<T> factor = of_p / sum;
  for (int64_t c = 0; c < p.classes; ++c) {
    T* at = z + c * p.rows + b;
    const Vec<T> smooth = p.class_weight != nullptr ? of_each * broadcast(p.class_weight[c]) : of_each;
    const Vec<T> dz = lanes.read(at) * factor - smooth;
    lanes.write(at, counts ? dz : zero);
  }
  for (int i = 0; i < lanes.n; ++i) {
    const int64_t t = p.target[b + i];
    if (counts[i] && t >= 0 && t < p.classes) z[t * p.rows + b + i] -= of_target[i];
  }
}

template <class T, bool Whole>
FASTKIT_INLINE void multi_label_lanes(const Call<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes,
                                      Found<T>& found) {
  const Vec<T> one = broadcast<T>(1), zero{};
  for (int64_t c = 0; c < p.classes; ++c) {
    T* at = z + c * p.rows + b;
    const Vec<T> v = lanes.read(at), wanted = lanes.read(p.wanted + c * p.rows + b);
    const Vec<T> e = exponential_or_zero<T>(v > zero ? -v : v);  // e^-|z|
    Vec<T> logarithm{};
    for (int i = 0; i < kLanes<T>; ++i) logarithm[i] = std::log1p(e[i]);
    const T weight = p.class_weight != nullptr ? p.class_weight[c] : T(1);
    const Vec<T> loss = broadcast(weight) * (((v > zero ? one : zero) - wanted) * v + logarithm);
    for (int i = 0; i < lanes.n; ++i) {
      found.loss[i] += loss[i];
      found.correct += v[i] == v[i] && (v[i] > 0) == (wanted[i] > T(0.5));
    }
    if (!p.gradient) continue;
    const Vec<T> sigmoid = (v > zero ? one : e) / (one + e);
    lanes.write(at, broadcast(p.scale * weight) * (sigmoid - wanted));
  }
}

template <class T, bool Whole>
FASTKIT_INLINE void regression_lanes(const Call<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes,
                                     Found<T>& found) {
  for (int64_t c = 0; c < p.classes; ++c) {
    T* at = z + c * p.rows + b;
    const Vec<T> far = lanes.read(at) - lanes.read(p.wanted + c * p.rows + b);
    found.loss += far * far;  // 0 where there is no row
    if (p.gradient) lanes.write(at, broadcast(2 * p.scale) * far);
  }
}

template <class T, HeadProblem P, bool Whole>
FASTKIT_INLINE void of_lanes(const Call<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes, Found<T>& found) {
  if constexpr (P == HeadProblem::single_label) single_label_lanes<T, Whole>(p, z, b, lanes, found);
  if constexpr (P == HeadProblem::multi_label) multi_label_lanes<T, Whole>(p, z, b, lanes, found);
  if constexpr (P == HeadProblem::regression) regression_lanes<T, Whole>(p, z, b, lanes, found);
}

template <class T, HeadProblem P>
FASTKIT_INLINE void of_head(const Call<T>& p, int64_t head) {
  constexpr int lanes = kLanes<T>;
  T* z = p.z + head * p.classes * p.rows;
  Found<T> found;
  int64_t b = 0;
  for (; b + lanes <= p.rows; b += lanes) of_lanes<T, P, true>(p, z, b, {lanes}, found);
  if (b < p.rows) of_lanes<T, P, false>(p, z, b, {p.rows - b}, found);
  p.loss[head] = sum_of<T>(found.loss) * (P == HeadProblem::single_label ? T(1) : p.scale);
  p.correct[head] = found.correct;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class T>
int64_t packed_size(const Multihead<T>& p) {
  return up_to(p.rows, kWide<T>) * p.columns;
}

template <class T>
int64_t room(const MultiheadForward<T>& p) {
  return packed_size(p) + 3 * p.rows;
}

// a, b and c of each row; how many count.
template <class T>
void share_rows(const Call<T>& p) {
  const auto weight_of = [&](int64_t b) {
    const int64_t t = p.target[b];
    return p.class_weight == nullptr ? T(1) : t >= 0 && t < p.classes ? p.class_weight[t] : T(__builtin_nan(""));
  };
  double divisor = 0, total = p.class_weight == nullptr ? static_cast<double>(p.classes) : 0;
  int64_t count = 0;
  for (int64_t b = 0; b < p.rows; ++b) {
    if (p.counts(b)) divisor += weight_of(b), ++count;
  }
  for (int64_t c = 0; p.class_weight != nullptr && c < p.classes; ++c) total += p.class_weight[c];
  const double share = divisor == 0 ? 1 : 1 / divisor, each = p.label_smoothing / static_cast<double>(p.classes) * share;
  for (int64_t b = 0; b < p.rows; ++b) {
    const double counts = p.counts(b), of_target = counts == 0 ? 0 : (1 - p.label_smoothing) * share * weight_of(b);
    p.coefficients[b] = static_cast<T>(of_target + total * each * counts);
    p.coefficients[p.rows + b] = static_cast<T>(of_target);
    p.coefficients[2 * p.rows + b] = static_cast<T>(each * counts);
  }
  *p.count = count;
}

// kLanes rows of x, columns first: zeros for those that count not, which may hold NaN, and behind the last.
template <class T>
FASTKIT_INLINE void pack_rows(const Call<T>& p, int64_t lanes_at) {
  constexpr int L = kLanes<T>;
  const int64_t row = lanes_at * L;
  T* to = p.packed + row / kWide<T> * kWide<T> * p.columns + row % kWide<T>;
  for (int64_t d = 0; d < p.columns; d += L) {
    const int64_t n = p.columns - d < L ? p.columns - d : L;
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      const T* from = p.x + (row + i) * p.x_stride + d;
      square[i] = row + i >= p.rows || !p.counts(row + i) ? Vec<T>{} : n == L ? load(from) : load(from, n);
    }
    transpose<T>(square);
    if (n == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (d + i) * kWide<T>, square[i]);
    } else {
      for (int i = 0; i < n; ++i) store(to + (d + i) * kWide<T>, square[i]);
    }
  }
}

template <class T>
FASTKIT_INLINE void logits(const Call<T>& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const Left<T> weight{p.weight, p.columns, 1};
  for (int64_t row = 0; row < p.rows; row += kWide<T>) {
    in_tiles<kTile>(begin * p.classes, end * p.classes, [&]<int kRows>(int64_t r) {
      product_tile<kRows>(weight, r, p.packed + row * p.columns, kWide<T>, p.columns, [&](int i, int v, Vec<T> sum) {
        const int64_t at = row + v * L, n = p.rows - at;
        sum += broadcast(p.bias[r + i]);
        if (n >= L) {
          store(p.z + (r + i) * p.rows + at, sum);
        } else if (n > 0) {
          store(p.z + (r + i) * p.rows + at, sum, n);
        }
      });
    });
  }
}

template <class T, HeadProblem P>
void forward_of(const MultiheadForward<T>& given, ParallelRanges parallel) {
  Call<T> p{given, given.room, given.room + packed_size(given), T(0)};
  if constexpr (P == HeadProblem::single_label) {
    share_rows(p);
  } else {
    *p.count = p.classes * p.rows;
    p.scale = static_cast<T>(1 / static_cast<double>(*p.count + (*p.count == 0)));
  }
  in_ranges(parallel, up_to(p.rows, kWide<T>) / kLanes<T>, 8 * kLanes<T> * p.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_rows(p, i);
  });
  const int64_t some = p.classes < 2 * kTile ? 2 * kTile / (p.classes + (p.classes == 0)) : 1;  // heads
  const int64_t products = some * p.classes * up_to(p.rows, kWide<T>) * (p.columns + 1);
  in_ranges(parallel, (p.heads + some - 1) / some, products, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * some; begin < last * some && begin < p.heads; begin += some) {
      const int64_t end = begin + some < p.heads ? begin + some : p.heads;
      logits(p, begin, end);
      KernelScope scope;
      for (int64_t head = begin; head < end; ++head) of_head<T, P>(p, head);
    }
  });
}

template <class T>
void forward(const MultiheadForward<T>& p, ParallelRanges parallel) {
  if (p.problem == HeadProblem::single_label) return forward_of<T, HeadProblem::single_label>(p, parallel);
  if (p.problem == HeadProblem::multi_label) return forward_of<T, HeadProblem::multi_label>(p, parallel);
  forward_of<T, HeadProblem::regression>(p, parallel);
}

// --- backward --------------------------------------------------------------------------------------------------------

// kWide columns of both gradients, from `first` on.
template <class T>
void gradient_columns(const MultiheadBackward<T>& p, int64_t first) {
  constexpr int L = kLanes<T>;
  const int64_t n = p.columns - first, logits = p.heads * p.classes;
  const auto counts = [&](int64_t row) { return p.target == nullptr || p.target[row] != p.ignore_index; };
  const auto get = [&](const T* row, int v) {
    return n >= (v + 1) * L ? load(row + v * L) : n > v * L ? load(row + v * L, n - v * L) : Vec<T>{};
  };
  alignas(kLineBytes) T right[kDepth * kWide<T>];
  // to[i] = or += the left side times what is packed, times factor(i), of rows of the gradient `to`.
  const auto multiply = [&](const Left<T>& left, int64_t count, int64_t depth, T* to, bool adds, auto&& factor) {
    in_tiles<kTile>(0, count, [&]<int kRows>(int64_t r) {
      product_tile<kRows>(left, r, right, kWide<T>, depth, [&](int i, int v, Vec<T> sum) {
        T* at = to + (r + i) * p.columns + first + v * L;
        if (n <= v * L) return;
        sum *= broadcast(factor(r + i));
        if (n >= (v + 1) * L) {
          store(at, adds ? load(at) + sum : sum);
        } else {
          store(at, adds ? load(at, n - v * L) + sum : sum, n - v * L);
        }
      });
    });
  };
  for (int64_t from = 0; p.g_x != nullptr && from < logits; from += kDepth) {
    const int64_t depth = logits - from < kDepth ? logits - from : kDepth;
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<T> factor = broadcast(p.g_loss[(from + k) / p.classes]);
      for (int v = 0; v < kVectors; ++v) {
        store(right + k * kWide<T> + v * L, factor * get(p.weight + (from + k) * p.columns + first, v));
      }
    }
    multiply({p.dz + from * p.rows, 1, p.rows}, p.rows, depth, p.g_x, from > 0, [](int64_t) { return T(1); });
  }
  for (int64_t row = 0; p.g_x != nullptr && row < p.rows; ++row) {  // whose dz are 0, but for weights that are not finite
    for (int64_t d = first; d < first + kWide<T> && d < p.columns && (logits == 0 || !counts(row)); ++d) {
      p.g_x[row * p.columns + d] = 0;
    }
  }
  for (int64_t from = 0; p.g_weight != nullptr && (from < p.rows || from == 0); from += kDepth) {
    const int64_t depth = p.rows - from < kDepth ? p.rows - from : kDepth;
    for (int64_t k = 0; k < depth; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> x = counts(from + k) ? get(p.x + (from + k) * p.x_stride + first, v) : Vec<T>{};
        store(right + k * kWide<T> + v * L, x);
      }
    }
    multiply({p.dz + from, p.rows, 1}, logits, depth, p.g_weight, from > 0,
             [&](int64_t i) { return p.g_loss[i / p.classes]; });
  }
}

template <class T>
void backward(const MultiheadBackward<T>& p, ParallelRanges parallel) {
  const int64_t logits = p.heads * p.classes, chunks = (p.columns + kWide<T> - 1) / kWide<T>;
  in_ranges(parallel, chunks, 2 * logits * p.rows * kWide<T>, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gradient_columns(p, i * kWide<T>);
  });
  if (p.g_bias == nullptr) return;
  in_ranges(parallel, logits, p.rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* dz = p.dz + i * p.rows;
      Vec<T> sum{};
      int64_t b = 0;
      for (; b + kLanes<T> <= p.rows; b += kLanes<T>) sum += load(dz + b);
      if (b < p.rows) sum += load(dz + b, p.rows - b);
      p.g_bias[i] = sum_of<T>(sum) * p.g_loss[i / p.classes];
    }
  });
}

template <class T>
constexpr MultiheadFunctions<T> functions = {room<T>, forward<T>, backward<T>};

}  // namespace

const MultiheadLossKernels multihead_loss_kernels = {functions<float>, functions<double>};

}  // namespace fastkit::FASTKIT_ISA
