// The launcher of the row pruning. It returns null, or what CUDA says against the launch.
#pragma once

#include "fastkit/lora_linear_prune.h"

namespace fastkit {

// On the GPU, where what the matrices point to is; the table of them itself is on the host, and read before this
// returns.
template <class E>
const char* prune_rows_cuda(const PruneMatrix<E>* matrices, int64_t count, void* stream);

}  // namespace fastkit
