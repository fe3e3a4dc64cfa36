// Packed sequences of iir_scan on the GPU: a functor of a warp, like those of iir_scan_warps.h.
#pragma once

#include "common/warp.h"

namespace fastkit::iir_scan_warps {

// Where packed sequences and their chunks begin, from cu_seqlens, made to fit what there is: one warp, 32 sequences at
// a time.
template <class Index>
struct Unpack {
  const Index* cu_seqlens;
  int64_t sequences, total, chunk;
  bool one_chunk;                   // of every sequence, also of an empty one
  int64_t *offsets, *first_chunks;  // sequences + 1 each
  static constexpr int kWarps = 1;
  struct Room {};

  template <class Warp>
  FASTKIT_DEVICE void operator()(Warp& warp, int64_t, Room&) const {
    const auto larger = [](int64_t a, int64_t b) { return a < b ? b : a; };
    running(warp, offsets, larger, [&](int64_t s) {
      const int64_t at = static_cast<int64_t>(cu_seqlens[s]);
      return at < 0 ? 0 : at < total ? at : total;
    });
    const auto sum = [](int64_t a, int64_t b) { return a + b; };
    running(warp, first_chunks, sum, [&](int64_t s) {
      if (s == 0) return int64_t{0};
      return one_chunk ? 1 : (offsets[s] - offsets[s - 1] + chunk - 1) / chunk;
    });
  }

 private:
  // to[s] = value(0) combined with value(1), .. value(s).
  template <class Warp, class Combine, class Value>
  FASTKIT_DEVICE void running(Warp& warp, int64_t* to, Combine&& combine, Value&& value) const {
    for (int64_t from = 0; from <= sequences; from += kWarpLanes) {
      typename Warp::template PerLane<int64_t> v{};
      warp.each([&](int lane) {
        if (from + lane <= sequences) v[lane] = value(from + lane);
        if (lane == 0 && from > 0) v[lane] = combine(v[lane], to[from - 1]);
      });
      scan(warp, v, combine);
      warp.each([&](int lane) {
        if (from + lane <= sequences) to[from + lane] = v[lane];
      });
      warp.sync();
    }
  }
};

}  // namespace fastkit::iir_scan_warps
