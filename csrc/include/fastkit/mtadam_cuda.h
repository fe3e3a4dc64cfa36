// The launchers of mtadam. Apart from fastkit/mtadam.h, which every ISA compiles.
#pragma once

#include <functional>

#include "fastkit/mtadam.h"

namespace fastkit {

// On the GPU, where all is but the lists of tensors and the ranks, which are read before this returns. Nothing waits
// for the device. `memory` gives memory that lives until the stream's work is done. Null, or what CUDA says against it.
template <class E>
const char* mtadam_update_cuda(const MTAdam<E>& call, void* stream,
                               const std::function<void*(int64_t bytes)>& memory);

// The square sums of call.tensors' gradients, dense (count, folded).
template <class E>
const char* mtadam_square_sums_cuda(const MTAdam<E>& call, double* square_sums, void* stream,
                                    const std::function<void*(int64_t bytes)>& memory);

}  // namespace fastkit
