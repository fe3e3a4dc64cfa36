// iir_scan of filters one after another where time has stride 1 and rows are fewer than lanes: long signals.
//
// What       forward and backward of second-order recursions in series, one set of coefficients for all of time.
// Parallel   a unit is one row. It walks time in blocks that stay in the second-level cache, with all signals between
//            the filters; iir_scan_time runs a filter over a block. Threads take different rows.
// Bytes      per fp32 sample: forward reads x, writes y (8); backward reads gy and x, writes gx (12).
// Numerics   Within a block those of iir_scan_time; from block to block states in the working precision, as a plain
//            recursion has them, and coefficient gradients in double. Half precision is raised as a block is read.
// Backward   from the last block to the first: what is between the filters again, from the states that forward left at
//            the borders; then the filters from the last to the first, each with what the block after it owes.
#define FASTKIT_HALF_VECTORS
#include <new>

#include "cpu/iir_scan_kernels.h"
#include "cpu/iir_scan_row.h"
#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int64_t kRoomBytes = int64_t{256} << 10;  // of the signals of a block
constexpr int64_t kLeastTiles = 8;                  // of a block: a call of iir_scan_time is to pay for its preparation

constexpr std::align_val_t kAlign{kLineBytes};

// What a filter has between two blocks.
template <class T>
struct Filter {
  T y[2], x[2];    // its last two results and samples, newest first
  T gy[2], gx[2];  // owed to their gradients by the block after
  double a[2], b[3];  // gradients of its coefficients so far
};

// What a thread needs for one row after another.
template <class T>
struct Room {
  const int64_t length;  // samples of a block, whole tiles
  T* const signals;      // one more than filters, and one for a gradient
  Filter<T>* const filters;

  explicit Room(int64_t count)
      : length(tiles(count + 2) * kIirScanTile),
        signals(static_cast<T*>(::operator new(sizeof(T) * pitch() * (count + 2), kAlign))),
        filters(static_cast<Filter<T>*>(::operator new(sizeof(Filter<T>) * count, kAlign))) {}
  Room(const Room&) = delete;
  ~Room() {
    ::operator delete(filters, kAlign);
    ::operator delete(signals, kAlign);
  }

  T* signal(int64_t i) const { return signals + i * pitch(); }

 private:
  static int64_t tiles(int64_t count) {
    const int64_t most = kRoomBytes / (count * kIirScanTile * static_cast<int64_t>(sizeof(T)));
    return most < kLeastTiles ? kLeastTiles : most;
  }
  int64_t pitch() const { return length + kLine<T>; }  // lines of two signals fall into different sets of a cache
};

// n samples in the type of arithmetic: where they are, or else in `to`.
template <class E>
FASTKIT_INLINE const Arithmetic<E>* raised(const E* from, int64_t n, Arithmetic<E>* to) {
  if constexpr (IsSame<E, Arithmetic<E>>) {
    return from;
  } else {
    int64_t i = 0;
    for (; i + kLanes<E> <= n; i += kLanes<E>) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = widened<E>(from[i]);
    return to;
  }
}

// Where the results of n samples go until lower() takes them to `to`: they are there already, or in `from`.
template <class E>
FASTKIT_INLINE Arithmetic<E>* target(E* to, Arithmetic<E>* from) {
  if constexpr (IsSame<E, Arithmetic<E>>) {
    return to;
  } else {
    return to == nullptr ? nullptr : from;
  }
}
template <class E>
FASTKIT_INLINE void lower(const Arithmetic<E>* from, int64_t n, E* to) {
  if constexpr (!IsSame<E, Arithmetic<E>>) {
    if (to == nullptr) return;
    int64_t i = 0;
    for (; i + kLanes<E> <= n; i += kLanes<E>) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = rounded<E>(from[i]);
  }
}

template <class E>
struct Cascade {
  using T = Arithmetic<E>;
  const IirScan<E>& p;
  const Room<T>& room;
  const Row<E> row;

  Cascade(const IirScan<E>& p, const Room<T>& room, int64_t unit)
      : p(p), room(room), row(p, unit / p.channels, unit % p.channels) {
    for (int64_t f = 0; f < p.filters; ++f) room.filters[f] = {};
  }

  int64_t samples(int64_t t) const { return p.time - t < room.length ? p.time - t : room.length; }

  // A call of iir_scan_time: filter f over n samples of a row.
  template <class Call>
  Call call(int64_t f, int64_t n, const T* x) const {
    Call call;
    call.batch = call.channels = call.chunks = 1;
    call.time = n, call.chunk = p.chunk;
    call.a = {row.point(p.a) + f * p.a.filter, 0, 0, 0, 0, p.a.tap};
    call.b = {row.point(p.b) + f * p.b.filter, 0, 0, 0, 0, p.b.tap};
    call.x = {x, 0, 0, 1};
    return call;
  }

  // From the state before the block to that after it.
  void filter(int64_t f, int64_t n, const T* x, T* y, bool stream = false) const {
    Filter<T>& state = room.filters[f];
    auto forward = call<IirScanForward<T>>(f, n, x);
    forward.stream = stream;
    forward.y = {y, 0, 0, 1};
    forward.state_y = forward.end_y = state.y, forward.state_x = forward.end_x = state.x;
    iir_scan_time.of<T>().forward(forward, 0, 1);
  }

