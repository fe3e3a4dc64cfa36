// Kernel interface of orthogonality_penalty: a block of rows of a Gram matrix, from the diagonal to the right.
//
//   sums[r] = sum over j > r of rho(gram[r, j]);   gram[r, j] = rho'(gram[r, j]), 0 on the diagonal
//
//   rho(t) = |t|,   t^2,   or of Huber  t^2 / (2 width) for |t| <= width, |t| - width / 2 beyond
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastkit {

enum class PenaltyKind { abs, squared, huber };

template <class T>
struct PenaltyRows {
  PenaltyKind kind = PenaltyKind::abs;
  T width = 0;
  int64_t columns = 0;
  T* gram = nullptr;      // (rows, columns), dense, rows <= columns; gram[r, r] is on the diagonal
  bool gradient = false;  // whether rho' takes its place
  T* sums = nullptr;      // (rows)
};

template <class T>
using PenaltyFunction = void (*)(const PenaltyRows<T>&, int64_t begin, int64_t end);  // for rows [begin, end)

struct MultiheadLossPenaltyKernels {
  PenaltyFunction<float> f32;
  PenaltyFunction<double> f64;
};
FASTKIT_TABLE(MultiheadLossPenaltyKernels, multihead_loss_penalty_kernels)

}  // namespace fastkit
