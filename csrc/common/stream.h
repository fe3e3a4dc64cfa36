// The CUDA device and stream that PyTorch works on, and memory for what runs there. The function behind the stream is
// in CUDA builds of torch alone: weak, so that one library loads everywhere.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastkit {

// Makes t's device the current one, where it is a GPU.
inline std::optional<torch::stable::accelerator::DeviceGuard> device_guard(const torch::stable::Tensor& t) {
  using Guard = torch::stable::accelerator::DeviceGuard;
  return t.is_cuda() ? std::optional<Guard>(std::in_place, t.get_device_index()) : std::nullopt;
}

inline void* current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  const bool found = aoti_torch_get_current_cuda_stream != nullptr &&
                     aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0;
  FASTKIT_CHECK(found, "fastkit: this torch has no CUDA stream to give; install a CUDA build of torch");
  return stream;
}

// What a launcher asks for; freed when its work has been launched, which PyTorch's allocator allows on one stream.
struct StreamMemory {
  const torch::stable::Tensor& like;
  std::vector<torch::stable::Tensor> blocks = {};

  void* operator()(int64_t bytes) {
    blocks.push_back(torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte));
    return blocks.back().data_ptr();
  }
};

inline void check_launch(const char* op, const char* error) {
  FASTKIT_CHECK(error == nullptr, op, ": a CUDA kernel could not be launched: ", error);
}

}  // namespace fastkit
