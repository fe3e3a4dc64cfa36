// iir_scan where channels have stride 1: the transposed view of (B, T, C) activations.
//
// What       forward and backward of a second-order recursion, coefficients per (channel, chunk).
// Parallel   a unit is a block of channels of one batch entry or packed sequence; kLanes channels are a vector.
//            Rows of the block are walked kSteps at a time: for each vector of channels, its state and coefficients
//            go through registers once for kSteps samples. Nothing is transposed.
// Bytes      per fp32 sample: forward reads x, writes y (8); backward reads gy, x, y, writes gx (16, without b
//            12); half of that in half precision. Results larger than the caches are streamed; inputs are
//            prefetched kAhead samples ahead.
// Numerics   y = (u - a2 y2) - a1 y1, in explicit FMAs: a channel's bits do not depend on its place in a vector.
//            Coefficient gradients: sums over at most kSegment samples in the precision of arithmetic, double beyond.
// Backward   transposed form, from the end: l = gy + s1, s1 = s2 - a1 l, s2 = -a2 l, and likewise
//            gx = b0 l + r1, r1 = r2 + b1 l, r2 = b2 l: a sample uses its own chunk's coefficients alone. The
//            registers start as the gradient of the final state and end as that of the initial one.
#include "cpu/iir_scan_block.h"
#include "cpu/iir_scan_kernels.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kSteps = 4;      // samples a vector of channels takes at a time
constexpr int kAhead = 16;     // samples between a read and its prefetch (into L2: L1 is full of state)
constexpr int kSegment = 128;  // samples summed in the precision of arithmetic

// One value a channel and quantity, a vector of channels at a time.
template <class T, int kQuantities>
struct Rows {
  alignas(kLineBytes) T data[kQuantities][kIirScanBlock<T>] = {};

  Vec<T> get(int quantity, int channel) const { return load(data[quantity] + channel); }
  void set(int quantity, int channel, Vec<T> v) { store(data[quantity] + channel, v); }
  void clear() {
    for (auto& row : data) {
      for (T& value : row) value = 0;
    }
  }
};

// Of chunk k of the unit.
template <class E>
void load_taps(Rows<Arithmetic<E>, kTaps>& taps, const Block<E>& unit, int64_t k) {
  using T = Arithmetic<E>;
  const IirScan<E>& p = unit.p;
  const int64_t chunk = unit.span.first_chunk + k;
  const T* a = p.a.at(unit.batch, unit.channel) + chunk * p.a.chunk;
  for (int c = 0; c < unit.count; ++c, a += p.a.channel) {
    taps.data[kA1][c] = a[0], taps.data[kA2][c] = a[p.a.tap];
  }
  if (p.b.data == nullptr) return;
  const T* b = p.b.at(unit.batch, unit.channel) + chunk * p.b.chunk;
  for (int c = 0; c < unit.count; ++c, b += p.b.channel) {
    taps.data[kB0][c] = b[0], taps.data[kB1][c] = b[p.b.tap], taps.data[kB2][c] = b[2 * p.b.tap];
  }
}

// From dense (batch, C, 2) states into quantities `newest` and the one after it; left as they are without states.
template <class E, int kQuantities>
void load_states(Rows<Arithmetic<E>, kQuantities>& rows, int newest, const Block<E>& unit,
                 const Arithmetic<E>* states) {
  if (states == nullptr) return;
  states += 2 * (unit.batch * unit.p.channels + unit.channel);
  for (int c = 0; c < unit.count; ++c) {
    rows.data[newest][c] = states[2 * c], rows.data[newest + 1][c] = states[2 * c + 1];
  }
}

// And back; nothing where they are not wanted.
template <class E, int kQuantities>
void store_states(const Rows<Arithmetic<E>, kQuantities>& rows, int newest, const Block<E>& unit,
                  Arithmetic<E>* states) {
  if (states == nullptr) return;
  states += 2 * (unit.batch * unit.p.channels + unit.channel);
  for (int c = 0; c < unit.count; ++c) {
    states[2 * c] = rows.data[newest][c], states[2 * c + 1] = rows.data[newest + 1][c];
  }
}

