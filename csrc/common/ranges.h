// The two ways in which a kernel that shares its work is called: with all threads, and with this one alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "fastkit/parallel.h"

namespace fastkit {

inline void in_parallel(int64_t grain, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
inline void in_order(int64_t, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  body(context, 0, tasks);
}

}  // namespace fastkit
