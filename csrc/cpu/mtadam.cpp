// mtadam on the CPU: square sums of gradients, and the step of elements.
//
// What       of a tensor first the norms of its gradients, then with their factors the moments and the parameter.
// Parallel   by tensors: a thread does both for one while that one's gradients are in its caches. Large ones are shared
//            by all threads, block by block (bindings/mtadam.cpp).
// Streams    L gradients, L second moments, the first moment and the parameter are walked side by side, two vectors of
//            each at a time: that hides more of the memory's latency than one term after the other, block by block. So
//            do four places of a gradient for its square sum.
// Bytes      fp32, per element: g 4 L, again 4 L where a gradient has left the caches, v 8 L, m 8, p 8.
// Numerics   squares are summed in T through 130 roundings at most, and those sums in double, by blocks in order: the
//            number of threads changes nothing. The step is done in T; a parameter in half precision is rounded once.
#include "fastkit/mtadam.h"

#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

// --- square sums -----------------------------------------------------------------------------------------------------

constexpr int kSums = 4;  // vectors

template <class E>
FASTKIT_INLINE double sum_of(Vec<E> v) {
  double total = 0;
  for (int i = 0; i < kLanes<E>; ++i) total += v[i];
  return total;
}

// Of a quarter of the elements in each of four sums: streams from four places, which take more of the memory's latency
// together than one after the other.
template <class E>
FASTKIT_INLINE double square_sum(const E* x, int64_t n) {
  using T = Arithmetic<E>;
  constexpr int64_t kRun = 128 * kLanes<E>;  // 128 roundings of a sum in T
  const int64_t quarter = n / (kSums * kLanes<E>) * kLanes<E>;
  double total = 0;
  for (int64_t begin = 0; begin < quarter; begin += kRun) {
    const int64_t end = quarter - begin < kRun ? quarter : begin + kRun;
    Vec<E> sums[kSums] = {};
    for (int64_t k = begin; k < end; k += kLanes<E>) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const Vec<E> v = load(x + i * quarter + k);
        sums[i] = fma<T>(v, v, sums[i]);
      }
    }
    total += sum_of<E>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  Vec<E> rest{};
  for (int64_t k = kSums * quarter; k < n; k += kLanes<E>) {
    const Vec<E> v = n - k >= kLanes<E> ? load(x + k) : load(x + k, n - k);
    rest = fma<T>(v, v, rest);
  }
  return total + sum_of<E>(rest);
}

template <class E>
void square_sums(const E* grad, int64_t n, int64_t begin, int64_t end, double* sums) {
  KernelScope scope;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kMTAdamBlock, left = n - first;
    sums[block] = square_sum(grad + first, left < kMTAdamBlock ? left : kMTAdamBlock);
  }
}

// --- the step --------------------------------------------------------------------------------------------------------

// The constants of a tensor's elements, one number in all lanes.
template <class E>
struct Constants {
  using T = Arithmetic<E>;
  Vec<E> kept1, new1, kept2, new2, decay, kept, step_size, correction, eps;

  FASTKIT_ALWAYS_INLINE Constants(const MTAdamRule& rule, const MTAdamStep<T>& step)
      : kept1(all(rule.first == 0 ? rule.beta1 : 1.0)),
        new1(all(1 - rule.beta1)),
        kept2(all(rule.beta2)),
        new2(all(1 - rule.beta2)),
        decay(all(rule.coupled())),
        kept(all(step.kept)),
        step_size(all(step.step_size)),
        correction(all(step.correction)),
        eps(all(rule.eps)) {}

  static FASTKIT_ALWAYS_INLINE Vec<E> all(double x) { return Vec<E>{} + static_cast<T>(x); }
};

// As torch.maximum has it: NaN if either is.
template <class E>
FASTKIT_INLINE Vec<E> larger(Vec<E> a, Vec<E> b) {
  return (a > b) | (a != a) ? a : b;
}

template <class E>
FASTKIT_INLINE Vec<E> moved(const Constants<E>& c, Vec<E> p, Vec<E> m, Vec<E> most) {
  using T = Arithmetic<E>;
  return fnma<T>(c.step_size, m / fma<T>(square_root<T>(most), c.correction, c.eps), c.kept * p);
}

constexpr int64_t kAhead = 64;  // elements between a read and its prefetch

// A step of kTerms terms that is whole and without amsgrad: nothing but elements is loaded in its loop, and all loads of
// two vectors come before their stores. Arrays of like sizes often lie at the same place of their pages, where a load
// waits for an earlier store to another one.
template <class E, int kTerms>
struct Plain {
  using T = Arithmetic<E>;
  E* param;
  T* exp_avg;
  const E* grads[kTerms];
  T* exp_avg_sqs[kTerms];
  bool takes[kTerms];
  Vec<E> factors[kTerms];
  Constants<E> c;

  FASTKIT_ALWAYS_INLINE Plain(const MTAdamRule& rule, const MTAdamTensor<E>& t, const T* of_grads,
                              const MTAdamStep<T>& step)
      : param(t.param), exp_avg(t.exp_avg), c(rule, step) {
    for (int l = 0; l < kTerms; ++l) {
      grads[l] = t.grads[l], exp_avg_sqs[l] = t.exp_avg_sqs[l];
      takes[l] = mtadam_takes(rule, t.grads[l], of_grads[l]);
      factors[l] = Vec<E>{} + of_grads[l];
    }
  }

  // What comes kAhead elements later: prefetchers of the hardware begin anew at each page.
  FASTKIT_ALWAYS_INLINE void fetch(int64_t k) const {
    prefetch_near(param + k), prefetch_near(exp_avg + k);
    for (int l = 0; l < kTerms; ++l) prefetch_near(grads[l] + k), prefetch_near(exp_avg_sqs[l] + k);
  }

