// The numbers of one tensor in a step of mtadam, which the host and GPUs compute alike: from the norms of its gradients
// their factors, and from the count of its steps what corrects the moments. Apart from fastkit/mtadam.h, which every
// ISA compiles and which must bring in nothing of std.
#pragma once

#include <cmath>

#include "fastkit/mtadam.h"

namespace fastkit {

// New norms of one tensor's gradients and their factors, 0 for a gradient that is left out. square_sums (folded);
// grad_scales, ranks (terms) or null: what gradients were multiplied with, and the weights of the terms; norms (terms);
// factors (folded). False: the tensor is to be left as it is, and nothing is written.
template <class T>
FASTKIT_ALWAYS_INLINE bool mtadam_balance(const MTAdamRule& rule, const double* square_sums, const float* grad_scales,
                                          const double* ranks, T* norms, T* factors) {
  const auto finite = [](double x) { return x - x == 0; };
  const int32_t end = rule.first + rule.folded;
  const auto raw = [&](int32_t l) {
    const double norm = sqrt(square_sums[l - rule.first]);
    return grad_scales == nullptr ? norm : norm / grad_scales[l];
  };
  if (rule.nonfinite == NonFinite::skip) {
    for (int32_t l = rule.first; l < end; ++l) {
      if (!finite(raw(l))) return false;
    }
  }
  for (int32_t l = rule.first; l < end; ++l) {
    const bool left_out = rule.nonfinite == NonFinite::skip_term && !finite(raw(l));
    const double now = left_out ? 0.0 : raw(l), before = norms[l];
    norms[l] = static_cast<T>(before > rule.alive ? rule.beta3 * before + (1 - rule.beta3) * now : now);
    factors[l - rule.first] = left_out ? T{0} : T{1};
  }
  int32_t anchor = rule.anchor;
  if (anchor >= end || !(norms[anchor] > rule.alive)) {
    for (anchor = 0; anchor < end && !(norms[anchor] > rule.alive);) ++anchor;
  }
  for (int32_t l = rule.first; l < end; ++l) {
    T& factor = factors[l - rule.first];
    if (factor == 0) continue;
    double s = 1;
    if (norms[l] > rule.alive) {
      const double ratio = static_cast<double>(norms[anchor]) / norms[l];
      s = (ranks == nullptr ? 1.0 : ranks[l]) * (ratio > rule.max_scale ? rule.max_scale : ratio);
    }
    factor = static_cast<T>(grad_scales == nullptr ? s : s / grad_scales[l]);
  }
  return true;
}

// Of the step that `step` counts, the first being 1.
template <class T>
FASTKIT_ALWAYS_INLINE MTAdamStep<T> mtadam_step(const MTAdamRule& rule, double lr, double step) {
  return {static_cast<T>(lr / (1 - pow(rule.beta1, step))), static_cast<T>(1 / sqrt(1 - pow(rule.beta2, step))),
          static_cast<T>(rule.decoupled ? 1 - lr * rule.weight_decay : 1.0)};
}

}  // namespace fastkit
