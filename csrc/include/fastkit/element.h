// The element types of tensors, and the type that arithmetic on them runs in.
#pragma once

#include <cstdint>

namespace fastkit {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class E>
struct ArithmeticOf {
  using type = E;
};
template <>
struct ArithmeticOf<BFloat16> {
  using type = float;
};
template <>
struct ArithmeticOf<Half> {
  using type = float;
};

template <class E>
using Arithmetic = typename ArithmeticOf<E>::type;

template <class A, class B>
inline constexpr bool IsSame = false;
template <class A>
inline constexpr bool IsSame<A, A> = true;

// One function, or table of functions, for each element type.
template <template <class> class Of>
struct OfEachElement {
  Of<float> f32;
  Of<double> f64;
  Of<BFloat16> bf16;
  Of<Half> f16;

  template <class E>
  inline __attribute__((always_inline)) const Of<E>& of() const {
    if constexpr (IsSame<E, float>) {
      return f32;
    } else if constexpr (IsSame<E, double>) {
      return f64;
    } else if constexpr (IsSame<E, BFloat16>) {
      return bf16;
    } else {
      return f16;
    }
  }
};

}  // namespace fastkit
