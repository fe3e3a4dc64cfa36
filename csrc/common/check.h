// Errors in words, raised in Python as RuntimeError. What a user can get wrong is checked in Python, in the
// op's own terms; here only what memory safety needs, for callers of the raw op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

// The words alone: STD_TORCH_CHECK has the function, the file and the line before them.
#define FASTKIT_CHECK(condition, ...)                                                       \
  do {                                                                                      \
    if (!(condition)) [[unlikely]] throw std::runtime_error(::fastkit::message(__VA_ARGS__)); \
  } while (false)

namespace fastkit {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Neither sparse nor of another library. Tensor::layout() is not in the headers of torch 2.10.
inline bool is_strided(const torch::stable::Tensor& t) {
  int32_t layout = -1;
  return aoti_torch_get_layout(t.get(), &layout) == AOTI_TORCH_SUCCESS && layout == aoti_torch_layout_strided();
}

// Both on the CPU, or on one GPU.
inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return (a.is_cpu() || a.is_cuda()) && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

}  // namespace fastkit
