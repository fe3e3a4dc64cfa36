// icp_epoch on the GPU: launches the warps of fastkit/icp_warps.h, where the algorithm is.
#include "common/launch.cuh"
#include "fastkit/icp_cuda.h"
#include "fastkit/icp_warps.h"

namespace fastkit {

const char* icp_epoch_cuda(const ICPEpochOnGpu& call, void* stream, const CudaMemory& memory) {
  return launched(stream, memory, [&](CudaStream& on) { icp_warps::epoch(call, on); });
}

}  // namespace fastkit
