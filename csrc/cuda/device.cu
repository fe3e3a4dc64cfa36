// What the library knows of CUDA: the runtime that it was built with, and the driver that it finds. The runtime is
// linked statically, so that one library loads with and without a driver; neither question makes a context.
#include <cuda_runtime_api.h>

#include "fastkit/device.h"

namespace fastkit {

namespace {

std::string dotted(int version) {  // 13000 is 13.0
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string cuda_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);  // needs no driver
  return dotted(version);
}

std::string cuda_driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);  // 0 without a driver
  return version == 0 ? "" : dotted(version);
}

}  // namespace fastkit
