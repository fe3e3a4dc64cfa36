// Kernel interface of icp_epoch: one epoch of iterative closest points with two maps and a cycle.
//
//   a(i) = argmin_j |x_i - W_yx y_j|^2,  b(j) = argmin_i |y_j - W_xy x_i|^2;  then steps of Adam on
//   L = [ |y_a - W_xy x|^2 + |x_b - W_yx y|^2 + cycle_weight (|W_yx W_xy x - x|^2 + |W_xy W_yx y - y|^2) ] / 2,
//   means over a batch
//
// T is float or double. A call works on one restart, and shares its work by what it is given as `parallel`; what
// restarts have in common is prepared once.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"
#include "fastkit/parallel.h"

namespace fastkit {

template <class T>
struct ICPTable {
  const T* rows = nullptr;    // dense (count, columns)
  const T* packed = nullptr;  // of as many T as packed_size() says, aligned to 64 bytes
  int64_t count = 0;          // below 2^31
};

template <class T>
struct ICPCall {
  ICPTable<T> source, target;
  int64_t columns = 0, batch_size = 0;
  uint32_t epoch = 0;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, cycle_weight = 0;
  bool mutual_only = false;
};

template <class T>
struct ICPRestart {
  const T *w_xy = nullptr, *w_yx = nullptr;  // dense (columns, columns)
  T *next_xy = nullptr, *next_yx = nullptr;  // likewise, elsewhere
  uint64_t seed = 0;
  int64_t *nearest_target = nullptr, *nearest_source = nullptr;  // read where `given`, else written
  bool given = false;
  T* cost = nullptr;
  int64_t* mutual = nullptr;
  char* room = nullptr;  // of as many bytes as room(call) says, aligned to 64
};

template <class T>
struct ICPFunctions {
  int64_t (*packed_size)(int64_t rows, int64_t columns);
  void (*pack)(const ICPTable<T>&, int64_t columns, T* to);
  int64_t (*room)(const ICPCall<T>&);
  void (*epoch)(const ICPCall<T>&, const ICPRestart<T>&, ParallelRanges parallel);
};

struct ICPKernels {
  ICPFunctions<float> f32;
  ICPFunctions<double> f64;
};
FASTKIT_TABLE(ICPKernels, icp_kernels)

}  // namespace fastkit
