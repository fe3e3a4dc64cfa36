// The exponential and the hyperbolic tangent of vectors, by 2^n and Taylor's polynomial of the remainder.
//
// To some units in the last place, float and double; NaN of NaN.
#pragma once

#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
inline namespace FASTKIT_WIDTH {

template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr int kBias = 127, kShift = 23, kDegree = 7;
  static constexpr float kMost = 87, kRounding = 0x1.8p23f;
  static constexpr float kLn2 = 0x1.62e400p-1f, kLn2Rest = 0x1.7f7d1cp-20f;  // the first is short: n of it is exact
};
template <>
struct Exponent<double> {
  static constexpr int kBias = 1023, kShift = 52, kDegree = 13;
  static constexpr double kMost = 708, kRounding = 0x1.8p52;
  static constexpr double kLn2 = 0x1.62e42fee00000p-1, kLn2Rest = 0x1.a39ef35793c76p-33;
};

template <class T>
struct ExponentialParts {
  Vec<T> power, minus_one;  // e^x = power (1 + minus_one), power = 2^n
};

// Of |x| <= kMost.
template <class T>
FASTKIT_INLINE ExponentialParts<T> exponential_parts(Vec<T> x) {
  using C = Exponent<T>;
  using N = typename VectorOf<T>::index;
  const Vec<T> rounding = broadcast<T>(C::kRounding);  // added and taken off again, it rounds to an integer
  const Vec<T> shifted = fma<T>(x, broadcast<T>(T(0x1.71547652b82fep+0)), rounding), n = shifted - rounding;
  Vec<T> r = fnma<T>(n, broadcast<T>(C::kLn2), x);
  r = fnma<T>(n, broadcast<T>(C::kLn2Rest), r);
  T factorial = 1;
#pragma GCC unroll 16
  for (int k = 2; k <= C::kDegree; ++k) factorial *= T(k);
  Vec<T> p = broadcast<T>(T(1) / factorial);
#pragma GCC unroll 16
  for (int k = C::kDegree; k > 1; --k) {
    factorial /= T(k);
    p = fma<T>(p, r, broadcast<T>(T(1) / factorial));
  }
  return {(Vec<T>)(((N)shifted - (N)rounding + C::kBias) << C::kShift), p * r};
}

template <class T>
FASTKIT_INLINE Vec<T> within(Vec<T> x, T most) {
  const Vec<T> above = broadcast<T>(most), below = broadcast<T>(-most);
  x = x > above ? above : x;
  return x < below ? below : x;
}

// e^x for |x| <= 87 (708), beyond that of 87.
template <class T>
FASTKIT_INLINE Vec<T> exponential(Vec<T> x) {
  const ExponentialParts<T> parts = exponential_parts<T>(within<T>(x, Exponent<T>::kMost));
  return fma<T>(parts.power, parts.minus_one, parts.power);
}

// e^x, and 0 for x < -87 (-708), e^-inf among them.
template <class T>
FASTKIT_INLINE Vec<T> exponential_or_zero(Vec<T> x) {
  return x < broadcast<T>(-Exponent<T>::kMost) ? Vec<T>{} : exponential<T>(x);
}

// tanh x = u / (u + 2) with u = e^2x - 1, which small x do not cancel.
template <class T>
FASTKIT_INLINE Vec<T> hyperbolic_tangent(Vec<T> x) {
  const ExponentialParts<T> parts = exponential_parts<T>(within<T>(x + x, T(sizeof(T) == 4 ? 20 : 40)));
  const Vec<T> u = fma<T>(parts.power, parts.minus_one, parts.power - broadcast<T>(1));
  return u / (u + broadcast<T>(2));
}

}  // namespace FASTKIT_WIDTH
}  // namespace fastkit::FASTKIT_ISA
