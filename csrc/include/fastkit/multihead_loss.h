// Kernel interface of multihead_loss, of H heads of C classes on B rows of D features.
//
//   z = x weight^T + bias
//   single label   loss = sum over rows of  a lse - b z[target] - c sum w z,   dz = a softmax(z) - b [target] - c w
//   multi label    loss = scale sum of  w (softplus(z) - wanted z),             dz = scale w (sigmoid(z) - wanted)
//   regression     loss = scale sum of  (z - wanted)^2,                         dz = 2 scale (z - wanted)
//
// w are the class weights; a, b and c of a row, which all heads share, have what the losses are divided by in them. Of a
// head, the rows of the batch are neighbours, and so lie across the lanes of a vector, whatever the number of classes.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/parallel.h"

namespace fastkit {

enum class HeadProblem { single_label, multi_label, regression };

template <class T>
struct Multihead {
  int64_t heads = 0, classes = 0, rows = 0, columns = 0;
  HeadProblem problem = HeadProblem::single_label;
  const T* x = nullptr;             // (rows, columns), x_stride from row to row
  int64_t x_stride = 0;
  const T* weight = nullptr;        // (heads, classes, columns)
  const int64_t* target = nullptr;  // (rows), of a single label; what x has where it is ignore_index counts not
  int64_t ignore_index = 0;
};

template <class T>
struct MultiheadForward : Multihead<T> {
  const T* bias = nullptr;          // (heads, classes)
  const T* wanted = nullptr;        // (classes, rows), of the other two
  const T* class_weight = nullptr;  // (classes); null: 1 each
  double label_smoothing = 0;
  bool gradient = false;
  T* z = nullptr;              // (heads, classes, rows); where a gradient is wanted, dz takes its place
  T* loss = nullptr;           // (heads)
  int64_t* correct = nullptr;  // (heads)
  int64_t* count = nullptr;    // (): rows that count, of several labels pairs of row and class
  T* room = nullptr;           // as many numbers as room() says, from a cache line on
};

template <class T>
struct MultiheadBackward : Multihead<T> {
  const T* g_loss = nullptr;  // (heads)
  const T* dz = nullptr;      // (heads, classes, rows)
  T* g_x = nullptr;           // (rows, columns); null: not wanted, likewise the others
  T* g_weight = nullptr;      // (heads, classes, columns)
  T* g_bias = nullptr;        // (heads, classes)
};

template <class T>
struct MultiheadFunctions {
  int64_t (*room)(const MultiheadForward<T>&);
  void (*forward)(const MultiheadForward<T>&, ParallelRanges);
  void (*backward)(const MultiheadBackward<T>&, ParallelRanges);
};

struct MultiheadLossKernels {
  MultiheadFunctions<float> f32;
  MultiheadFunctions<double> f64;
};
FASTKIT_TABLE(MultiheadLossKernels, multihead_loss_kernels)

}  // namespace fastkit
