// A block of channels that have stride 1: where it lies, and its samples a vector of channels at a time.
#pragma once

#include "cpu/simd.h"
#include "fastkit/iir_scan.h"

namespace fastkit::FASTKIT_ISA {

enum Tap { kA1, kA2, kB0, kB1, kB2, kTaps };

template <class E>
struct Block {
  const IirScan<E>& p;
  int64_t batch, channel;
  int count;  // channels
  Span span;

  // Unit `unit` of those that have `most` channels.
  Block(const IirScan<E>& p, int64_t unit, int64_t most) : p(p) {
    const int64_t blocks = in_row(p, most);
    batch = unit / blocks;
    channel = unit % blocks * most;
    count = static_cast<int>(p.channels - channel < most ? p.channels - channel : most);
    span = p.span(batch);
  }
  static int64_t units(const IirScan<E>& p, int64_t most) { return p.batch * in_row(p, most); }
  static int64_t in_row(const IirScan<E>& p, int64_t most) { return (p.channels + most - 1) / most; }

  // The first sample of the first channel; an empty signal may have no memory.
  template <class U>
  U* first(const Signal<U>& signal) const {
    return signal.data == nullptr ? nullptr : signal.at(batch, channel) + span.begin * signal.time;
  }
  bool streams(const Signal<E>& out) const {
    return p.stream && on_line(first(out)) && out.time % kLine<E> == 0;
  }
};

// Reads and writes of a vector of channels: whole, or the block's last few.
template <class E, bool kWhole>
struct Access {
  int64_t count;
  bool streams;

  Vec<E> get(const E* p) const {
    if constexpr (kWhole) {
      return load(p);
    } else {
      return load(p, count);
    }
  }
  void put(E* p, Vec<E> v) const {
    if constexpr (!kWhole) {
      store(p, v, count);
    } else if (streams) {
      stream(p, v);
    } else {
      store(p, v);
    }
  }
};

// body(first channel, Access).
template <class E, class Body>
FASTKIT_INLINE void each_vector(const Block<E>& block, bool streams, Body&& body) {
  int c = 0;
  for (; c + kLanes<E> <= block.count; c += kLanes<E>) body(c, Access<E, true>{kLanes<E>, streams});
  if (c < block.count) body(c, Access<E, false>{block.count - c, false});
}

}  // namespace fastkit::FASTKIT_ISA
