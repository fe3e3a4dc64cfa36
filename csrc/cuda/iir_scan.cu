// iir_scan on the GPU: launches the warps of fastkit/iir_scan_warps*.h, where the algorithm is.
#include "common/launch.cuh"
#include "fastkit/iir_scan_cuda.h"
#include "fastkit/iir_scan_warps_calls.h"
#include "fastkit/iir_scan_warps_packed.h"

namespace fastkit {

template <class E>
const char* iir_scan_forward_cuda(const IirScanForward<E>& p, void* stream, const CudaMemory& memory) {
  return launched(stream, memory, [&](CudaStream& on) { iir_scan_warps::forward<E>(p, on); });
}

template <class E>
const char* iir_scan_backward_cuda(const IirScanBackward<E>& p, void* stream, const CudaMemory& memory) {
  return launched(stream, memory, [&](CudaStream& on) { iir_scan_warps::backward<E>(p, on); });
}

template <class Index>
const char* iir_scan_unpack_cuda(const Index* cu_seqlens, int64_t sequences, int64_t total, int64_t chunk,
                                 bool one_chunk, int64_t* offsets, int64_t* first_chunks, void* stream) {
  using iir_scan_warps::Unpack;
  return launched(stream, {}, [&](CudaStream& on) {
    on.run(Unpack<Index>{cu_seqlens, sequences, total, chunk, one_chunk, offsets, first_chunks}, 1);
  });
}

#define FASTKIT_INSTANTIATE(E)                                                                             \
  template const char* iir_scan_forward_cuda(const IirScanForward<E>&, void*, const CudaMemory&);          \
  template const char* iir_scan_backward_cuda(const IirScanBackward<E>&, void*, const CudaMemory&);
FASTKIT_INSTANTIATE(float)
FASTKIT_INSTANTIATE(double)
FASTKIT_INSTANTIATE(BFloat16)
FASTKIT_INSTANTIATE(Half)
template const char* iir_scan_unpack_cuda(const int32_t*, int64_t, int64_t, int64_t, bool, int64_t*, int64_t*, void*);
template const char* iir_scan_unpack_cuda(const int64_t*, int64_t, int64_t, int64_t, bool, int64_t*, int64_t*, void*);

}  // namespace fastkit
