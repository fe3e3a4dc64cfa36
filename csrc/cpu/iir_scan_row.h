// A row of a call, for kernels whose units are rows.
#pragma once

#include "cpu/simd.h"
#include "fastkit/iir_scan.h"

namespace fastkit::FASTKIT_ISA {

template <class E>
struct Row {
  using T = Arithmetic<E>;
  const IirScan<E>* p = nullptr;
  int64_t batch = 0, channel = 0;
  Span span{};

  Row() = default;
  Row(const IirScan<E>& p, int64_t batch, int64_t channel)
      : p(&p), batch(batch), channel(channel), span(p.span(batch)) {}

  // Where the row begins: its first sample, its first chunk's coefficients, and, of a dense (B, C, K, taps) array, the
  // gradients of those. Null where there is no such array.
  template <class U>
  U* point(const Signal<U>& signal) const {
    return signal.data == nullptr ? nullptr : signal.at(batch, channel) + span.begin;
  }
  const T* point(const Coefficients<T>& c) const {
    return c.data == nullptr ? nullptr : c.at(batch, channel) + span.first_chunk * c.chunk;
  }
  T* point(T* gradients, int taps) const {
    return gradients == nullptr ? nullptr
                                : gradients + (p->row(batch, channel) * p->chunks + span.first_chunk) * taps;
  }

  // Of dense (batch, C, 2) states: zero where there are none.
  Two<T> state(const T* states) const {
    if (states == nullptr) return {};
    const T* at = states + (batch * p->channels + channel) * 2;
    return {at[0], at[1]};
  }
  template <class U>
  void put_state(T* states, U newest, U older) const {
    if (states == nullptr) return;
    T* at = states + (batch * p->channels + channel) * 2;
    at[0] = static_cast<T>(newest), at[1] = static_cast<T>(older);
  }
};

}  // namespace fastkit::FASTKIT_ISA
