// linear_cross_entropy on the CPU: the row-wise work on a block of logits.
//
// Parallel   tokens.
// Bytes      an element, of a cache: sums 4 twice (8 for float64), gradient 8 (16).
// Numerics   the arithmetic of the logits; a sum runs over the lanes of two vectors, the blocks of a token one after
//            another. e^x to some units in the last place, 0 below e^-87 (e^-708). As torch.logsumexp has it, a token
//            with NaN has NaN, one with inf has inf, one of which all are -inf has -inf.
#include <cmath>

#include "cpu/exponential.h"
#include "fastkit/linear_cross_entropy.h"

namespace fastkit::FASTKIT_ISA {
namespace {

// The n elements that a row has left, and `fill` behind. Through memory: short code, once a row.
template <class T>
FASTKIT_INLINE Vec<T> last(const T* p, int64_t n, T fill) {
  T lanes[kLanes<T>];
#pragma GCC unroll 1
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}

template <class T>
FASTKIT_INLINE T sum_of(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
FASTKIT_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) { return a > b ? a : b; }  // NaN is passed over

template <class T>
FASTKIT_INLINE T largest(const T* row, int64_t columns) {
  constexpr int lanes = kLanes<T>;
  Vec<T> most[4];
  for (Vec<T>& v : most) v = broadcast<T>(-kInfinity<T>);
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = larger<T>(load(row + c + i * lanes), most[i]);
  }
  for (; c + lanes <= columns; c += lanes) most[0] = larger<T>(load(row + c), most[0]);
  if (c < columns) most[0] = larger<T>(last(row + c, columns - c, -kInfinity<T>), most[0]);
  const Vec<T> all = larger<T>(larger<T>(most[0], most[1]), larger<T>(most[2], most[3]));
  T value = all[0];
  for (int i = 1; i < lanes; ++i) value = all[i] > value ? all[i] : value;
  return value;
}

template <bool Softcap, class T>
FASTKIT_INLINE Vec<T> capped(Vec<T> logit, T softcap) {
  if constexpr (!Softcap) return logit;
  return broadcast(softcap) * hyperbolic_tangent<T>(logit / broadcast(softcap));
}

template <bool Softcap, class T>
FASTKIT_INLINE T capped_one(T logit, T softcap) {
  if constexpr (!Softcap) return logit;
  return capped<true, T>(broadcast(logit), softcap)[0];
}

// Adds to a row's sums of e^(z - m) and, where a target is smoothed, w z.
template <class T, bool Softcap>
FASTKIT_INLINE void add_row(const CrossEntropySums<T>& p, const T* row, T m, T& exponentials, T& weighted) {
  constexpr int lanes = kLanes<T>;
  Vec<T> e[2] = {}, s{};
  const Vec<T> shift = broadcast(m), one = broadcast<T>(1);
  const bool smooths = p.smooths;
  const T* weight = smooths ? p.class_weight : nullptr;
  int64_t c = 0;
  for (; c + 2 * lanes <= p.columns; c += 2 * lanes) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t at = c + i * lanes;
      const Vec<T> z = capped<Softcap, T>(load(row + at), p.softcap);
      e[i] += exponential_or_zero<T>(z - shift);
      if (smooths) s += z * (weight != nullptr ? load(weight + at) : one);
    }
  }
#pragma GCC unroll 1
  for (; c < p.columns; c += lanes) {
    const int64_t left = p.columns - c;
    const Vec<T> z = capped<Softcap, T>(last(row + c, left, T(0)), p.softcap);
    const Vec<T> rest = exponential_or_zero<T>(z - shift);
    const Vec<T> wz = z * (weight != nullptr ? last(weight + c, left, T(0)) : one);
    for (int i = 0; i < lanes && i < left; ++i) {
      exponentials += rest[i];
      if (smooths) weighted += wz[i];
    }
  }
  exponentials += sum_of<T>(e[0] + e[1]);
  weighted += sum_of<T>(s);
}

