// Single elements to the type of arithmetic and back, in integer arithmetic that every compiler has. CPU kernels
// convert whole vectors (cpu/simd.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/warp.h"
#include "fastkit/element.h"

namespace fastkit {

FASTKIT_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
FASTKIT_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class E>
FASTKIT_DEVICE Arithmetic<E> widen_element(E value) {
  if constexpr (IsSame<E, BFloat16>) {
    return float_of(static_cast<uint32_t>(value.bits) << 16);
  } else if constexpr (IsSame<E, Half>) {
    const uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
    if (magnitude < 0x400) return float_of(bits_of(static_cast<float>(magnitude) * 0x1p-24f) | sign);
    return float_of(sign | ((magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23)));
  } else {
    return value;
  }
}

// To the nearest, ties to even.
template <class E>
FASTKIT_DEVICE E round_element(Arithmetic<E> value) {
  if constexpr (IsSame<E, BFloat16>) {
    const uint32_t w = bits_of(value);
    if ((w & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((w >> 16) | 0x40)};
    return {static_cast<uint16_t>((w + 0x7fff + ((w >> 16) & 1)) >> 16)};
  } else if constexpr (IsSame<E, Half>) {
    const uint32_t w = bits_of(value), magnitude = w & 0x7fffffffu, sign = (w >> 16) & 0x8000u;
    if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00 | (magnitude > 0x7f800000u ? 0x200 : 0))};
    if (magnitude < 113u << 23) {  // subnormal: added to 0.5, whose last bit is the smallest half's
      return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - (126u << 23)))};
    }
    return {static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
  } else {
    return value;
  }
}

}  // namespace fastkit
