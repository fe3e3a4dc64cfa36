// The launcher of the row pruning. Apart from fastkit/lora_linear_prune.h, which every ISA compiles.
#pragma once

#include "fastkit/lora_linear_prune.h"

namespace fastkit {

// On the GPU, where what the matrices point to is; the table of them itself is on the host, and read before this
// returns. Null, or what CUDA says against it.
template <class E>
const char* prune_rows_cuda(const PruneMatrix<E>* matrices, int64_t count, void* stream);

}  // namespace fastkit
