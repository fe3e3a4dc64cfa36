// multihead_loss on the CPU: the work on the logits of each head.
//
// Parallel   heads; the rows of the batch across lanes.
// Bytes      an element, of a cache: single label 4 read twice, or with a gradient 12 read and 8 written (twice that for
//            float64).
// Numerics   the arithmetic of the logits. A loss is summed over the lanes of a vector first, then over those. e^x to
//            some units in the last place, 0 below e^-87 (e^-708). A row with NaN has NaN, and is not right.
#include <cmath>

#include "cpu/exponential.h"
#include "fastkit/multihead_loss.h"

namespace fastkit::FASTKIT_ISA {
namespace {

template <class T>
using Index = typename VectorOf<T>::index;

template <class T>
FASTKIT_INLINE T sum_of(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

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
FASTKIT_INLINE void single_label_lanes(const MultiheadRows<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes,
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
    counted[i] = t != kIgnoredTarget;
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
FASTKIT_INLINE void multi_label_lanes(const MultiheadRows<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes,
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
FASTKIT_INLINE void regression_lanes(const MultiheadRows<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes,
                                     Found<T>& found) {
  for (int64_t c = 0; c < p.classes; ++c) {
    T* at = z + c * p.rows + b;
    const Vec<T> far = lanes.read(at) - lanes.read(p.wanted + c * p.rows + b);
    found.loss += far * far;  // 0 where there is no row
    if (p.gradient) lanes.write(at, broadcast(2 * p.scale) * far);
  }
}

enum class Problem { single_label, multi_label, regression };

template <class T, Problem P, bool Whole>
FASTKIT_INLINE void of_lanes(const MultiheadRows<T>& p, T* z, int64_t b, Lanes<T, Whole> lanes, Found<T>& found) {
  if constexpr (P == Problem::single_label) single_label_lanes<T, Whole>(p, z, b, lanes, found);
  if constexpr (P == Problem::multi_label) multi_label_lanes<T, Whole>(p, z, b, lanes, found);
  if constexpr (P == Problem::regression) regression_lanes<T, Whole>(p, z, b, lanes, found);
}

template <class T, Problem P>
void heads(const MultiheadRows<T>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  constexpr int lanes = kLanes<T>;
  for (int64_t head = begin; head < end; ++head) {
    T* z = p.z + head * p.classes * p.rows;
    Found<T> found;
    int64_t b = 0;
    for (; b + lanes <= p.rows; b += lanes) of_lanes<T, P, true>(p, z, b, {lanes}, found);
    if (b < p.rows) of_lanes<T, P, false>(p, z, b, {p.rows - b}, found);
    p.loss[head] = sum_of<T>(found.loss) * (P == Problem::single_label ? T(1) : p.scale);
    p.correct[head] = found.correct;
  }
}

template <class T>
constexpr MultiheadFunctions<T> functions = {heads<T, Problem::single_label>, heads<T, Problem::multi_label>,
                                             heads<T, Problem::regression>};

}  // namespace

const MultiheadLossKernels multihead_loss_kernels = {functions<float>, functions<double>};

}  // namespace fastkit::FASTKIT_ISA
