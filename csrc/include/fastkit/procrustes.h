// Kernel interface of polar: the orthogonal factor of a matrix, by a schedule of odd functions of its singular values.
//
// E is float or double. A call works on one matrix, and shares its work by what it is given as `parallel`.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"
#include "fastkit/parallel.h"

namespace fastkit {

struct PolarSchedule {
  const double* rationals = nullptr;  // (rational_count, 3): of x (a + b x^2) / (1 + c x^2)
  int64_t rational_count = 0;
  const double* quintics = nullptr;  // (quintic_count, 3): of x (c0 + c1 x^2 + c2 x^4), after the rationals
  int64_t quintic_count = 0;
  double tolerance = 0;  // W is orthogonal where no element of W^T W - 1 is larger
};

template <class T>
struct PolarMatrix {
  const T* m = nullptr;  // dense (rows, columns), rows >= columns
  T* w = nullptr;        // likewise
  int64_t rows = 0, columns = 0;
  T* room = nullptr;  // of as many T as room(rows, columns) says
};

template <class T>
struct PolarFunctions {
  int64_t (*room)(int64_t rows, int64_t columns);
  bool (*factor)(const PolarMatrix<T>&, const PolarSchedule&, ParallelRanges parallel);  // whether W is orthogonal
};

struct PolarKernels {
  PolarFunctions<float> f32;
  PolarFunctions<double> f64;
};
FASTKIT_TABLE(PolarKernels, polar_kernels)

}  // namespace fastkit
