// The CUDA stream that PyTorch works on. The function behind it is in CUDA builds of torch alone: weak, so that one
// library loads everywhere.
#pragma once

#include <cstdint>

#include "common/check.h"

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastkit {

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  const bool found =
      aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(device, &stream) == 0;
  FASTKIT_CHECK(found, "fastkit: this torch has no CUDA stream to give; install a CUDA build of torch");
  return stream;
}

}  // namespace fastkit
