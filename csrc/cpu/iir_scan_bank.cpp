// iir_scan of banks where channels have stride 1, the transposed view of (B, T, C) activations: filters of one input,
// summed.
//
// What       forward and backward of second-order recursions, coefficients per (channel, chunk, filter).
// Parallel   a unit is a block of channels of one batch entry or packed sequence; kLanes channels are a vector. Rows of
//            the block are walked kSteps at a time: a vector of channels meets its filters in turn, each with its state
//            and coefficients in registers for kSteps samples. Nothing is transposed.
// Bytes      per fp32 sample: forward reads x, writes y (8), and every kIirScanTile samples the filters' states.
//            Backward reads gy and x, writes gx (12). Results larger than the caches are streamed; inputs are
//            prefetched kAhead samples ahead.
// Numerics   y = (u - a2 y2) - a1 y1, in explicit FMAs; the sum in the order of the filters. Coefficient gradients: sums
//            over a tile at most in the precision of arithmetic, double beyond.
// Backward   tile by tile from the end: x is copied, the filters' y are computed again from the states that forward left
//            at the tile's start. Then the transposed form: l = gy + s1, s1 = s2 - a1 l, s2 = -a2 l for each filter, and
//            gx[t-i] += bi l[t]: a sample uses its own chunk's coefficients alone.
#include <new>

#include "cpu/iir_scan_block.h"
#include "cpu/iir_scan_kernels.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kSteps = 4;                         // samples that a filter takes at a time
constexpr int kAhead = 16;                        // samples between a read and its prefetch
constexpr int kTile = static_cast<int>(kIirScanTile);
template <class T>
constexpr int kBlock = 256 / sizeof(T);           // channels of a unit, at most: a tile of each filter stays in L2

template <class T>
using Row = T[kBlock<T>];

template <class T>
struct Filter {
  alignas(kLineBytes) Row<T> taps[kTaps];
  alignas(kLineBytes) Row<T> state[2];  // forward: y of the last two samples; backward: owed to gy of the next two
  alignas(kLineBytes) Row<T> sums[kTaps];
  double totals[kTaps][kBlock<T>];
};

// A tile of each channel, and the two samples before it.
template <class T>
struct Samples {
  alignas(kLineBytes) Row<T> rows[kTile + 2];
};

template <class T>
T* reserve(int64_t count) {
  return static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t{kLineBytes}));
}
inline void release(void* memory) { ::operator delete(memory, std::align_val_t{kLineBytes}); }

template <class E>
int64_t block_of(const IirScan<E>& p) {
  constexpr int64_t most = kBlock<Arithmetic<E>>;
  return p.block < most ? p.block : most;
}

// What both directions share: where a unit lies, and its coefficients and states.
template <class E>
struct Unit : Block<E> {
  using T = Arithmetic<E>;
  using Block<E>::p, Block<E>::batch, Block<E>::channel, Block<E>::count, Block<E>::span;
  Filter<T>* const filters;

  Unit(const IirScan<E>& p, int64_t unit, Filter<T>* filters) : Block<E>(p, unit, block_of(p)), filters(filters) {}

  int64_t end_of(int64_t k) const { return (k + 1) * p.chunk < span.time ? (k + 1) * p.chunk : span.time; }

  void load_taps(int64_t k) const {
    for (int64_t f = 0; f < p.filters; ++f) {
      load_taps(p.a, k, f, kA1, 2);
      if (p.b.data != nullptr) load_taps(p.b, k, f, kB0, 3);
    }
  }
  void load_taps(const Coefficients<T>& from, int64_t k, int64_t f, int first_tap, int taps) const {
    const T* c = from.at(batch, channel) + (span.first_chunk + k) * from.chunk + f * from.filter;
    for (int i = 0; i < count; ++i, c += from.channel) {
      for (int tap = 0; tap < taps; ++tap) filters[f].taps[first_tap + tap][i] = c[tap * from.tap];
    }
  }