  template <int kVectors, class Get, class Put>
  FASTKIT_ALWAYS_INLINE void update(int64_t k, Get&& get, Put&& put) const {
    Vec<E> p[kVectors], m[kVectors], v[kTerms][kVectors], total[kVectors], most[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = k + i * kLanes<E>;
      p[i] = get(static_cast<const E*>(param + at)), m[i] = get(static_cast<const T*>(exp_avg + at));
#pragma GCC unroll 4
      for (int l = 0; l < kTerms; ++l) v[l][i] = get(static_cast<const T*>(exp_avg_sqs[l] + at));
      total[i] = most[i] = Vec<E>{};
    }
#pragma GCC unroll 4
    for (int l = 0; l < kTerms; ++l) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        Vec<E> h = c.decay * p[i];
        if (takes[l]) h = fma<T>(factors[l], get(grads[l] + k + i * kLanes<E>), h);
        total[i] += h;
        v[l][i] = fma<T>(c.new2 * h, h, c.kept2 * v[l][i]);
        most[i] = larger<E>(most[i], v[l][i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = k + i * kLanes<E>;
      m[i] = fma<T>(c.new1, total[i], c.kept1 * m[i]);
      put(param + at, moved<E>(c, p[i], m[i], most[i]));
      put(exp_avg + at, m[i]);
#pragma GCC unroll 4
      for (int l = 0; l < kTerms; ++l) put(exp_avg_sqs[l] + at, v[l][i]);
    }
  }
};

template <class E, int kTerms>
void update_plain(const MTAdamRule& rule, const MTAdamTensor<E>& t, const Arithmetic<E>* factors,
                  const MTAdamStep<Arithmetic<E>>& step, int64_t begin, int64_t end) {
  const Plain<E, kTerms> plain(rule, t, factors, step);
  const auto get = [](auto* p) { return load(p); };
  const auto put = [](auto* p, Vec<E> v) { store(p, v); };
  int64_t k = begin;
  for (; k + 2 * kLanes<E> <= end; k += 2 * kLanes<E>) {
    plain.fetch(k + kAhead);
    plain.template update<2>(k, get, put);
  }
  for (; k < end; k += kLanes<E>) {
    const int64_t left = end - k;
    if (left >= kLanes<E>) {
      plain.template update<1>(k, get, put);
    } else {
      plain.template update<1>(k, [&](auto* p) { return load(p, left); },
                               [&](auto* p, Vec<E> v) { store(p, v, left); });
    }
  }
}

// Any step, or piece of one.
template <class E, class Get, class Put>
FASTKIT_INLINE void update_vector(const MTAdamRule& rule, const MTAdamTensor<E>& t, const Arithmetic<E>* factors,
                                  const Constants<E>& c, int64_t k, Get&& get, Put&& put) {
  using T = Arithmetic<E>;
  const Vec<E> p = get(static_cast<const E*>(t.param + k));
  const Vec<E> decay = c.decay * p;
  Vec<E> total{}, most{};
  for (int32_t f = 0; f < rule.folded; ++f) {
    Vec<E> h = decay;
    if (mtadam_takes(rule, t.grads[f], factors[f])) h = fma<T>(Vec<E>{} + factors[f], get(t.grads[f] + k), h);
    total += h;
    T* const exp_avg_sq = t.exp_avg_sqs[rule.first + f] + k;
    const Vec<E> v = fma<T>(c.new2 * h, h, c.kept2 * get(static_cast<const T*>(exp_avg_sq)));
    put(exp_avg_sq, v);
    most = larger<E>(most, v);
  }
  const Vec<E> m = fma<T>(c.new1, total, c.kept1 * get(static_cast<const T*>(t.exp_avg + k)));
  put(t.exp_avg + k, m);
  if (!rule.applies) return;
  for (int32_t l = 0; l < rule.terms; ++l) {
    if (l >= rule.first && l < rule.first + rule.folded) continue;
    most = larger<E>(most, get(static_cast<const T*>(t.exp_avg_sqs[l] + k)));  // of another piece
  }
  if (t.max_exp_avg_sq != nullptr) {
    most = larger<E>(get(static_cast<const T*>(t.max_exp_avg_sq + k)), most);
    put(t.max_exp_avg_sq + k, most);
  }
  put(t.param + k, moved<E>(c, p, m, most));
}

template <class E>
void update(const MTAdamRule& rule, const MTAdamTensor<E>& t, const Arithmetic<E>* factors,
            const MTAdamStep<Arithmetic<E>>& step, int64_t begin, int64_t end) {
  KernelScope scope;
  if (rule.applies && rule.folded == rule.terms && t.max_exp_avg_sq == nullptr) {
    switch (rule.terms) {
      case 1: return update_plain<E, 1>(rule, t, factors, step, begin, end);
      case 2: return update_plain<E, 2>(rule, t, factors, step, begin, end);
      case 3: return update_plain<E, 3>(rule, t, factors, step, begin, end);
      case 4: return update_plain<E, 4>(rule, t, factors, step, begin, end);
      default: break;
    }
  }
  const Constants<E> c(rule, step);
  int64_t k = begin;
  for (; k + kLanes<E> <= end; k += kLanes<E>) {
    update_vector<E>(rule, t, factors, c, k, [](auto* p) { return load(p); }, [](auto* p, Vec<E> v) { store(p, v); });
  }
  const int64_t left = end - k;
  if (left == 0) return;
  update_vector<E>(rule, t, factors, c, k, [&](auto* p) { return load(p, left); },
                   [&](auto* p, Vec<E> v) { store(p, v, left); });
}

template <class E>
constexpr MTAdamFunctions<E> kFunctions = {square_sums<E>, update<E>};

}  // namespace

const MTAdamKernels mtadam_kernels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