enum State { kX1, kX2, kY1, kY2, kStates };

// Samples [t, t + n). kWhole: there are kSteps of them. Not inlined: its loops need all the registers.
template <class E, bool kNumerator, bool kWhole>
__attribute__((noinline)) void forward_steps(const IirScanForward<E>& p, const Block<E>& unit,
                                             const Rows<Arithmetic<E>, kTaps>& taps,
                                             Rows<Arithmetic<E>, kStates>& state, int64_t t, int n) {
  using T = Arithmetic<E>;
  const int64_t dx = p.x.time, dy = p.y.time;
  const E* const x = unit.first(p.x) + t * dx;
  E* const y = unit.first(p.y) + t * dy;
  each_vector(unit, unit.streams(p.y), [&](int c, auto access) __attribute__((always_inline)) {
    const Vec<T> a1 = taps.get(kA1, c), a2 = taps.get(kA2, c);
    const Vec<T> b0 = taps.get(kB0, c), b1 = taps.get(kB1, c), b2 = taps.get(kB2, c);
    Vec<T> x1 = state.get(kX1, c), x2 = state.get(kX2, c), y1 = state.get(kY1, c), y2 = state.get(kY2, c);
    const E* in = x + c;
    E* out = y + c;
    auto step = [&]() __attribute__((always_inline)) {
      Vec<T> x0 = access.get(in), u = x0;
      if (access.streams) prefetch(in + kAhead * dx);
      if constexpr (kNumerator) u = fma<T>(b0, x0, fma<T>(b1, x1, b2 * x2));
      Vec<T> y0 = fnma<T>(a1, y1, fnma<T>(a2, y2, u));
      access.put(out, y0);
      x2 = x1, x1 = x0, y2 = y1, y1 = y0;
      in += dx, out += dy;
    };
    if constexpr (kWhole) {
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) step();
    } else {
      for (int s = 0; s < n; ++s) step();
    }
    state.set(kX1, c, x1), state.set(kX2, c, x2), state.set(kY1, c, y1), state.set(kY2, c, y2);
  });
}

template <class E, bool kNumerator>
void forward_unit(const IirScanForward<E>& p, int64_t index) {
  const Block<E> unit(p, index, p.block);
  const Span& span = unit.span;
  Rows<Arithmetic<E>, kStates> state;
  Rows<Arithmetic<E>, kTaps> taps;
  load_states(state, kX1, unit, p.state_x);
  load_states(state, kY1, unit, p.state_y);
  for (int64_t k = 0; k < span.chunks; ++k) {
    load_taps(taps, unit, k);
    if (!p.carry && k > 0) state.clear();
    const int64_t begin = k * p.chunk, end = begin + p.chunk < span.time ? begin + p.chunk : span.time;
    int64_t t = begin;
    for (; t + kSteps <= end; t += kSteps) forward_steps<E, kNumerator, true>(p, unit, taps, state, t, kSteps);
    if (t < end) forward_steps<E, kNumerator, false>(p, unit, taps, state, t, static_cast<int>(end - t));
  }
  store_states(state, kX1, unit, p.end_x);
  store_states(state, kY1, unit, p.end_y);
}

enum Owed { kS1, kS2, kR1, kR2, kOwed };  // s to gy, r to gx, of the present sample and the one before it

template <class E, bool kNumerator, bool kSum>
class Backward {
  using T = Arithmetic<E>;
  static constexpr int kSums = kNumerator ? 5 : 2;

 public:
  Backward(const IirScanBackward<E>& p, int64_t index)
      : p_(p), unit_(p, index, p.block), span_(unit_.span), gy_(unit_.first(p.gy)), x_(unit_.first(p.x)),
        y_(unit_.first(p.y)), gx_(unit_.first(p.gx)), streams_(gx_ != nullptr && unit_.streams(p.gx)) {}

