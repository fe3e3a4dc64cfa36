// pooled_conv on the CPU: a direct sum over taps, of which nothing but the maxima is written.
//
// What       forward: kTile samples of kLanes channels are summed in registers, tap by tap, and go into the maximum of
//            their cell. backward: a maximum has one sample, so its gradient meets one stretch of x and one of the taps:
//            two sums of a vector and a multiple, for as many taps as reach back.
// Parallel   forward: (row of the batch, group of kLanes channels); backward: (group, segment of the batch).
// Bytes      forward reads x once a block and group; backward reads x and writes gx once, transposed in between.
// Work       multiply-adds a sample and channel: forward as many as there are taps, backward 2 pool / block of that.
//            Beyond some thousand taps a transform would take fewer; here each sum is over what lies before it alone,
//            so that a result is causal to the last bit.
// Numerics   sums in T with FMAs, from the nearest sample back; of the gradient to the taps, row by row of a segment.
#include "cpu/simd.h"
#include "fastkit/pooled_conv.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kTile = 8;  // samples summed at a time: as many sums as hide an FMA's latency

template <class T>
int64_t groups_of(const PooledConv<T>& p) {
  return (p.channels + kLanes<T> - 1) / kLanes<T>;
}

FASTKIT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Samples before a block that its taps reach.
template <class T>
int64_t reach(const PooledConv<T>& p) {
  return least(p.taps - 1, (p.blocks - 1) * p.block);
}

template <class T>
int64_t forward_room(const PooledConv<T>& p) {
  return p.blocks == 0 ? 0 : kLanes<T> * (2 * kTile + reach(p) + p.block + reach(p) + p.block);
}

template <class T>
class Forward {
  static constexpr int kLane = kLanes<T>;
  using Places = typename VectorOf<T>::index;

 public:
  Forward(const PooledConvForward<T>& p, int64_t unit, T* room)
      : p_(p), batch_(unit / groups_of(p)), first_(unit % groups_of(p) * kLane),
        count_(static_cast<int>(least(p.channels - first_, kLane))), taps_(least(p.taps, p.blocks * p.block)),
        x_(room), h_(room + kLane * (2 * kTile + reach(p) + p.block)) {}

  void run() {
    for (int64_t n = 0; n < taps_; ++n) {
      for (int c = 0; c < kLane; ++c) h_[n * kLane + c] = c < count_ ? p_.h[(first_ + c) * p_.taps + n] : T{0};
    }
    for (int64_t k = 0; k < p_.blocks; ++k) {
      read(k);
      pool(k);
    }
  }

 private:
  // What block k sees, between kTile rows of zeros.
  void read(int64_t k) {
    const int64_t begin = k * p_.block;
    from_ = begin > reach(p_) ? begin - reach(p_) : 0;
    const T* in = p_.x + batch_ * p_.x_batch + from_ * p_.x_time + first_;
    T* out = x_;
    for (int i = 0; i < kTile; ++i, out += kLane) store(out, Vec<T>{});
    for (int64_t t = from_; t < begin + p_.block; ++t, in += p_.x_time, out += kLane) {
      store(out, count_ == kLane ? load(in) : load(in, count_));
    }
    for (int i = 0; i < kTile; ++i, out += kLane) store(out, Vec<T>{});
  }

  void pool(int64_t k) {
    const int64_t begin = k * p_.block, cell = p_.block / p_.pool;
    Vec<T> best{};
    Places place{};
    int64_t left = 0, at = -1;  // samples of the cell that are to come, and which cell it is
    for (int64_t i = 0; i < p_.block; i += kTile) {
      Vec<T> sums[kTile];
      sum(begin + i, sums);
      const int64_t count = least(kTile, p_.block - i);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        if (j >= count) break;
        const Vec<T> y = sums[j];
        const Places now = Places{} + static_cast<int32_t>(i + j);
        if (left == 0) {
          best = y, place = now, left = cell, ++at;
        } else {
          const Places larger = (y > best) | ((y != y) & (best == best));  // NaN, like max of PyTorch
          best = larger ? y : best, place = larger ? now : place;
        }
        if (--left == 0) write(k, at, best, place);
      }
    }
  }

  // The results at t, .., t + kTile - 1; those beyond the block are of zeros.
  FASTKIT_ALWAYS_INLINE void sum(int64_t t, Vec<T>* sums) const {
    const T* x = x_ + (kTile + t - from_) * kLane;
    const int64_t end = least(taps_, t + kTile);
    Vec<T> s[kTile] = {};
    for (int64_t n = 0; n < end; ++n) {
      const Vec<T> h = load(h_ + n * kLane);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) s[j] = fma<T>(h, load(x + (j - n) * kLane), s[j]);
    }
    for (int j = 0; j < kTile; ++j) sums[j] = s[j];
  }

  void write(int64_t k, int64_t cell, Vec<T> best, Places place) const {
    const int64_t row = (batch_ * p_.blocks + k) * p_.channels + first_;
    for (int c = 0; c < count_; ++c) {
      p_.maxima[(row + c) * p_.pool + cell] = best[c];
      p_.places[(row + c) * p_.pool + cell] = static_cast<int32_t>(place[c]);
    }
  }

  const PooledConvForward<T>& p_;
  const int64_t batch_, first_;  // row, first channel
  const int count_;              // channels
  const int64_t taps_;           // that reach a sample
  T *const x_, *const h_;        // rows of kLane channels
  int64_t from_ = 0;             // the sample in row kTile of x_
};

