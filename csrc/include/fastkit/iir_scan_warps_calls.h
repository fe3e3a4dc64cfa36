// iir_scan's calls on the GPU: which walks, over what segments, one after the other. Stream: run(body, units),
// T* allocate<T>(count), warps(): how many fill the GPU.
#pragma once

#include "fastkit/iir_scan_warps_gradients.h"
#include "fastkit/iir_scan_warps_walks.h"

namespace fastkit::iir_scan_warps {

// Of a walk's signals, whether teams can walk their tiles.
template <class E, bool kReverse>
bool fits_tiles(const Walk<E, kReverse>& w) {
  return fits_runs(w.p) && fits_tiles(w.p, w.in) && fits_tiles(w.p, w.out);
}
template <class E>
int64_t warps_of_tiles(const IirScan<E>& p) {
  return p.channels_last ? Tiles<E, false, true>::groups(p) * kRows<E, true> : Tiles<E, false, false>::groups(p);
}

// Whether `warps`, one to a row or to a group of rows, are too few. Cut rows are read twice: not where there are a
// quarter of the warps that fill the GPU, which have loads enough under way.
template <class Stream>
bool too_few(int64_t warps, Stream& stream) {
  return warps > 0 && warps < stream.warps() / 4;
}

// Into how many segments the rows of a walk are cut.
template <class E, bool kReverse, class Stream>
void cut(Walk<E, kReverse>& w, bool tiles, Stream& stream) {
  const IirScan<E>& p = w.p;
  const int64_t warps = tiles ? warps_of_tiles(p) : w.groups(p), time = p.time > 0 ? p.time : 1;
  const int64_t tile = (p.channels_last && !tiles ? 4 : kWarpLanes) * kRun<Arithmetic<E>>;
  w.segments = 1, w.length = time;
  if (too_few(warps, stream) && time > tile) {
    const int64_t wanted = stream.warps() / warps + 1;
    w.segments = wanted < kSegments ? wanted : kSegments;
    w.length = ((time + w.segments - 1) / w.segments + tile - 1) / tile * tile;
    if (!p.carry && p.chunk <= w.length) w.length = (w.length + p.chunk - 1) / p.chunk * p.chunk;
    w.segments = (time + w.length - 1) / w.length;
  }
  const bool whole_chunks = !kReverse || (p.offsets == nullptr && time % p.chunk == 0);
  const bool apart = !p.carry && w.length % p.chunk == 0 && whole_chunks;
  const int64_t count = p.filters * w.segments * p.batch * p.channels;
  if (w.segments > 1 || !tiles) w.states = stream.template allocate<Arithmetic<E>>(2 * count);
  if (w.segments > 1 && !apart) w.maps = stream.template allocate<Map>(count);
}

template <class E, bool kReverse, class Stream>
void walk(Walk<E, kReverse> w, Stream& stream) {
  const bool tiles = fits_tiles(w);
  cut(w, tiles, stream);
  if (tiles && w.p.channels_last) return walk_tiles<E, kReverse, true>(w, stream);
  if (tiles) return walk_tiles<E, kReverse, false>(w, stream);
  using Reduce = Segments<E, kReverse, true>;
  using Apply = Segments<E, kReverse, false>;
  if (w.maps != nullptr) stream.run(Reduce{w}, Reduce::units(w));
  stream.run(Enter<E, kReverse>{w}, Enter<E, kReverse>::units(w));
  stream.run(Apply{w}, Apply::units(w));
}

template <class E, class Stream>
void forward(const IirScanForward<E>& p, Stream& stream) {
  walk<E, false>({p, p.x, p.y, p.state_y, p.end_y, 0, p.filters}, stream);
  if (p.end_x != nullptr) stream.run(EndOfX<E>{p, p.end_x}, EndOfX<E>::units(p));
}

// Memory for a signal in float arithmetic, laid out like the call's.
template <class E, class Stream>
Signal<Arithmetic<E>> like(const IirScan<E>& p, Stream& stream) {
  const int64_t batch = p.offsets == nullptr ? p.batch : 1;
  auto* data = stream.template allocate<Arithmetic<E>>(batch * p.channels * p.time);
  const int64_t whole = p.offsets == nullptr ? p.channels * p.time : 0;
  if (p.channels_last) return {data, whole, 1, p.channels};
  return {data, whole, p.time, 1};
}

// Whether one pass gives all that is wanted.
template <class E, class Stream>
bool fits_backward_tiles(const IirScanBackward<E>& p, Stream& stream) {
  const auto fits = [&](const auto& s) { return s.data == nullptr || fits_tiles(p, s); };
  const bool of_signals = fits_tiles(p, p.gy) && fits(p.gx) && (p.ga == nullptr || (fits(p.x) && fits(p.y)));
  const bool of_states = p.gend_x != nullptr || p.gstate_x != nullptr;
  return fits_runs(p) && of_signals && !of_states && !too_few(warps_of_tiles(p), stream);
}

template <class E, class Stream>
void backward(const IirScanBackward<E>& p, Stream& stream) {
  using T = Arithmetic<E>;
  if (fits_backward_tiles(p, stream)) {
    if (p.channels_last) return stream.run(BackwardTiles<E, true>{p}, BackwardTiles<E, true>::units(p));
    return stream.run(BackwardTiles<E, false>{p}, BackwardTiles<E, false>::units(p));
  }
  IirScan<E> one = p;
  one.filters = 1;
  const Signal<T> l = like<E>(p, stream);
  const Signal<const T> l_in{l.data, l.batch, l.channel, l.time};
  ReadOff<E> read{p, l_in, p.y};
  Signal<T> y{};
  if constexpr (IsSame<E, T>) {
    if (p.filters > 1) y = like<E>(p, stream), read.y = {y.data, y.batch, y.channel, y.time};
  }
  const int64_t longest = p.chunk < p.time ? p.chunk : p.time, of_piece = ReadOff<E>::piece_length(p);
  read.pieces = longest > of_piece ? (longest + of_piece - 1) / of_piece : 1;
  if (p.ga != nullptr) read.sums = stream.template allocate<T>(read.pieces * Finish<E>::count(p) * 5);
  for (int64_t f = 0; f < p.filters; ++f) {
    if constexpr (IsSame<E, T>) {
      if (p.filters > 1 && p.ga != nullptr) walk<E, false>({one, p.x, y, p.state_y, nullptr, f, p.filters}, stream);
    }
    walk<E, true>({one, p.gy, l, p.gend_y, p.gstate_y, f, p.filters}, stream);
    read.filter = f, read.adds = f > 0;
    if (p.gx.data != nullptr || p.ga != nullptr) stream.run(read, ReadOff<E>::units(read));
    const Finish<E> finish{p, read.sums, f, read.pieces};
    if (p.ga != nullptr) stream.run(finish, Finish<E>::units(finish));
    if (p.gstate_x != nullptr) stream.run(StateOfX<E>{p, l_in, f}, StateOfX<E>::units(p));
  }
}

}  // namespace fastkit::iir_scan_warps
