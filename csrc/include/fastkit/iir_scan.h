// Kernel interface of iir_scan: what a call is, and the table of functions that each ISA provides.
//
//   y[t] = b0 x[t] + b1 x[t-1] + b2 x[t-2] - a1 y[t-1] - a2 y[t-2],   (a, b) those of chunk t / chunk
//
// A call is cut into units that threads share: 64 bytes' worth of rows (time has stride 1), or a block of
// channels of one batch entry (channels have stride 1). Units are independent; each walks all of time.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

// A (B, C, T) array; strides in elements.
template <class T>
struct Signal {
  T* data = nullptr;
  int64_t batch = 0, channel = 0, time = 0;

  FASTKIT_ALWAYS_INLINE T* at(int64_t b, int64_t c) const { return data + b * batch + c * channel; }
};

// A (B, C, K, taps) array of coefficients; strides in elements, 0 where the array is broadcast.
template <class T>
struct Coefficients {
  const T* data = nullptr;
  int64_t batch = 0, channel = 0, chunk = 0, tap = 0;

  FASTKIT_ALWAYS_INLINE const T* at(int64_t b, int64_t c) const { return data + b * batch + c * channel; }
};

template <class T>
struct IirScan {
  int64_t batch = 0, channels = 0, time = 0;
  int64_t chunk = 0, chunks = 0;  // chunks = ceil(time / chunk)
  bool carry = true;              // false: x and y before a chunk's start count as zero
  bool channels_last = false;     // the axis of stride 1 in every signal: channels, else time
  bool stream = false;            // results go past the caches
  int64_t block = 0;              // channels of a unit when channels_last, <= kIirScanBlock
  Coefficients<T> a, b;           // b.data null: b = (1, 0, 0)
  Signal<const T> x;
};

// The most channels that a unit may have: 1 KiB of a row.
template <class T>
inline constexpr int kIirScanBlock = 1024 / static_cast<int>(sizeof(T));

template <class T>
struct IirScanForward : IirScan<T> {
  Signal<T> y;
};

// With l = dL/du, u the numerator's output: gx = dL/dx, and per row and chunk ga = -sum l[t] y[t-i],
// gb = sum l[t] x[t-i]. Null results are not computed, and what only they need is not read.
template <class T>
struct IirScanBackward : IirScan<T> {
  Signal<const T> gy, y;
  Signal<T> gx;
  T* ga = nullptr;  // dense (B, C, K, 2)
  T* gb = nullptr;  // dense (B, C, K, 3)
};

template <class T>
struct IirScanFunctions {
  int64_t (*units)(const IirScan<T>&);
  void (*forward)(const IirScanForward<T>&, int64_t begin, int64_t end);  // units [begin, end)
  void (*backward)(const IirScanBackward<T>&, int64_t begin, int64_t end);
};

struct IirScanKernels {
  IirScanFunctions<float> f32;
  IirScanFunctions<double> f64;

  template <class T>
  FASTKIT_ALWAYS_INLINE const IirScanFunctions<T>& of() const {
    if constexpr (sizeof(T) == 4) {
      return f32;
    } else {
      return f64;
    }
  }
};

FASTKIT_TABLE(IirScanKernels, iir_scan_kernels)

}  // namespace fastkit
