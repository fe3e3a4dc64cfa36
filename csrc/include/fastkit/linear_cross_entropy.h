// Kernel interface of linear_cross_entropy: what is done with a block of logits, all tokens of some neighbouring
// classes, between the products that give it and those that take its gradient.
//
//   z = logit, or softcap tanh(logit / softcap)
//   sums:      of each token, over its blocks: the maximum m of z, the sum of e^(z - m), the target's z, the sum of w z
//   gradient:  dz = a e^(z - lse) - b [class is the target] - c w, times the slope of z where there is a softcap
//
// w are the class weights. A block is read once or twice by each kernel, from a cache that the product before has left
// it in.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

template <class T>
struct LogitsBlock {
  int64_t columns = 0;                // classes first .. first + columns - 1
  int64_t first = 0;
  const T* logits = nullptr;          // (tokens, columns), rows `stride` apart
  int64_t stride = 0;
  const int64_t* target = nullptr;    // (tokens); of any value: the block may not have it
  T softcap = 0;                      // 0: none
  const T* class_weight = nullptr;    // (columns), of this block; null: 1 each
};

template <class T>
struct CrossEntropySums : LogitsBlock<T> {
  T* state = nullptr;   // (tokens, 4), of the blocks before; -inf, 0, any, 0 at first
  bool smooths = false; // whether the fourth is wanted
};

template <class T>
struct CrossEntropyGradient : LogitsBlock<T> {
  const T* lse = nullptr;           // (tokens)
  const T* coefficients = nullptr;  // (tokens, 3): a, b, c; where all are 0, the row is
  T* dz = nullptr;                  // (tokens, columns), rows dz_stride apart; it may be the logits
  int64_t dz_stride = 0;
};

template <class T>
struct CrossEntropyFunctions {  // for tokens [begin, end)
  void (*sums)(const CrossEntropySums<T>&, int64_t begin, int64_t end);
  void (*gradient)(const CrossEntropyGradient<T>&, int64_t begin, int64_t end);
};

struct LinearCrossEntropyKernels {
  CrossEntropyFunctions<float> f32;
  CrossEntropyFunctions<double> f64;
};
FASTKIT_TABLE(LinearCrossEntropyKernels, linear_cross_entropy_kernels)

}  // namespace fastkit
