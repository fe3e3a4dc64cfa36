// Kernel interface of orthogonality_penalty, of K heads of C classes of D features.
//
//   sums[c, h] = sum over g > h of rho(<rows[h, c], rows[g, c]>)
//   gradient[h, c] = sum over g != h of rho'(<rows[h, c], rows[g, c]>) rows[g, c]
//
//   rho(t) = |t|,   t^2,   or of Huber  t^2 / (2 width) for |t| <= width, |t| - width / 2 beyond
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/parallel.h"

namespace fastkit {

enum class PenaltyKind { abs, squared, huber };

template <class T>
struct PenaltyCall {
  PenaltyKind kind = PenaltyKind::abs;
  T width = 0;
  int64_t heads = 0, classes = 0, columns = 0;
  const T* rows = nullptr;  // of head h and class c: from h of_head + c of_class on
  int64_t of_head = 0, of_class = 0;
  T* sums = nullptr;      // (classes, heads)
  T* gradient = nullptr;  // (heads, classes, columns), dense; or null
  T* room = nullptr;      // as many numbers as room() says, from a cache line on
};

template <class T>
struct PenaltyFunctions {
  int64_t (*room)(const PenaltyCall<T>&);
  void (*penalty)(const PenaltyCall<T>&, ParallelRanges);
};

struct MultiheadLossPenaltyKernels {
  PenaltyFunctions<float> f32;
  PenaltyFunctions<double> f64;
};
FASTKIT_TABLE(MultiheadLossPenaltyKernels, multihead_loss_penalty_kernels)

}  // namespace fastkit
