// vector_text: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/vector_text.h"

namespace fastkit {
namespace {

using torch::stable::new_empty;

constexpr int64_t kSerialBytes = 32768;   // of text: fewer are not worth a second thread
constexpr int64_t kSerialNumbers = 4096;  // to be written: likewise
constexpr int64_t kOfLine = 5;            // the members of VectorLine
constexpr int64_t kMostColumns = int64_t{1} << 40;

Tensor parse_vectors_(const Tensor& text, Tensor vectors) {
  FASTKIT_CHECK(text.is_cpu() && text.dim() == 1 && text.scalar_type() == ScalarType::Byte && text.is_contiguous(),
                "parse_vectors_: text must be on the CPU, dense, uint8 and of shape (N,)");
  FASTKIT_CHECK(vectors.is_cpu() && vectors.dim() == 2 && vectors.scalar_type() == ScalarType::Float &&
                    vectors.is_contiguous(),
                "parse_vectors_: vectors must be on the CPU, dense, float32 and of shape (M, D)");
  const int64_t columns = vectors.size(1), size = text.size(0);
  const char* const bytes = static_cast<const char*>(text.data_ptr());
  float* const rows = static_cast<float*>(vectors.data_ptr());
  const std::vector<int64_t> begins = find_vector_lines(bytes, size, vectors.size(0));
  const int64_t count = static_cast<int64_t>(begins.size()) - 1;
  const Tensor lines = new_empty(text, {count, kOfLine}, ScalarType::Long);
  int64_t* const found = static_cast<int64_t*>(lines.data_ptr());
  const int64_t grain = kSerialBytes * count / std::max<int64_t>(size, 1) + 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const VectorLine line = parse_vector_line(bytes, size, begins[i], begins[i + 1] - 1, columns, rows + i * columns);
      const int64_t members[kOfLine] = {line.begin, line.word_end, line.end, line.fields, line.fault};
      std::copy(members, members + kOfLine, found + i * kOfLine);
    }
  });
  return lines;
}

std::tuple<Tensor, Tensor> format_vectors(const Tensor& vectors) {
  FASTKIT_CHECK(vectors.is_cpu() && vectors.dim() == 2 && vectors.scalar_type() == ScalarType::Float &&
                    vectors.is_contiguous() && vectors.size(1) < kMostColumns,
                "format_vectors: vectors must be on the CPU, dense, float32 and of shape (N, D)");
  const int64_t rows = vectors.size(0), columns = vectors.size(1), width = columns * kNumberBytes;
  const Tensor text = new_empty(vectors, {rows, width}, ScalarType::Byte);
  const Tensor lengths = new_empty(vectors, {rows}, ScalarType::Long);
  const float* const numbers = static_cast<const float*>(vectors.data_ptr());
  char* const bytes = static_cast<char*>(text.data_ptr());
  int64_t* const taken = static_cast<int64_t*>(lengths.data_ptr());
  const int64_t grain = kSerialNumbers / std::max<int64_t>(columns, 1) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) taken[i] = format_vector(numbers + i * columns, columns, bytes + i * width);
  });
  return {text, lengths};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("parse_vectors_", TORCH_BOX(&fastkit::parse_vectors_));
  m.impl("format_vectors", TORCH_BOX(&fastkit::format_vectors));
}
