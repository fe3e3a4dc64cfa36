// iir_scan where channels have stride 1: the transposed view of (B, T, C) activations.
//
// What       forward and backward of a second-order recursion, coefficients per (channel, chunk).
// Parallel   a unit is a block of channels of one batch entry; kLanes channels are a vector. Rows of the block
//            are walked kSteps at a time: for each vector of channels, its state and coefficients go through
//            registers once for kSteps samples. Nothing is transposed.
// Bytes      per fp32 sample: forward reads x, writes y (8); backward reads gy, x, y, writes gx (16, without b
//            12). Results larger than the caches are streamed; inputs are prefetched kAhead samples ahead.
// Numerics   y = (u - a2 y2) - a1 y1. Coefficient gradients: fp32 sums over at most kSegment samples, double
//            beyond.
// Backward   transposed form, from the end: l = gy + s1, s1 = s2 - a1 l, s2 = -a2 l, and likewise
//            gx = b0 l + r1, r1 = r2 + b1 l, r2 = b2 l: a sample uses its own chunk's coefficients alone.
#include "cpu/iir_scan_kernels.h"
#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kSteps = 4;      // samples a vector of channels takes at a time
constexpr int kAhead = 16;     // samples between a read and its prefetch (into L2: L1 is full of state)
constexpr int kSegment = 128;  // samples summed in the working precision

template <class T>
struct Unit {  // where a unit lies
  int64_t batch, channel;
  int count;  // channels

  Unit(const IirScan<T>& p, int64_t unit) {
    const int64_t blocks = (p.channels + p.block - 1) / p.block;
    batch = unit / blocks;
    channel = unit % blocks * p.block;
    count = static_cast<int>(p.channels - channel < p.block ? p.channels - channel : p.block);
  }
};

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

enum Tap { kA1, kA2, kB0, kB1, kB2, kTaps };

template <class T>
void load_taps(Rows<T, kTaps>& taps, const IirScan<T>& p, const Unit<T>& unit, int64_t k) {
  for (int c = 0; c < unit.count; ++c) {
    const T* a = p.a.at(unit.batch, unit.channel + c) + k * p.a.chunk;
    taps.data[kA1][c] = a[0], taps.data[kA2][c] = a[p.a.tap];
    if (p.b.data == nullptr) continue;
    const T* b = p.b.at(unit.batch, unit.channel + c) + k * p.b.chunk;
    taps.data[kB0][c] = b[0], taps.data[kB1][c] = b[p.b.tap], taps.data[kB2][c] = b[2 * p.b.tap];
  }
}

// Reads and writes of the vector of channels at c: whole, or the block's last few channels.
template <class T, bool kWhole>
struct Access {
  int64_t count;
  bool streams;

  Vec<T> get(const T* p) const {
    if constexpr (kWhole) {
      return load(p);
    } else {
      return load(p, count);
    }
  }
  void put(T* p, Vec<T> v) const {
    if constexpr (!kWhole) {
      store(p, v, count);
    } else if (streams) {
      stream(p, v);
    } else {
      store(p, v);
    }
  }
};

template <class T>
bool streamable(const IirScan<T>& p, const Signal<T>& out, const Unit<T>& unit) {
  return p.stream && on_line(out.at(unit.batch, unit.channel)) && out.time % kLine<T> == 0;
}

template <class T, class F>
FASTKIT_INLINE void each_vector(const Unit<T>& unit, bool streams, F&& body) {
  int c = 0;
  for (; c + kLanes<T> <= unit.count; c += kLanes<T>) body(c, Access<T, true>{kLanes<T>, streams});
  if (c < unit.count) body(c, Access<T, false>{unit.count - c, false});
}

enum State { kX1, kX2, kY1, kY2, kStates };