template <class T, bool Softcap>
void sums_of(const CrossEntropySums<T>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  for (int64_t token = begin; token < end; ++token) {
    const T* row = p.logits + token * p.stride;
    T* state = p.state + 4 * token;
    const T before = state[0], here = capped_one<Softcap, T>(largest(row, p.columns), p.softcap);
    const T m = here > before ? here : before;
    const T shift = std::isinf(m) ? T(0) : m;  // -inf: no class so far; inf: it is lse, unless there is NaN
    T exponentials = state[1] * std::exp(before - shift);
    add_row<T, Softcap>(p, row, shift, exponentials, state[3]);
    state[0] = m, state[1] = exponentials;
    const int64_t place = p.target[token] - p.first;
    if (place >= 0 && place < p.columns) state[2] = capped_one<Softcap, T>(row[place], p.softcap);
  }
}

template <class T>
void sums(const CrossEntropySums<T>& p, int64_t begin, int64_t end) {
  return p.softcap > 0 ? sums_of<T, true>(p, begin, end) : sums_of<T, false>(p, begin, end);
}

template <class T, bool Softcap>
void gradient_of(const CrossEntropyGradient<T>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  constexpr int lanes = kLanes<T>;
  for (int64_t token = begin; token < end; ++token) {
    const T* row = p.logits + token * p.stride;
    T* dz = p.dz + token * p.dz_stride;
    const T a = p.coefficients[3 * token], b = p.coefficients[3 * token + 1], c = p.coefficients[3 * token + 2];
    if (a == 0 && b == 0 && c == 0) {
      for (int64_t i = 0; i < p.columns; ++i) dz[i] = 0;
      continue;
    }
    const Vec<T> lse = broadcast(p.lse[token]), of_p = broadcast(a), one = broadcast<T>(1);
    const auto slope = [&](Vec<T> logit) __attribute__((always_inline)) {
      const Vec<T> t = hyperbolic_tangent<T>(logit / broadcast(p.softcap));
      return fnma<T>(t, t, one);
    };
    const auto value = [&](Vec<T> logit, Vec<T> smooth) __attribute__((always_inline)) {
      const Vec<T> z = capped<Softcap, T>(logit, p.softcap);
      const Vec<T> g = fma<T>(of_p, exponential_or_zero<T>(z - lse), -smooth);
      if constexpr (!Softcap) return g;
      return g * slope(logit);
    };
    const int64_t place = p.target[token] - p.first;
    const bool has_target = place >= 0 && place < p.columns;
    const T target = has_target ? row[place] : T(0);  // read before it is written over
    const T* weight = c == 0 ? nullptr : p.class_weight;
    const Vec<T> of_w = broadcast(c);
    int64_t i = 0;
    for (; i + lanes <= p.columns; i += lanes) {
      store(dz + i, value(load(row + i), weight == nullptr ? of_w : of_w * load(weight + i)));
    }
    const int64_t left = p.columns - i;
    if (left > 0) {
      const Vec<T> w = weight == nullptr ? one : last(weight + i, left, T(0));
      const Vec<T> rest = value(last(row + i, left, T(0)), of_w * w);
      for (int lane = 0; lane < left; ++lane) dz[i + lane] = rest[lane];
    }
    if (has_target) {
      const T smooth = weight == nullptr ? c : c * weight[place];
      const Vec<T> logit = broadcast(target), z = capped<Softcap, T>(logit, p.softcap);
      Vec<T> g = fma<T>(of_p, exponential_or_zero<T>(z - lse), broadcast(-smooth)) - broadcast(b);
      if constexpr (Softcap) g *= slope(logit);
      dz[place] = g[0];
    }
  }
}

template <class T>
void gradient(const CrossEntropyGradient<T>& p, int64_t begin, int64_t end) {
  return p.softcap > 0 ? gradient_of<T, true>(p, begin, end) : gradient_of<T, false>(p, begin, end);
}

}  // namespace

const LinearCrossEntropyKernels linear_cross_entropy_kernels = {
    {sums<float>, gradient<float>}, {sums<double>, gradient<double>}};

}  // namespace fastkit::FASTKIT_ISA
