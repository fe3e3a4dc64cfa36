// Kernel interface of moments: count, mean and scatter of weighted rows.
//
//   count = sum of w,  mean = sum of w x / count,  scatter = sum of w (x - mean) (x - mean)^T
//
// The rows are cut into segments, the panels of columns of the scatter into groups; a unit, which a thread takes, is
// a group of a segment. A call is run(p, ..) for all units, then finish(p, ..) for all panels, which merges the
// segments. E is the element type of the rows, T = Arithmetic<E> that of the weights and the results.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

namespace fastkit {

template <class E>
struct Moments {
  using T = Arithmetic<E>;

  int64_t rows = 0, columns = 0;
  int64_t segments = 1, groups = 1;
  const E* x = nullptr;        // its columns have stride 1
  int64_t stride = 0;          // of its rows
  const T* weights = nullptr;  // dense (rows); null: all 1
  double* room = nullptr;      // on a cache line, of as many as room(p) says
  int64_t* refused = nullptr;  // (segments groups), -1; becomes the first row whose weight is negative or not finite
  double* count = nullptr;
  T* mean = nullptr;     // (columns)
  T* scatter = nullptr;  // dense (columns, columns)

  FASTKIT_ALWAYS_INLINE int64_t units() const { return segments * groups; }
};

template <class E>
struct MomentsFunctions {
  int64_t (*panels)(const Moments<E>&);  // of columns: as many groups at most
  int64_t (*room)(const Moments<E>&);
  void (*run)(const Moments<E>&, int64_t begin, int64_t end);     // units [begin, end)
  void (*finish)(const Moments<E>&, int64_t begin, int64_t end);  // panels [begin, end)
};

using MomentsKernels = OfEachElement<MomentsFunctions>;
FASTKIT_TABLE(MomentsKernels, moments_kernels)

}  // namespace fastkit
