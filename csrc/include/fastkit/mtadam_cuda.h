// The launchers of mtadam. They return null, or what CUDA says against the launch.
#pragma once

#include "fastkit/cuda_memory.h"
#include "fastkit/mtadam.h"

namespace fastkit {

// On the GPU, where all is but the lists of tensors and the ranks, which are read before this returns. Nothing waits
// for the device.
template <class E>
const char* mtadam_update_cuda(const MTAdam<E>& call, void* stream, const CudaMemory& memory);

// The square sums of call.tensors' gradients, dense (count, folded).
template <class E>
const char* mtadam_square_sums_cuda(const MTAdam<E>& call, double* square_sums, void* stream, const CudaMemory& memory);

}  // namespace fastkit