template <class T>
void forward(const PooledConvForward<T>& p, int64_t begin, int64_t end, T* room) {
  KernelScope scope;
  for (int64_t unit = begin; unit < end; ++unit) Forward<T>(p, unit, room).run();
}

template <class T>
int64_t backward_room(const PooledConv<T>& p) {
  return p.blocks == 0 ? 0 : kLanes<T> * (2 * p.blocks * p.block + p.taps);
}

// y += g x and h += g v.
template <class T>
void add_both(T g, const T* x, T* y, const T* v, T* h, int64_t count) {
  const Vec<T> factor = broadcast<T>(g);
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store(h + i, fma<T>(factor, load(x + i), load(h + i)));
    store(y + i, fma<T>(factor, load(v + i), load(y + i)));
  }
  for (; i < count; ++i) h[i] = fma_one(g, x[i], h[i]), y[i] = fma_one(g, v[i], y[i]);
}

template <class T>
void backward_unit(const PooledConvBackward<T>& p, int64_t unit, T* room) {
  const int64_t segment = unit % p.segments, first = unit / p.segments * kLanes<T>;
  const int count = static_cast<int>(least(p.channels - first, kLanes<T>));
  const int64_t time = p.blocks * p.block;
  T *const x = room, *const gx = x + count * time, *const h = gx + count * time;  // a row for each channel
  T* const gh = p.gh_parts + (segment * p.channels + first) * p.taps;
  for (int c = 0; c < count; ++c) {
    for (int64_t n = 0; n < p.taps; ++n) {
      h[c * p.taps + n] = p.h[(first + c) * p.taps + p.taps - 1 - n];
      gh[c * p.taps + n] = 0;
    }
  }
  for (int64_t b = p.batch * segment / p.segments; b < p.batch * (segment + 1) / p.segments; ++b) {
    const T* in = p.x + b * p.x_batch + first;
    for (int64_t t = 0; t < time; ++t, in += p.x_time) {
      for (int c = 0; c < count; ++c) x[c * time + t] = in[c], gx[c * time + t] = 0;
    }
    for (int c = 0; c < count; ++c) {
      for (int64_t k = 0; k < p.blocks; ++k) {
        const int64_t cells = ((b * p.blocks + k) * p.channels + first + c) * p.pool;
        for (int64_t j = 0; j < p.pool; ++j) {
          const int64_t t = k * p.block + p.places[cells + j], from = t < p.taps ? 0 : t - p.taps + 1;
          const int64_t sample = c * time + from, tap = c * p.taps + p.taps - 1 - t + from;
          add_both(p.gmaxima[cells + j], x + sample, gx + sample, h + tap, gh + tap, t - from + 1);
        }
      }
    }
    T* out = p.gx + b * p.time * p.channels + first;
    for (int64_t t = 0; t < p.time; ++t, out += p.channels) {
      for (int c = 0; c < count; ++c) out[c] = t < time ? gx[c * time + t] : T{0};
    }
  }
}

template <class T>
void backward(const PooledConvBackward<T>& p, int64_t begin, int64_t end, T* room) {
  KernelScope scope;
  for (int64_t unit = begin; unit < end; ++unit) backward_unit(p, unit, room);
}

template <class T>
void finish(const PooledConvBackward<T>& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t n = 0; n < p.taps; ++n) {
      T sum = 0;
      for (int64_t s = 0; s < p.segments; ++s) sum += p.gh_parts[(s * p.channels + c) * p.taps + p.taps - 1 - n];
      p.gh[c * p.taps + n] = sum;
    }
  }
}

template <class T>
constexpr PooledConvFunctions<T> kFunctions = {groups_of<T>, forward_room<T>, backward_room<T>,
                                               forward<T>,   backward<T>,     finish<T>};

}  // namespace

const PooledConvKernels pooled_conv_kernels = {kFunctions<float>, kFunctions<double>};

}  // namespace fastkit::FASTKIT_ISA