  // Dense (batch, C, filters, 2) states to and from two rows; zeros where there are none, nothing where not wanted.
  void load_state(Row<T>* rows, const T* states, int64_t filter_count, int64_t f) const {
    for (int i = 0; i < kBlock<T>; ++i) {
      const T* at = states == nullptr || i >= count ? nullptr : states + place(i, filter_count, f);
      rows[0][i] = at == nullptr ? 0 : at[0], rows[1][i] = at == nullptr ? 0 : at[1];
    }
  }
  void store_state(const Row<T>* rows, T* states, int64_t filter_count, int64_t f) const {
    if (states == nullptr) return;
    for (int i = 0; i < count; ++i) {
      T* at = states + place(i, filter_count, f);
      at[0] = rows[0][i], at[1] = rows[1][i];
    }
  }
  int64_t place(int i, int64_t filter_count, int64_t f) const {
    return ((batch * p.channels + channel + i) * filter_count + f) * 2;
  }

  // Of the states that a bank keeps, dense (B, borders, F, 2, C): those of filter f before sample t of chunk k.
  int64_t border(int64_t t, int64_t k, int64_t f) const {
    const int64_t at = p.border_batch(batch) * p.borders() + p.border(span.begin + t, span.first_chunk + k);
    return (at * p.filters + f) * 2 * p.channels + channel;
  }
};

template <class T>
void clear(Row<T>* rows) {
  for (int i = 0; i < 2; ++i) {
    for (T& value : rows[i]) value = 0;
  }
}

// --- forward ---------------------------------------------------------------------------------------------------

// y of one filter from kN + 2 samples of x: put(s, y[s]); y1 and y2 those before it, and then the last two.
template <class T, bool kNumerator, int kN, class Put>
FASTKIT_INLINE void recur(const Filter<T>& filter, int c, const Vec<T> (&x)[kN + 2], Vec<T>& y1, Vec<T>& y2, Put put) {
  const Vec<T> a1 = load(filter.taps[kA1] + c), a2 = load(filter.taps[kA2] + c);
  Vec<T> b0{}, b1{}, b2{};
  if constexpr (kNumerator) {
    b0 = load(filter.taps[kB0] + c), b1 = load(filter.taps[kB1] + c), b2 = load(filter.taps[kB2] + c);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kN; ++s) {
    Vec<T> u = x[s + 2];
    if constexpr (kNumerator) u = fma<T>(b0, x[s + 2], fma<T>(b1, x[s + 1], b2 * x[s]));
    const Vec<T> y0 = fnma<T>(a1, y1, fnma<T>(a2, y2, u));
    put(s, y0);
    y2 = y1, y1 = y0;
  }
}

template <class E, bool kNumerator>
class Forward {
  using T = Arithmetic<E>;

 public:
  Forward(const IirScanForward<E>& p, int64_t index, Filter<T>* filters)
      : p_(p), unit_(p, index, filters), x_(unit_.first(p.x)), y_(unit_.first(p.y)), streams_(unit_.streams(p.y)) {}

  void run() {
    unit_.load_state(before_, p_.state_x, 1, 0);
    for (int64_t f = 0; f < p_.filters; ++f) unit_.load_state(unit_.filters[f].state, p_.state_y, p_.filters, f);
    for (int64_t k = 0; k < unit_.span.chunks; ++k) {
      unit_.load_taps(k);
      if (!p_.carry && k > 0) {
        clear<T>(before_);
        for (int64_t f = 0; f < p_.filters; ++f) clear<T>(unit_.filters[f].state);
      }
      const int64_t end = unit_.end_of(k);
      for (int64_t t = k * p_.chunk; t < end; t += kTile) tile(t, t + kTile < end ? t + kTile : end, k);
    }
    unit_.store_state(before_, p_.end_x, 1, 0);
    for (int64_t f = 0; f < p_.filters; ++f) unit_.store_state(unit_.filters[f].state, p_.end_y, p_.filters, f);
  }

 private:
  void tile(int64_t t, int64_t end, int64_t k) {
    if (p_.borders != nullptr) {
      for (int64_t f = 0; f < p_.filters; ++f) {
        T* to = p_.borders + unit_.border(t, k, f);
        for (int i = 0; i < 2; ++i, to += p_.channels) {
          for (int c = 0; c < unit_.count; ++c) to[c] = unit_.filters[f].state[i][c];
        }
      }
    }
    for (; t + kSteps <= end; t += kSteps) steps<kSteps>(t);
    for (; t < end; ++t) steps<1>(t);
  }