  void run() {
    load_states(owed_, kS1, unit_, p_.gend_y);
    load_states(owed_, kR1, unit_, p_.gend_x);
    if constexpr (kSum) load_states(past_, kY1, unit_, p_.state_y);
    if constexpr (kSum && kNumerator) load_states(past_, kX1, unit_, p_.state_x);
    for (int64_t k = span_.chunks; k-- > 0;) chunk(k);
    store_states(owed_, kS1, unit_, p_.gstate_y);
    store_states(owed_, kR1, unit_, p_.gstate_x);
  }

 private:
  void chunk(int64_t k) {
    load_taps(taps_, unit_, k);
    if (!p_.carry && k + 1 < span_.chunks) owed_.clear();
    const int64_t begin = k * p_.chunk, end = begin + p_.chunk < span_.time ? begin + p_.chunk : span_.time;
    if (begin == end) {  // a sequence without samples
      if (kSum) fold(true, k);
      return;
    }
    const int64_t first = p_.carry ? 0 : begin;  // the history starts here, the initial state's before 0
    // Without a numerator, r is zero but for the last two samples, whose r gend_x gives.
    const int64_t plain = kNumerator || p_.gend_x == nullptr ? span_.time : span_.time - 2;
    const bool owes_alone = gx_ == nullptr && p_.gstate_x != nullptr;
    for (int64_t t = begin + (end - begin - 1) / kSteps * kSteps; t >= begin; t -= kSteps) {
      const int n = static_cast<int>(end - t < kSteps ? end - t : kSteps);
      const bool inside = n == kSteps && t - 2 >= first && t + kSteps <= plain && !owes_alone;
      if (inside && gx_ != nullptr) {
        visit<true, true>(t, n, first);
      } else if (inside) {
        visit<true, false>(t, n, first);
      } else if (gx_ != nullptr) {
        visit<false, true>(t, n, first);
      } else {
        visit<false, false>(t, n, first);
      }
      if (kSum && (t - begin) % kSegment == 0) fold(t + kSegment >= end, t == begin ? k : -1);
    }
  }

