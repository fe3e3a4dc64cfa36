// Kernel interface of mtadam: one step of Adam for several losses, on tensors of any number.
//
//   n[l] = b3 n[l] + (1 - b3) |g[l]|           of each tensor and term; |g[l]| itself where n[l] was not alive
//   s[l] = rank[l] n[a] / n[l]                 a: the anchor, or where that is not alive the first term that is
//   h[l] = s[l] g[l] (+ weight_decay p)        s = 1 for a term that is not alive
//   m = b1 m + (1 - b1) sum h[l],  v[l] = b2 v[l] + (1 - b2) h[l]^2
//   p = p - lr / (1 - b1^t) m / (sqrt(max v[l] / (1 - b2^t)) + eps)
//
// A step may come in pieces: each folds the gradients of some terms, in order, and the last one also applies, which is
// the last line. E is the element type of parameters and gradients, T = Arithmetic<E> that of all else. Tensors are
// walked as flat arrays: all of one parameter have its strides.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

namespace fastkit {

inline constexpr int32_t kMTAdamTerms = 1024;  // of a call, at most: CUDA kernels take their pointers as parameters

enum class NonFinite : int32_t { skip, skip_term, propagate };

// What all tensors of a call have in common.
struct MTAdamRule {
  int32_t terms = 0;              // L
  int32_t first = 0, folded = 0;  // the gradients are of terms [first, first + folded)
  int32_t anchor = 0;
  bool applies = true;
  bool decoupled = false;
  NonFinite nonfinite = NonFinite::skip;
  double lr = 0, beta1 = 0, beta2 = 0, beta3 = 0, eps = 0, weight_decay = 0;
  double alive = 0;      // a norm above this is alive
  double max_scale = 0;  // of n[a] / n[l]

  FASTKIT_ALWAYS_INLINE double coupled() const { return decoupled ? 0.0 : weight_decay; }
};

// Whether a gradient enters: one that is left out, whose factor is 0, may hold NaN.
template <class E, class T>
FASTKIT_ALWAYS_INLINE bool mtadam_takes(const MTAdamRule& rule, const E* grad, T factor) {
  return grad != nullptr && (factor != 0 || rule.nonfinite == NonFinite::propagate);
}

// One parameter and what belongs to it.
template <class E>
struct MTAdamTensor {
  using T = Arithmetic<E>;
  int64_t numel = 0;
  E* param = nullptr;
  T* exp_avg = nullptr;
  T* max_exp_avg_sq = nullptr;      // null: without amsgrad
  const E* const* grads = nullptr;  // (folded), null where the term does not reach it
  T* const* exp_avg_sqs = nullptr;  // (terms)
};

// A call on tensors of one element type. `tensors`, and the lists of pointers in it, are on the host.
template <class E>
struct MTAdam {
  using T = Arithmetic<E>;
  MTAdamRule rule;
  const MTAdamTensor<E>* tensors = nullptr;
  int64_t count = 0;
  T* grad_norms = nullptr;              // dense (count, terms)
  T* steps = nullptr;                   // dense (count)
  const double* square_sums = nullptr;  // dense (count, folded), of the gradients as they are; null: to be summed
  const float* grad_scales = nullptr;   // (terms), what the gradients were multiplied with; null: nothing
  const double* ranks = nullptr;        // (terms), on the host, the weights of the terms; null: all 1
  const double* lr = nullptr;           // instead of the rule's; null: that
  const float* found_inf = nullptr;     // where it is not 0, nothing is written; null: 0
};

// What the elements of a tensor are updated with, besides the factors s[l] of its gradients.
template <class T>
struct MTAdamStep {
  T step_size;   // lr / (1 - b1^t)
  T correction;  // 1 / sqrt(1 - b2^t)
  T kept;        // of the parameter: 1, or 1 - lr weight_decay
};

// --- on the CPU ----------------------------------------------------------------------------------------------------

inline constexpr int64_t kMTAdamBlock = 16384;  // elements that a thread takes at a time

template <class E>
struct MTAdamFunctions {
  using T = Arithmetic<E>;
  // The square sums of blocks [begin, end) of n elements.
  void (*square_sums)(const E* grad, int64_t n, int64_t begin, int64_t end, double* sums);
  // Elements [begin, end).
  void (*update)(const MTAdamRule&, const MTAdamTensor<E>&, const T* factors, const MTAdamStep<T>&, int64_t begin,
                 int64_t end);
};

using MTAdamKernels = OfEachElement<MTAdamFunctions>;
FASTKIT_TABLE(MTAdamKernels, mtadam_kernels)

}  // namespace fastkit