  // Samples [t, t + kN). Not inlined: its loops need all the registers.
  template <int kN>
  __attribute__((noinline)) void steps(int64_t t) {
    const int64_t dx = p_.x.time, dy = p_.y.time;
    const E* const x0 = x_ + t * dx;
    E* const y0 = y_ + t * dy;
    each_vector(unit_, streams_, [&](int c, auto access) __attribute__((always_inline)) {
      Vec<T> x[kN + 2], y[kN];
      x[0] = load(before_[1] + c), x[1] = load(before_[0] + c);
#pragma GCC unroll 4
      for (int s = 0; s < kN; ++s) {
        x[s + 2] = access.get(x0 + s * dx + c);
        if (access.streams) prefetch(x0 + (s + kAhead) * dx + c);
      }
      filter<kN>(0, c, x, [&](int s, Vec<T> v) __attribute__((always_inline)) { y[s] = v; });
      for (int64_t f = 1; f < p_.filters; ++f) {
        filter<kN>(f, c, x, [&](int s, Vec<T> v) __attribute__((always_inline)) { y[s] += v; });
      }
#pragma GCC unroll 4
      for (int s = 0; s < kN; ++s) access.put(y0 + s * dy + c, y[s]);
      store(before_[1] + c, x[kN]), store(before_[0] + c, x[kN + 1]);
    });
  }

  template <int kN, class Put>
  FASTKIT_ALWAYS_INLINE void filter(int64_t f, int c, const Vec<T> (&x)[kN + 2], Put put) {
    Filter<T>& filter = unit_.filters[f];
    Vec<T> y1 = load(filter.state[0] + c), y2 = load(filter.state[1] + c);
    recur<T, kNumerator, kN>(filter, c, x, y1, y2, put);
    store(filter.state[0] + c, y1), store(filter.state[1] + c, y2);
  }

  const IirScanForward<E>& p_;
  const Unit<E> unit_;
  const E* const x_;
  E* const y_;
  const bool streams_;
  alignas(kLineBytes) Row<T> before_[2];  // x of the last two samples
};

// --- backward --------------------------------------------------------------------------------------------------

template <class E, bool kNumerator, bool kSum>
class Backward {
  using T = Arithmetic<E>;

 public:
  Backward(const IirScanBackward<E>& p, int64_t index, Filter<T>* filters, Samples<T>* samples)
      : p_(p), unit_(p, index, filters), gy_(unit_.first(p.gy)), gx_(unit_.first(p.gx)),
        streams_(gx_ != nullptr && unit_.streams(p.gx)), x_(samples[0].rows), y_(samples + 1) {}

  void run() {
    unit_.load_state(owed_, p_.gend_x, 1, 0);
    for (int64_t f = 0; f < p_.filters; ++f) unit_.load_state(unit_.filters[f].state, p_.gend_y, p_.filters, f);
    for (int64_t k = unit_.span.chunks; k-- > 0;) {
      unit_.load_taps(k);
      if (!p_.carry && k + 1 < unit_.span.chunks) {
        clear<T>(owed_);
        for (int64_t f = 0; f < p_.filters; ++f) clear<T>(unit_.filters[f].state);
      }
      const int64_t begin = k * p_.chunk, end = unit_.end_of(k);
      if (begin == end) continue;  // a sequence without samples
      for (int64_t t = begin + (end - begin - 1) / kTile * kTile; t >= begin; t -= kTile) {
        const int n = static_cast<int>(end - t < kTile ? end - t : kTile);
        if constexpr (kSum) {
          copy_x(t, n, begin);
          recompute(t, n, k);
        }
        int s = n;
        for (; s >= kSteps; s -= kSteps) adjoint<kSteps>(t, s - kSteps);
        for (; s > 0; --s) adjoint<1>(t, s - 1);
        if constexpr (kSum) fold(t + n == end);
      }
      if constexpr (kSum) write_sums(k);
    }
    unit_.store_state(owed_, p_.gstate_x, 1, 0);
    for (int64_t f = 0; f < p_.filters; ++f) unit_.store_state(unit_.filters[f].state, p_.gstate_y, p_.filters, f);
  }

