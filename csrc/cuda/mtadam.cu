// mtadam on the GPU: launches the warps of fastkit/mtadam_warps.h, where the algorithm is.
#include "common/launch.cuh"
#include "fastkit/mtadam_cuda.h"
#include "fastkit/mtadam_warps.h"

namespace fastkit {

template <class E>
const char* mtadam_update_cuda(const MTAdam<E>& call, void* stream, const CudaMemory& memory) {
  return launched(stream, memory, [&](CudaStream& on) { mtadam_warps::update(call, on); });
}

template <class E>
const char* mtadam_square_sums_cuda(const MTAdam<E>& call, double* square_sums, void* stream,
                                    const CudaMemory& memory) {
  return launched(stream, memory, [&](CudaStream& on) { mtadam_warps::square_sums(call, square_sums, on); });
}

#define FASTKIT_INSTANTIATE(E)                                                        \
  template const char* mtadam_update_cuda(const MTAdam<E>&, void*, const CudaMemory&); \
  template const char* mtadam_square_sums_cuda(const MTAdam<E>&, double*, void*, const CudaMemory&);
FASTKIT_INSTANTIATE(float)
FASTKIT_INSTANTIATE(double)
FASTKIT_INSTANTIATE(BFloat16)
FASTKIT_INSTANTIATE(Half)

}  // namespace fastkit
