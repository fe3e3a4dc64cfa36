// Kernel interface of iir_scan: what a call is, and the table of functions that each ISA provides.
//
//   y[t] = sum over f of y_f[t],   y_f[t] = b0 x[t] + b1 x[t-1] + b2 x[t-2] - a1 y_f[t-1] - a2 y_f[t-2],
//   (a, b) those of filter f in chunk t / chunk
//
// A call is cut into units that threads share; units are independent. E is the element type of signals,
// T = Arithmetic<E> that of coefficients, states and arithmetic.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

namespace fastkit {

// A (B, C, T) array; strides in elements. Packed sequences: (1, C, total), with a batch stride of 0.
template <class E>
struct Signal {
  E* data = nullptr;
  int64_t batch = 0, channel = 0, time = 0;

  FASTKIT_ALWAYS_INLINE E* at(int64_t b, int64_t c) const { return data + b * batch + c * channel; }
};

// A (B, C, K, F, taps) array of coefficients; strides in elements, 0 where the array is broadcast.
template <class T>
struct Coefficients {
  const T* data = nullptr;
  int64_t batch = 0, channel = 0, chunk = 0, filter = 0, tap = 0;

  FASTKIT_ALWAYS_INLINE const T* at(int64_t b, int64_t c) const { return data + b * batch + c * channel; }
};

// Two neighbouring samples of a row, the one nearer to what follows first.
template <class T>
struct Two {
  T v1 = 0, v2 = 0;
};

// What a unit walks through: samples [begin, begin + time) of every signal, chunks [first_chunk, first_chunk +
// chunks) of every array that has one entry a chunk.
struct Span {
  int64_t begin, time, first_chunk, chunks;
};

// Samples between the states that the forward of several filters keeps for its backward, counted from a chunk's start.
inline constexpr int64_t kIirScanTile = 128;

template <class E>
struct IirScan {
  using T = Arithmetic<E>;

  int64_t batch = 0, channels = 0, time = 0;  // packed: batch counts sequences, time all their samples
  int64_t chunk = 0, chunks = 0;              // samples of a chunk; chunks of all of time
  int64_t filters = 1;
  bool cascade = false;        // filters follow one another, instead of being summed
  bool carry = true;           // false: x and y before a chunk's start count as zero, but for the state's
  bool channels_last = false;  // the axis of stride 1 in every signal: channels, else time
  bool stream = false;         // results go past the caches
  int64_t threads = 1;         // that the call is worth
  int64_t block = 0;           // channels of a unit of the channel kernels, <= kIirScanBlock
  const int64_t* offsets = nullptr;       // packed: sequence s is samples [offsets[s], offsets[s+1])
  const int64_t* first_chunks = nullptr;  // packed: the first of its chunks; first_chunks[s+1] is past its last
  Coefficients<T> a, b;                   // b.data null: b = (1, 0, 0)
  Signal<const E> x;
  const T* state_y = nullptr;  // y before the first sample, newest first, dense (batch, C, F, 2); null: zero
  const T* state_x = nullptr;  // likewise x, dense (batch, C, 2)

  FASTKIT_ALWAYS_INLINE Span span(int64_t b) const {
    if (offsets == nullptr) return {0, time, 0, chunks};
    return {offsets[b], offsets[b + 1] - offsets[b], first_chunks[b], first_chunks[b + 1] - first_chunks[b]};
  }
  // Row of (b, c) in dense arrays that have all chunks: gradients of coefficients.
  FASTKIT_ALWAYS_INLINE int64_t row(int64_t b, int64_t c) const {
    return offsets == nullptr ? b * channels + c : c;
  }
  // Of the tile that starts at sample t of all time in chunk k of all chunks: where its states lie in `borders`,
  // dense (B, borders, F, 2, C). Strictly increasing in t, so no two tiles share a place.
  FASTKIT_ALWAYS_INLINE int64_t border(int64_t t, int64_t k) const { return t / kIirScanTile + k; }
  FASTKIT_ALWAYS_INLINE int64_t borders() const { return time / kIirScanTile + chunks + 1; }
  FASTKIT_ALWAYS_INLINE int64_t border_batch(int64_t b) const { return offsets == nullptr ? b : 0; }
};

// The most channels that a unit may have: 1 KiB of a row of T.
template <class T>
inline constexpr int kIirScanBlock = 1024 / static_cast<int>(sizeof(T));

template <class E>
struct IirScanForward : IirScan<E> {
  using T = Arithmetic<E>;
  Signal<E> y;
  T* end_y = nullptr;    // the state after the last sample, shaped like state_y; null: not wanted
  T* end_x = nullptr;    // likewise
  T* borders = nullptr;  // of a bank or cascade: y_f[t-1], y_f[t-2] at every tile's start t; null: not wanted
};

// With l_f = dL/du_f, u_f the numerator's output: gx = dL/dx, and per row, chunk and filter
// ga = -sum l_f[t] y_f[t-i], gb = sum l_f[t] x[t-i]. Null results are not computed, and what only they need is not read.
template <class E>
struct IirScanBackward : IirScan<E> {
  using T = Arithmetic<E>;
  Signal<const E> gy;
  Signal<const E> y;           // of a single filter
  const T* borders = nullptr;  // of a bank; of a cascade, where coefficients have gradients
  const T* gend_y = nullptr;   // gradient of the final state; null: zero
  const T* gend_x = nullptr;
  Signal<E> gx;
  T* ga = nullptr;        // dense (B, C, K, F, 2), B = 1 when packed
  T* gb = nullptr;        // dense (B, C, K, F, 3); null without b
  T* gstate_y = nullptr;  // shaped like the states
  T* gstate_x = nullptr;
};

template <class E>
struct IirScanFunctions {
  int64_t (*units)(const IirScan<E>&);
  void (*forward)(const IirScanForward<E>&, int64_t begin, int64_t end);  // units [begin, end)
  void (*backward)(const IirScanBackward<E>&, int64_t begin, int64_t end);
};

// One step of every row: y from x and the state, and the state after it. Dense rows, (B, C) of them.
template <class E>
struct IirStep {
  using T = Arithmetic<E>;
  int64_t batch = 0, channels = 0, filters = 1;
  const E* x = nullptr;
  Coefficients<T> a, b;  // chunk is not used
  const T *state_y = nullptr, *state_x = nullptr;
  E* y = nullptr;
  T *end_y = nullptr, *end_x = nullptr;
};

template <class E>
using IirStepFunction = void (*)(const IirStep<E>&, int64_t begin, int64_t end);  // rows [begin, end)

using IirScanKernels = OfEachElement<IirScanFunctions>;
using IirStepKernels = OfEachElement<IirStepFunction>;

FASTKIT_TABLE(IirScanKernels, iir_scan_kernels)
FASTKIT_TABLE(IirStepKernels, iir_step_kernels)

}  // namespace fastkit