 private:
  // Row i of x_ is sample t - 2 + i.
  void copy_x(int64_t t, int n, int64_t begin) {
    int first = -2;
    if (t == 0) {
      Row<T> state[2];
      unit_.load_state(state, p_.state_x, 1, 0);
      for (int c = 0; c < kBlock<T>; ++c) x_[1][c] = state[0][c], x_[0][c] = state[1][c];
      first = 0;
    } else if (!p_.carry && t == begin) {
      clear<T>(x_);
      first = 0;
    }
    const E* const x = unit_.first(p_.x) + t * p_.x.time;
    each_vector(unit_, false, [&](int c, auto access) __attribute__((always_inline)) {
      for (int s = first; s < n; ++s) store(x_[s + 2] + c, access.get(x + s * p_.x.time + c));
    });
  }

  // Row i of y_[f] is sample t - 2 + i.
  void recompute(int64_t t, int n, int64_t k) {
    for (int64_t f = 0; f < p_.filters; ++f) {
      const T* from = p_.borders + unit_.border(t, k, f);
      for (int c = 0; c < unit_.count; ++c) {
        y_[f].rows[1][c] = from[c], y_[f].rows[0][c] = from[p_.channels + c];
      }
    }
    int s = 0;
    for (; s + kSteps <= n; s += kSteps) again<kSteps>(s);
    for (; s < n; ++s) again<1>(s);
  }

  template <int kN>
  __attribute__((noinline)) void again(int s) {
    for (int c = 0; c < unit_.count; c += kLanes<T>) {
      Vec<T> x[kN + 2];
#pragma GCC unroll 6
      for (int i = 0; i < kN + 2; ++i) x[i] = load(x_[s + i] + c);
      for (int64_t f = 0; f < p_.filters; ++f) {
        Row<T>* const y = y_[f].rows + s;
        Vec<T> y1 = load(y[1] + c), y2 = load(y[0] + c);
        recur<T, kNumerator, kN>(unit_.filters[f], c, x, y1, y2,
                                 [&](int i, Vec<T> v) __attribute__((always_inline)) { store(y[i + 2] + c, v); });
      }
    }
  }

