// Kernel interface of multihead_loss: what is done with the logits of many heads, between the product that gives them
// and those that take their gradient.
//
//   single label   loss = sum over rows of  a lse - b z[target] - c sum w z,   dz = a softmax(z) - b [target] - c w
//   multi label    loss = scale sum of  w (softplus(z) - wanted z),             dz = scale w (sigmoid(z) - wanted)
//   regression     loss = scale sum of  (z - wanted)^2,                         dz = 2 scale (z - wanted)
//
// w are the class weights; a, b and c of a row, which all heads share, have what the losses are divided by in them. Of a
// head, the rows of the batch are neighbours, and so lie across the lanes of a vector, whatever the number of classes.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

inline constexpr int64_t kIgnoredTarget = INT64_MIN;  // of a row that does not count

template <class T>
struct MultiheadRows {
  int64_t classes = 0, rows = 0;
  T* z = nullptr;                    // (heads, classes, rows); where a gradient is wanted, dz takes its place
  const int64_t* target = nullptr;   // (rows), of a single label: of any value, or kIgnoredTarget
  const T* coefficients = nullptr;   // (3, rows), of a single label: a, b, c
  const T* wanted = nullptr;         // (classes, rows), of the other two
  const T* class_weight = nullptr;   // (classes); null: 1 each
  T scale = 0;                       // of the other two
  bool gradient = false;
  T* loss = nullptr;                 // (heads)
  int64_t* correct = nullptr;        // (heads)
};

template <class T>
struct MultiheadFunctions {  // for heads [begin, end)
  void (*single_label)(const MultiheadRows<T>&, int64_t begin, int64_t end);
  void (*multi_label)(const MultiheadRows<T>&, int64_t begin, int64_t end);
  void (*regression)(const MultiheadRows<T>&, int64_t begin, int64_t end);
};

struct MultiheadLossKernels {
  MultiheadFunctions<float> f32;
  MultiheadFunctions<double> f64;
};
FASTKIT_TABLE(MultiheadLossKernels, multihead_loss_kernels)

}  // namespace fastkit
