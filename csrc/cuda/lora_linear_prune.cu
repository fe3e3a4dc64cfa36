// The pruning of lora_linear's A on the GPU: launches the warps of fastkit/lora_linear_prune_warps.h, where the
// algorithm is.
#include "common/launch.cuh"
#include "fastkit/lora_linear_prune_cuda.h"
#include "fastkit/lora_linear_prune_warps.h"

namespace fastkit {

template <class E>
const char* prune_rows_cuda(const PruneMatrix<E>* matrices, int64_t count, void* stream) {
  return launched(stream, {}, [&](CudaStream& on) { lora_linear_warps::prune_rows(matrices, count, on); });
}

template const char* prune_rows_cuda(const PruneMatrix<float>*, int64_t, void*);
template const char* prune_rows_cuda(const PruneMatrix<double>*, int64_t, void*);
template const char* prune_rows_cuda(const PruneMatrix<BFloat16>*, int64_t, void*);
template const char* prune_rows_cuda(const PruneMatrix<Half>*, int64_t, void*);

}  // namespace fastkit
