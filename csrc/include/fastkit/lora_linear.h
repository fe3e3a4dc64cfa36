// Kernel interface of lora_linear: the low-rank part beside a frozen linear layer, and its gradients.
//
//   h = x A'^T,  y += scale h B^T,  A' = mask * A
//   gh = scale gy B,  gx += gh A',  gA = mask * gh^T x,  gB = scale gy^T h,  gbias = sum of gy over the tokens
//
// The tokens are cut into segments that threads share. A call is begin(p), which writes A' and B in the order in which
// the kernels read them, then run(p, ..) for all segments, then finish(p, ..) for all tiles, which adds up what
// segments have summed. E is the element type of activations, T = Arithmetic<E> that of A, B, h and their gradients.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

namespace fastkit {

// A (tokens, columns) array whose columns have stride 1.
template <class E>
struct Rows {
  E* data = nullptr;
  int64_t stride = 0;

  FASTKIT_ALWAYS_INLINE E* row(int64_t token) const { return data + token * stride; }
};

template <class E>
struct LoraLinear {
  using T = Arithmetic<E>;

  int64_t tokens = 0, columns = 0, outputs = 0, rank = 0;
  int64_t segments = 1;
  T scale = 1;
  const T* a = nullptr;        // dense (rank, columns)
  const bool* mask = nullptr;  // dense (rank, columns), true where a is kept; null: everywhere
  const T* b = nullptr;        // dense (outputs, rank)
  T* room = nullptr;           // of as many T as room(p) says
};

template <class E>
struct LoraLinearForward : LoraLinear<E> {
  using T = Arithmetic<E>;
  Rows<const E> x;              // what A is applied to
  Rows<const E> observed;       // what the statistic is of: x or, where x has gone through dropout, x before it
  Rows<E> y;                    // what the frozen layer gave
  T* h = nullptr;               // dense (tokens, rank)
  float* square_sum = nullptr;  // (columns), of the columns of `observed`; null: not wanted
};

template <class E>
struct LoraLinearBackward : LoraLinear<E> {
  using T = Arithmetic<E>;
  Rows<const E> gy, x;
  const T* h = nullptr;
  Rows<E> gx;         // null data: not wanted
  bool adds = false;  // to what gx holds
  T* ga = nullptr;    // dense, shaped like a; null, with gb: not wanted
  T* gb = nullptr;    // dense, shaped like b
  T* gbias = nullptr; // (outputs); null: not wanted
};

template <class Problem>
struct LoraLinearPass {
  int64_t (*room)(const Problem&);
  void (*begin)(const Problem&);
  void (*run)(const Problem&, int64_t begin, int64_t end);  // segments [begin, end)
  int64_t (*tiles)(const Problem&);
  void (*finish)(const Problem&, int64_t begin, int64_t end);  // tiles [begin, end)
};

template <class E>
struct LoraLinearFunctions {
  LoraLinearPass<LoraLinearForward<E>> forward;
  LoraLinearPass<LoraLinearBackward<E>> backward;
};

using LoraLinearKernels = OfEachElement<LoraLinearFunctions>;
FASTKIT_TABLE(LoraLinearKernels, lora_linear_kernels)

}  // namespace fastkit
