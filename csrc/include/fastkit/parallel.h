// How a kernel that works on one thing at a time shares its work between threads.
#pragma once

#include <cstdint>

namespace fastkit {

// run(grain, tasks, body, context) calls body(context, begin, end) for ranges of at least `grain` tasks, and returns
// when all are done.
using ParallelRanges = void (*)(int64_t grain, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace fastkit
