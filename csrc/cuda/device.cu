// The CUDA side of the library's build facts. The runtime is linked statically, so that one library loads with
// and without a driver.
#include <cuda_runtime_api.h>

#include "fastkit/device.h"

namespace fastkit {

std::string cuda_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);  // of the runtime linked in; needs no driver
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace fastkit