template <class T, bool kNumerator>
void forward_unit(const IirScanForward<T>& p, int64_t index) {
  const Unit<T> unit(p, index);
  const T* const x = p.x.at(unit.batch, unit.channel);
  T* const y = p.y.at(unit.batch, unit.channel);
  const int64_t dx = p.x.time, dy = p.y.time;
  const bool streams = streamable(p, p.y, unit);
  Rows<T, kStates> state;
  Rows<T, kTaps> taps;

  for (int64_t k = 0; k < p.chunks; ++k) {
    load_taps(taps, p, unit, k);
    if (!p.carry) state.clear();
    const int64_t begin = k * p.chunk, end = begin + p.chunk < p.time ? begin + p.chunk : p.time;
    for (int64_t t = begin; t < end; t += kSteps) {
      const int n = static_cast<int>(end - t < kSteps ? end - t : kSteps);
      each_vector(unit, streams, [&](int c, auto access) __attribute__((always_inline)) {
        const Vec<T> a1 = taps.get(kA1, c), a2 = taps.get(kA2, c);
        const Vec<T> b0 = taps.get(kB0, c), b1 = taps.get(kB1, c), b2 = taps.get(kB2, c);
        Vec<T> x1 = state.get(kX1, c), x2 = state.get(kX2, c), y1 = state.get(kY1, c), y2 = state.get(kY2, c);
        const T* in = x + t * dx + c;
        T* out = y + t * dy + c;
        auto step = [&]() __attribute__((always_inline)) {
          Vec<T> x0 = access.get(in), u = x0;
          if (access.streams) prefetch(in + kAhead * dx);
          if constexpr (kNumerator) u = b0 * x0 + (b1 * x1 + b2 * x2);
          Vec<T> y0 = (u - a2 * y2) - a1 * y1;
          access.put(out, y0);
          x2 = x1, x1 = x0, y2 = y1, y1 = y0;
          in += dx, out += dy;
        };
        if (n == kSteps) {
#pragma GCC unroll 4
          for (int s = 0; s < kSteps; ++s) step();
        } else {
          for (int s = 0; s < n; ++s) step();
        }
        state.set(kX1, c, x1), state.set(kX2, c, x2), state.set(kY1, c, y1), state.set(kY2, c, y2);
      });
    }
  }
}

enum Owed { kS1, kS2, kR1, kR2, kOwed };  // s to gy, r to gx, of the present sample and the one before it

template <class T, bool kNumerator, bool kSum>
class Backward {
  static constexpr int kSums = kNumerator ? 5 : 2;

 public:
  Backward(const IirScanBackward<T>& p, int64_t index)
      : p_(p), unit_(p, index), streams_(p.gx.data != nullptr && streamable(p, p.gx, unit_)) {}

  void run() {
    for (int64_t k = p_.chunks; k-- > 0;) chunk(k);
  }

 private:
  void chunk(int64_t k) {
    load_taps(taps_, p_, unit_, k);
    if (!p_.carry) owed_.clear();
    const int64_t begin = k * p_.chunk, end = begin + p_.chunk < p_.time ? begin + p_.chunk : p_.time;
    const int64_t first = p_.carry ? 0 : begin;  // the history starts here
    for (int64_t t = begin + (end - begin - 1) / kSteps * kSteps; t >= begin; t -= kSteps) {
      const int n = static_cast<int>(end - t < kSteps ? end - t : kSteps);
      const bool inside = n == kSteps && t - 2 >= first;
      if (inside && p_.gx.data != nullptr) {
        visit<true, true>(t, n, first);
      } else if (p_.gx.data != nullptr) {
        visit<false, true>(t, n, first);
      } else {
        visit<false, false>(t, n, first);
      }
      if (kSum && (t - begin) % kSegment == 0) fold(t + kSegment >= end, t == begin ? k : -1);
    }
  }

