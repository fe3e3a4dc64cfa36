// The parts of iir_scan's CPU kernels, of the ISA that this file is being compiled for.
#pragma once

#include "fastkit/iir_scan.h"

namespace fastkit::FASTKIT_ISA {

// One filter, whose chunks are no shorter than kShortChunk, or of one sample:
extern const IirScanKernels iir_scan_rows;      // time has stride 1
extern const IirScanKernels iir_scan_channels;  // channels have stride 1
extern const IirScanKernels iir_scan_time;      // time has stride 1, few rows: one row at a time, cut into the lanes
extern const IirScanKernels iir_scan_samples;   // time has stride 1, chunks of one sample, carried on
extern const IirScanKernels iir_scan_bank;  // banks of filters; channels have stride 1, chunks as for one filter
// Filters one after another, time has stride 1, few rows: iir_scan_time over blocks of time.
extern const IirScanKernels iir_scan_cascade;
// Anything, either stride: banks, cascades, coefficients that change every few samples.
extern const IirScanKernels iir_scan_tiles;

// body(Flag<flag>{}): what depends on the flag is decided once, outside of the loops.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class Body>
FASTKIT_ALWAYS_INLINE void with_flag(bool flag, Body&& body) {
  if (flag) {
    body(Flag<true>{});
  } else {
    body(Flag<false>{});
  }
}

inline constexpr int64_t kShortChunk = 16;
inline constexpr int64_t kTimeSplit = 128;  // the least time, and chunk, that iir_scan_time takes

}  // namespace fastkit::FASTKIT_ISA