  // Samples [t, t + n). kInside: there are kSteps of them, the two samples before them are in the history, and r is
  // not needed without kWrite, nor without a numerator. Not inlined: its loops need all the registers.
  template <bool kInside, bool kWrite>
  __attribute__((noinline)) void visit(int64_t t, int n, int64_t first) {
    constexpr bool kOwesX = (kWrite && kNumerator) || !kInside;
    const int64_t dg = p_.gy.time, dx = p_.x.time, dy = p_.y.time, dgx = p_.gx.time, last = t + n - 1;
    const E* const gy0 = gy_ + last * dg;
    const E* const x0_ = x_ + last * dx;
    const E* const y0_ = y_ + last * dy;
    E* const gx0 = kWrite ? gx_ + last * dgx : nullptr;
    each_vector(unit_, streams_, [&](int c, auto access) __attribute__((always_inline)) {
      const Vec<T> a1 = taps_.get(kA1, c), a2 = taps_.get(kA2, c);
      const Vec<T> b0 = taps_.get(kB0, c), b1 = taps_.get(kB1, c), b2 = taps_.get(kB2, c);
      Vec<T> s1 = owed_.get(kS1, c), s2 = owed_.get(kS2, c), r1{}, r2{};
      if constexpr (kOwesX) r1 = owed_.get(kR1, c), r2 = owed_.get(kR2, c);
      Vec<T> ga1 = sum_.get(kA1, c), ga2 = sum_.get(kA2, c);
      Vec<T> gb0 = sum_.get(kB0, c), gb1 = sum_.get(kB1, c), gb2 = sum_.get(kB2, c);
      const E *gy = gy0 + c, *x = x0_ + c, *y = y0_ + c;
      E* gx = kWrite ? gx0 + c : nullptr;
      int64_t now = last;
      auto before = [&](const E* signal, int64_t stride, int lag, int newest) __attribute__((always_inline)) {
        if (kInside || now - lag >= first) return access.get(signal - lag * stride);
        return first == 0 ? past_.get(newest + static_cast<int>(lag - 1 - now), c) : Vec<T>{};
      };
      Vec<T> x0{}, x1{}, y1{};
      if constexpr (kSum) y1 = before(y, dy, 1, kY1);
      if constexpr (kSum && kNumerator) x0 = access.get(x), x1 = before(x, dx, 1, kX1);
      auto step = [&]() __attribute__((always_inline)) {
        const Vec<T> l = access.get(gy) + s1;
        s1 = fnma<T>(a1, l, s2), s2 = -a2 * l;
        if constexpr (kWrite) {
          access.put(gx, kNumerator ? fma<T>(b0, l, r1) : kOwesX ? l + r1 : l);
          gx -= dgx;
        }
        if constexpr (kNumerator && kOwesX) {
          r1 = fma<T>(b1, l, r2), r2 = b2 * l;
        } else {
          r1 = r2, r2 = Vec<T>{};
        }
        if (access.streams) prefetch(gy - kAhead * dg);
        if constexpr (kSum) {
          const Vec<T> y2 = before(y, dy, 2, kY1);
          ga1 = fma<T>(l, y1, ga1), ga2 = fma<T>(l, y2, ga2);
          y1 = y2;
          if (access.streams) prefetch(y - kAhead * dy);
        }
        if constexpr (kSum && kNumerator) {
          const Vec<T> x2 = before(x, dx, 2, kX1);
          gb0 = fma<T>(l, x0, gb0), gb1 = fma<T>(l, x1, gb1), gb2 = fma<T>(l, x2, gb2);
          x0 = x1, x1 = x2;
          if (access.streams) prefetch(x - kAhead * dx);
        }
        gy -= dg, x -= dx, y -= dy, --now;
      };
      if constexpr (kInside) {
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) step();
      } else {
        for (int s = 0; s < n; ++s) step();
      }
      owed_.set(kS1, c, s1), owed_.set(kS2, c, s2);
      if constexpr (kOwesX) owed_.set(kR1, c, r1), owed_.set(kR2, c, r2);
      if constexpr (kSum) sum_.set(kA1, c, ga1), sum_.set(kA2, c, ga2);
      if constexpr (kSum && kNumerator) sum_.set(kB0, c, gb0), sum_.set(kB1, c, gb1), sum_.set(kB2, c, gb2);
    });
  }

  // Adds the sums of a segment to the chunk's (restarting them at its last segment) and, at its first, writes them.
  void fold(bool restart, int64_t k) {
    for (int q = 0; q < kSums; ++q) {
      for (int c = 0; c < unit_.count; ++c) {
        total_[q][c] = (restart ? 0 : total_[q][c]) + static_cast<double>(sum_.data[q][c]);
      }
    }
    sum_.clear();
    if (k < 0) return;
    for (int c = 0; c < unit_.count; ++c) {
      const int64_t at = p_.row(unit_.batch, unit_.channel + c) * p_.chunks + span_.first_chunk + k;
      for (int q = 0; q < 2; ++q) p_.ga[2 * at + q] = static_cast<T>(-total_[q][c]);
      if (!kNumerator) continue;
      for (int q = 0; q < 3; ++q) p_.gb[3 * at + q] = static_cast<T>(total_[kB0 + q][c]);
    }
  }

  const IirScanBackward<E>& p_;
  const Block<E> unit_;
  const Span span_;
  const E* const gy_;
  const E* const x_;
  const E* const y_;
  E* const gx_;
  const bool streams_;
  Rows<T, kOwed> owed_;
  Rows<T, kStates> past_;  // the initial state
  Rows<T, kTaps> taps_;
  Rows<T, kTaps> sum_;  // in the order of the taps: l y[t-1], l y[t-2], l x[t], l x[t-1], l x[t-2]
  double total_[kTaps][kIirScanBlock<T>];
};

template <class E>
int64_t units(const IirScan<E>& p) {
  return Block<E>::units(p, p.block);
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    for (int64_t unit = begin; unit < end; ++unit) forward_unit<E, numerator.value>(p, unit);
  });
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    with_flag(p.ga != nullptr, [&](auto sums) {
      for (int64_t unit = begin; unit < end; ++unit) Backward<E, numerator.value, sums.value>(p, unit).run();
    });
  });
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {units<E>, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_channels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>,
                                          kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
