// Kernel interface of pooled_conv: a causal convolution of each channel, of which the maxima over cells are kept.
//
//   y[b,t,c] = sum over n of taps[c,n] x[b,t-n,c],   maxima[b,k,c,j] = the largest y of cell j of block k
//
// A block has `block` samples, cut into `pool` equal cells; of a row's blocks the last, which may be short, is not
// pooled. A unit of forward is a group of channels of one row of the batch; one of backward a group of channels and
// a segment of the batch, whose gradients to the taps finish() adds. E is float or double.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

template <class T>
struct PooledConv {
  int64_t batch = 0, time = 0, channels = 0;
  int64_t taps = 0;                 // 1 or more
  int64_t block = 0, pool = 0;      // pool divides block
  int64_t blocks = 0;               // that are pooled: all whole
  const T* x = nullptr;             // channels have stride 1
  int64_t x_batch = 0, x_time = 0;  // strides
  const T* h = nullptr;             // dense (channels, taps)
};

template <class T>
struct PooledConvForward : PooledConv<T> {
  T* maxima = nullptr;        // dense (batch, blocks, channels, pool)
  int32_t* places = nullptr;  // likewise: where in its block each is, of equal ones the first
};

template <class T>
struct PooledConvBackward : PooledConv<T> {
  int64_t segments = 1;             // of the batch
  const T* gmaxima = nullptr;       // dense, as above
  const int32_t* places = nullptr;  // likewise
  T* gx = nullptr;                  // dense (batch, time, channels)
  T* gh_parts = nullptr;            // dense (segments, channels, taps), taps backwards
  T* gh = nullptr;                  // dense (channels, taps)
};

template <class T>
struct PooledConvFunctions {
  int64_t (*groups)(const PooledConv<T>&);  // of channels
  int64_t (*forward_room)(const PooledConv<T>&);  // elements that a thread needs, on a cache line
  int64_t (*backward_room)(const PooledConv<T>&);
  void (*forward)(const PooledConvForward<T>&, int64_t begin, int64_t end, T* room);    // units [begin, end)
  void (*backward)(const PooledConvBackward<T>&, int64_t begin, int64_t end, T* room);  // likewise
  void (*finish)(const PooledConvBackward<T>&, int64_t begin, int64_t end);             // channels [begin, end)
};

struct PooledConvKernels {
  PooledConvFunctions<float> f32;
  PooledConvFunctions<double> f64;
};
FASTKIT_TABLE(PooledConvKernels, pooled_conv_kernels)

}  // namespace fastkit
