// The launchers of iir_scan. They return null, or what CUDA says against the launch.
#pragma once

#include "fastkit/cuda_memory.h"
#include "fastkit/iir_scan.h"

namespace fastkit {

// On the GPU, where p's pointers are, `offsets` too.
template <class E>
const char* iir_scan_forward_cuda(const IirScanForward<E>& p, void* stream, const CudaMemory& memory);
template <class E>
const char* iir_scan_backward_cuda(const IirScanBackward<E>& p, void* stream, const CudaMemory& memory);
template <class Index>
const char* iir_scan_unpack_cuda(const Index* cu_seqlens, int64_t sequences, int64_t total, int64_t chunk,
                                 bool one_chunk, int64_t* offsets, int64_t* first_chunks, void* stream);

}  // namespace fastkit
