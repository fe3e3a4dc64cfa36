// iir_scan's launchers. Apart from fastkit/iir_scan.h, which every ISA compiles and which must bring in nothing of std.
#pragma once

#include <functional>

#include "fastkit/iir_scan.h"

namespace fastkit {

// On the GPU, where p's pointers are and `offsets` too; null, or what CUDA says against it. `memory` gives what it is
// asked for until the work that has been launched is done.
using CudaMemory = std::function<void*(int64_t bytes)>;
template <class E>
const char* iir_scan_forward_cuda(const IirScanForward<E>& p, void* stream, const CudaMemory& memory);
template <class E>
const char* iir_scan_backward_cuda(const IirScanBackward<E>& p, void* stream, const CudaMemory& memory);
template <class Index>
const char* iir_scan_unpack_cuda(const Index* cu_seqlens, int64_t sequences, int64_t total, int64_t chunk,
                                 bool one_chunk, int64_t* offsets, int64_t* first_chunks, void* stream);

}  // namespace fastkit