  // Samples [t, t + n). kInside: there are kSteps of them, and the two samples before them are in the history.
  template <bool kInside, bool kWrite>
  void visit(int64_t t, int n, int64_t first) {
    const int64_t dg = p_.gy.time, dx = p_.x.time, dy = p_.y.time, dgx = p_.gx.time, last = t + n - 1;
    const T* const gy0 = p_.gy.at(unit_.batch, unit_.channel) + last * dg;
    const T* const x0_ = p_.x.at(unit_.batch, unit_.channel) + last * dx;
    const T* const y0_ = p_.y.at(unit_.batch, unit_.channel) + last * dy;
    T* const gx0 = kWrite ? p_.gx.at(unit_.batch, unit_.channel) + last * dgx : nullptr;
    each_vector(unit_, streams_, [&](int c, auto access) __attribute__((always_inline)) {
      const Vec<T> a1 = taps_.get(kA1, c), a2 = taps_.get(kA2, c);
      const Vec<T> b0 = taps_.get(kB0, c), b1 = taps_.get(kB1, c), b2 = taps_.get(kB2, c);
      Vec<T> s1 = owed_.get(kS1, c), s2 = owed_.get(kS2, c), r1 = owed_.get(kR1, c), r2 = owed_.get(kR2, c);
      Vec<T> ga1 = sum_.get(kA1, c), ga2 = sum_.get(kA2, c);
      Vec<T> gb0 = sum_.get(kB0, c), gb1 = sum_.get(kB1, c), gb2 = sum_.get(kB2, c);
      const T *gy = gy0 + c, *x = x0_ + c, *y = y0_ + c;
      T* gx = kWrite ? gx0 + c : nullptr;
      int64_t now = last;
      auto before = [&](const T* signal, int64_t stride, int lag) __attribute__((always_inline)) {
        return kInside || now - lag >= first ? access.get(signal - lag * stride) : Vec<T>{};
      };
      Vec<T> x0{}, x1{}, y1{};
      if constexpr (kSum) y1 = before(y, dy, 1);
      if constexpr (kSum && kNumerator) x0 = access.get(x), x1 = before(x, dx, 1);
      auto step = [&]() __attribute__((always_inline)) {
        const Vec<T> l = access.get(gy) + s1;
        s1 = s2 - a1 * l, s2 = -a2 * l;
        if constexpr (kWrite) {
          access.put(gx, kNumerator ? b0 * l + r1 : l);
          r1 = r2 + b1 * l, r2 = b2 * l;
          gx -= dgx;
        }
        if (access.streams) prefetch(gy - kAhead * dg);
        if constexpr (kSum) {
          const Vec<T> y2 = before(y, dy, 2);
          ga1 += l * y1, ga2 += l * y2;
          y1 = y2;
          if (access.streams) prefetch(y - kAhead * dy);
        }
        if constexpr (kSum && kNumerator) {
          const Vec<T> x2 = before(x, dx, 2);
          gb0 += l * x0, gb1 += l * x1, gb2 += l * x2;
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
      owed_.set(kS1, c, s1), owed_.set(kS2, c, s2), owed_.set(kR1, c, r1), owed_.set(kR2, c, r2);
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
      const int64_t at = (unit_.batch * p_.channels + unit_.channel + c) * p_.chunks + k;
      for (int q = 0; q < 2; ++q) p_.ga[2 * at + q] = static_cast<T>(-total_[q][c]);
      if (!kNumerator) continue;
      for (int q = 0; q < 3; ++q) p_.gb[3 * at + q] = static_cast<T>(total_[kB0 + q][c]);
    }
  }

  const IirScanBackward<T>& p_;
  const Unit<T> unit_;
  const bool streams_;
  Rows<T, kOwed> owed_;
  Rows<T, kTaps> taps_;
  Rows<T, kTaps> sum_;  // in the order of the taps: l y[t-1], l y[t-2], l x[t], l x[t-1], l x[t-2]
  double total_[kTaps][kIirScanBlock<T>];
};

template <class T>
int64_t units(const IirScan<T>& p) {
  return p.batch * ((p.channels + p.block - 1) / p.block);
}

template <class T>
void forward(const IirScanForward<T>& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (p.b.data != nullptr) {
      forward_unit<T, true>(p, unit);
    } else {
      forward_unit<T, false>(p, unit);
    }
  }
}

template <class T>
void backward(const IirScanBackward<T>& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const bool numerator = p.b.data != nullptr, sums = p.ga != nullptr;
    if (numerator && sums) {
      Backward<T, true, true>(p, unit).run();
    } else if (numerator) {
      Backward<T, true, false>(p, unit).run();
    } else if (sums) {
      Backward<T, false, true>(p, unit).run();
    } else {
      Backward<T, false, false>(p, unit).run();
    }
  }
}

}  // namespace

const IirScanKernels iir_scan_channels = {{units<float>, forward<float>, backward<float>},
                                          {units<double>, forward<double>, backward<double>}};

}  // namespace fastkit::FASTKIT_ISA