  // Where the states of a filter at the tile of sample t lie; newest and older are `channels` apart.
  int64_t border(int64_t t, int64_t f) const {
    return ((row.batch * p.borders() + p.border(t, 0)) * p.filters + f) * 2 * p.channels + row.channel;
  }
};

template <class E>
void forward_row(const IirScanForward<E>& p, const Room<Arithmetic<E>>& room, int64_t unit) {
  using T = Arithmetic<E>;
  const Cascade<E> cascade(p, room, unit);
  const E* const x = cascade.row.point(p.x);
  E* const y = cascade.row.point(p.y);
  for (int64_t t = 0; t < p.time; t += room.length) {
    const int64_t n = cascade.samples(t);
    const T* in = raised(x + t, n, room.signal(0));
    for (int64_t f = 0; f < p.filters; ++f) {
      const bool last = f + 1 == p.filters;
      T* const between = room.signal(1 + f % 2);
      T* const out = last ? target(y + t, between) : between;
      const T* const before = room.filters[f].y;
      const auto keep = [&](int64_t i, T newest, T older) {
        T* const to = p.borders + cascade.border(t + i, f);
        to[0] = newest, to[p.channels] = older;
      };
      if (p.borders != nullptr) keep(0, before[0], before[1]);
      // A result that is read again soon is better not written past the caches.
      cascade.filter(f, n, in, out, last && p.stream && p.borders == nullptr && IsSame<E, T>);
      if (p.borders != nullptr) {
        for (int64_t i = kIirScanTile; i < n; i += kIirScanTile) keep(i, out[i - 1], out[i - 2]);
      }
      in = out;
    }
    lower(in, n, y + t);
  }
}

template <class E>
void backward_row(const IirScanBackward<E>& p, const Room<Arithmetic<E>>& room, int64_t unit) {
  using T = Arithmetic<E>;
  const Cascade<E> cascade(p, room, unit);
  const bool sums = p.ga != nullptr;
  const E *const gy = cascade.row.point(p.gy), *const x = cascade.row.point(p.x);
  E* const gx = cascade.row.point(p.gx);
  T* const gradient = room.signal(p.filters + 1);
  const int64_t blocks = (p.time + room.length - 1) / room.length;
  for (int64_t block = blocks - 1; block >= 0; --block) {
    const int64_t t = block * room.length, n = cascade.samples(t);
    const T* given = nullptr;  // to the first filter
    const auto enter = [&](int64_t f) {  // its state before the block
      Filter<T>& state = room.filters[f];
      const T* const at = p.borders + cascade.border(t, f);
      state.y[0] = at[0], state.y[1] = at[p.channels];
      for (int i = 0; i < 2; ++i) {
        state.x[i] = f > 0 ? room.filters[f - 1].y[i] : t > 0 ? widened<E>(x[t - 1 - i]) : T{};
      }
    };
    if (sums) {
      given = raised(x + t, n, room.signal(0));
      for (int64_t f = 0; f < p.filters; ++f) enter(f);
      for (int64_t f = 0; f < p.filters; ++f) {
        cascade.filter(f, n, f == 0 ? given : room.signal(f), room.signal(f + 1));
      }
      for (int64_t f = 0; f < p.filters; ++f) enter(f);
    }
    E* const to = gx == nullptr ? nullptr : gx + t;
    const T* g = raised(gy + t, n, gradient);
    for (int64_t f = p.filters - 1; f >= 0; --f) {
      Filter<T>& state = room.filters[f];
      auto call = cascade.template call<IirScanBackward<T>>(f, n, f == 0 ? given : room.signal(f));
      T* const out = f == 0 ? target(to, gradient) : gradient;
      T ga[2], gb[3];
      call.stream = f == 0 && p.stream && IsSame<E, T>;
      call.gy = {g, 0, 0, 1}, call.gx = {out, 0, 0, 1};
      call.gend_y = call.gstate_y = state.gy, call.gend_x = call.gstate_x = state.gx;
      if (sums) {
        call.y = {room.signal(f + 1), 0, 0, 1};
        if (t > 0) call.state_y = state.y, call.state_x = state.x;
        call.ga = ga, call.gb = gb;
      }
      iir_scan_time.of<T>().backward(call, 0, 1);
      for (int i = 0; sums && i < 2; ++i) state.a[i] += ga[i];
      for (int i = 0; sums && i < 3; ++i) state.b[i] += gb[i];
      g = out;
    }
    lower(gradient, n, to);
  }
  for (int64_t f = 0; sums && f < p.filters; ++f) {
    const Filter<T>& state = room.filters[f];
    for (int i = 0; i < 2; ++i) cascade.row.point(p.ga, 2 * p.filters)[2 * f + i] = static_cast<T>(state.a[i]);
    for (int i = 0; i < 3; ++i) cascade.row.point(p.gb, 3 * p.filters)[3 * f + i] = static_cast<T>(state.b[i]);
  }
}

template <class E>
int64_t units(const IirScan<E>& p) {
  return p.batch * p.channels;
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  const Room<Arithmetic<E>> room(p.filters);
  for (int64_t unit = begin; unit < end; ++unit) forward_row(p, room, unit);
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  const Room<Arithmetic<E>> room(p.filters);
  for (int64_t unit = begin; unit < end; ++unit) backward_row(p, room, unit);
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {units<E>, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_cascade = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