  // Samples [s, s + kN) of the tile at t.
  template <int kN>
  __attribute__((noinline)) void adjoint(int64_t t, int s) {
    const int64_t dg = p_.gy.time, dgx = p_.gx.time;
    const E* const gy0 = gy_ + (t + s) * dg;
    E* const gx0 = gx_ == nullptr ? nullptr : gx_ + (t + s) * dgx;
    each_vector(unit_, streams_, [&](int c, auto access) __attribute__((always_inline)) {
      Vec<T> gy[kN], g[kN + 2], x[kN + 2];  // g[i] goes to gx[s - 2 + i]
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) {
        gy[i] = access.get(gy0 + i * dg + c);
        if (access.streams) prefetch(gy0 + (i - kAhead) * dg + c);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kN; ++i) g[i] = Vec<T>{};
      g[kN] = load(owed_[1] + c), g[kN + 1] = load(owed_[0] + c);
      if constexpr (kSum && kNumerator) {
#pragma GCC unroll 6
        for (int i = 0; i < kN + 2; ++i) x[i] = load(x_[s + i] + c);
      }
      for (int64_t f = 0; f < p_.filters; ++f) {
        Filter<T>& filter = unit_.filters[f];
        const Vec<T> a1 = load(filter.taps[kA1] + c), a2 = load(filter.taps[kA2] + c);
        Vec<T> b0{}, b1{}, b2{}, ga1{}, ga2{}, gb0{}, gb1{}, gb2{}, y[kN + 1];
        if constexpr (kNumerator) {
          b0 = load(filter.taps[kB0] + c), b1 = load(filter.taps[kB1] + c), b2 = load(filter.taps[kB2] + c);
        }
        if constexpr (kSum) {
#pragma GCC unroll 6
          for (int i = 0; i < kN + 1; ++i) y[i] = load(y_[f].rows[s + i] + c);
          ga1 = load(filter.sums[kA1] + c), ga2 = load(filter.sums[kA2] + c);
        }
        if constexpr (kSum && kNumerator) {
          gb0 = load(filter.sums[kB0] + c), gb1 = load(filter.sums[kB1] + c), gb2 = load(filter.sums[kB2] + c);
        }
        Vec<T> s1 = load(filter.state[0] + c), s2 = load(filter.state[1] + c);
#pragma GCC unroll 4
        for (int i = kN - 1; i >= 0; --i) {
          const Vec<T> l = gy[i] + s1;
          s1 = fnma<T>(a1, l, s2), s2 = -a2 * l;
          if constexpr (kNumerator) {
            g[i + 2] = fma<T>(b0, l, g[i + 2]), g[i + 1] = fma<T>(b1, l, g[i + 1]), g[i] = fma<T>(b2, l, g[i]);
          } else {
            g[i + 2] += l;
          }
          if constexpr (kSum) ga1 = fma<T>(l, y[i + 1], ga1), ga2 = fma<T>(l, y[i], ga2);
          if constexpr (kSum && kNumerator) {
            gb0 = fma<T>(l, x[i + 2], gb0), gb1 = fma<T>(l, x[i + 1], gb1), gb2 = fma<T>(l, x[i], gb2);
          }
        }
        store(filter.state[0] + c, s1), store(filter.state[1] + c, s2);
        if constexpr (kSum) store(filter.sums[kA1] + c, ga1), store(filter.sums[kA2] + c, ga2);
        if constexpr (kSum && kNumerator) {
          store(filter.sums[kB0] + c, gb0), store(filter.sums[kB1] + c, gb1), store(filter.sums[kB2] + c, gb2);
        }
      }
      if (gx0 != nullptr) {
#pragma GCC unroll 4
        for (int i = 0; i < kN; ++i) access.put(gx0 + i * dgx + c, g[i + 2]);
      }
      store(owed_[0] + c, g[1]), store(owed_[1] + c, g[0]);
    });
  }

  static constexpr int kSums = kNumerator ? 5 : 2;

  // Adds a tile's sums to the chunk's, which begin with its last tile.
  void fold(bool begins) {
    for (int64_t f = 0; f < p_.filters; ++f) {
      Filter<T>& filter = unit_.filters[f];
      for (int q = 0; q < kSums; ++q) {
        for (int c = 0; c < unit_.count; ++c) {
          filter.totals[q][c] = (begins ? 0 : filter.totals[q][c]) + static_cast<double>(filter.sums[q][c]);
        }
        for (T& sum : filter.sums[q]) sum = 0;  // of lanes without a channel too
      }
    }
  }

  void write_sums(int64_t k) const {
    for (int c = 0; c < unit_.count; ++c) {
      const int64_t row = p_.row(unit_.batch, unit_.channel + c) * p_.chunks + unit_.span.first_chunk + k;
      for (int64_t f = 0; f < p_.filters; ++f) {
        const Filter<T>& filter = unit_.filters[f];
        const int64_t at = row * p_.filters + f;
        for (int q = 0; q < 2; ++q) p_.ga[2 * at + q] = static_cast<T>(-filter.totals[q][c]);
        if constexpr (kNumerator) {
          for (int q = 0; q < 3; ++q) p_.gb[3 * at + q] = static_cast<T>(filter.totals[kB0 + q][c]);
        }
      }
    }
  }

  const IirScanBackward<E>& p_;
  const Unit<E> unit_;
  const E* const gy_;
  E* const gx_;
  const bool streams_;
  alignas(kLineBytes) Row<T> owed_[2];  // to gx of the next sample to be visited and of the one after it
  Row<T>* const x_;
  Samples<T>* const y_;
};

template <class E>
int64_t units(const IirScan<E>& p) {
  return Block<E>::units(p, block_of(p));
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  auto* const filters = reserve<Filter<T>>(p.filters);
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    for (int64_t unit = begin; unit < end; ++unit) Forward<E, numerator.value>(p, unit, filters).run();
  });
  release(filters);
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  auto* const filters = reserve<Filter<T>>(p.filters);
  auto* const samples = reserve<Samples<T>>(1 + p.filters);
  for (int64_t f = 0; f < p.filters; ++f) {
    for (Row<T>& row : filters[f].sums) {
      for (T& value : row) value = 0;
    }
  }
  with_flag(p.b.data != nullptr, [&](auto numerator) {
    with_flag(p.ga != nullptr, [&](auto sums) {
      for (int64_t unit = begin; unit < end; ++unit) {
        Backward<E, numerator.value, sums.value>(p, unit, filters, samples).run();
      }
    });
  });
  release(samples), release(filters);
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {units<E>, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_bank = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
