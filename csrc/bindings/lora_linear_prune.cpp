// The pruning of lora_linear's A: tensors -> raw pointers, for the CPU and, of rows, CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/stream.h"
#include "fastkit/lora_linear_prune.h"
#include "fastkit/lora_linear_prune_cuda.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr int64_t kSerialSquares = 32768;  // fewer elements of x are not worth a second thread
constexpr int64_t kSerialEntries = 65536;  // nor fewer entries of matrices
constexpr int64_t kLongestRow = int64_t{1} << 30;  // kernels count its entries in 32 bits

Tensor column_square_sums(const Tensor& x) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2, "column_square_sums: x must be on the CPU and have shape (N, D)");
  const Tensor in = readable_rows(x);
  Tensor sums = new_empty(x, {x.size(1)}, ScalarType::Float);
  dispatch_floating("column_square_sums", x, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    const auto& kernels = column_squares_kernels().of<E>();
    ColumnSquares<E> p;
    p.rows = in.size(0), p.columns = in.size(1);
    p.x = {static_cast<const E*>(in.data_ptr()), in.stride(0)};
    p.sums = static_cast<float*>(sums.data_ptr());
    const auto partial = std::make_unique_for_overwrite<T[]>(p.parts() * p.columns);
    p.partial = partial.get();
    const int64_t units = kernels.units(p), elements = std::max<int64_t>(p.rows * p.columns, 1);
    torch::stable::parallel_for(0, units, kSerialSquares * units / elements + 1,
                                [&](int64_t begin, int64_t end) { kernels.run(p, begin, end); });
    torch::stable::parallel_for(0, p.columns, kSerialSquares / std::max<int64_t>(p.parts(), 1) + 1,
                                [&](int64_t begin, int64_t end) { kernels.finish(p, begin, end); });
  });
  return sums;
}

void check_matrix(const Tensor& matrix, const Tensor& norm, const Tensor& mask, const Tensor& first) {
  FASTKIT_CHECK(same_device(first, matrix) && same_device(first, norm) && same_device(first, mask),
                "prune_rows_: matrices, norms and masks must be on one device, a CPU or a GPU");
  FASTKIT_CHECK(matrix.dim() == 2 && matrix.size(1) < kLongestRow,
                "prune_rows_: matrices must have shape (R, D) with D < 2^30");
  for (int64_t axis = 0; axis < 2; ++axis) {
    FASTKIT_CHECK(matrix.size(axis) <= 1 || matrix.stride(axis) != 0,
                  "prune_rows_: matrices must not be expanded, for they are written to");
  }
  FASTKIT_CHECK(norm.scalar_type() == ScalarType::Float && norm.dim() == 1 && norm.size(0) == matrix.size(1),
                "prune_rows_: norms must be float32 and have shape (D,), one for each matrix");
  FASTKIT_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == matrix.size(0) &&
                    mask.size(1) == matrix.size(1) && mask.is_contiguous(),
                "prune_rows_: masks must be bool, dense and of the shapes of the matrices");
}

// The values of a CPU's norms: here rather than in Python, where a reduction costs as much as the pruning.
void check_values(const float* norm, int64_t n) {
  const auto fits = [](float value) { return value >= 0 && value <= std::numeric_limits<float>::max(); };
  bool all = true;
  for (int64_t k = 0; k < n; ++k) all &= fits(norm[k]);
  if (all) return;
  const int64_t k = std::find_if_not(norm, norm + n, fits) - norm;
  FASTKIT_CHECK(false, "prune_rows_: input_norm must be finite and not negative, got ", norm[k], " at index ", k,
                "; leave out batches whose statistic is not finite");
}

// The matrices of one element type.
template <class E>
struct Table {
  std::vector<PruneMatrix<E>> matrices;
  int64_t longest = 0, entries = 0;

  void add(const Tensor& matrix, const Tensor& norm, const Tensor& kept, double ratio) {  // norm: dense
    if (matrix.size(0) == 0 || matrix.size(1) == 0) return;
    PruneMatrix<E> m;
    m.data = static_cast<E*>(matrix.data_ptr());
    m.row = matrix.stride(0), m.column = matrix.size(1) == 1 ? 1 : matrix.stride(1);
    m.norm = static_cast<const float*>(norm.data_ptr());
    m.kept = static_cast<bool*>(kept.data_ptr());
    m.columns = matrix.size(1);
    m.pruned = std::min(static_cast<int64_t>(std::floor(ratio * static_cast<double>(m.columns))), m.columns);
    m.end_rows = rows() + matrix.size(0);
    matrices.push_back(m);
    longest = std::max(longest, m.columns);
    entries += matrix.size(0) * m.columns;
  }

  int64_t rows() const { return matrices.empty() ? 0 : matrices.back().end_rows; }

  void run(const Tensor& like) const {
    if (matrices.empty()) return;
    if (like.is_cpu()) return run_cpu();
#ifdef FASTKIT_WITH_CUDA
    void* const stream = current_stream(like);
    check_launch("prune_rows_", prune_rows_cuda(matrices.data(), static_cast<int64_t>(matrices.size()), stream));
#endif
  }

 private:
  void run_cpu() const {
    const auto& kernels = prune_rows_kernels().of<E>();
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t workers = std::clamp<int64_t>(std::min(threads, entries / kSerialEntries + 1), 1, rows());
    const int64_t room = kernels.room(longest);
    const auto scores = std::make_unique_for_overwrite<Score<E>[]>(workers * room);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.run(matrices.data(), rows() * i / workers, rows() * (i + 1) / workers, scores.get() + i * room);
      }
    });
  }
};

void prune_rows_(const std::vector<Tensor>& matrices, const std::vector<Tensor>& norms, double ratio,
                 const std::vector<Tensor>& masks) {
  FASTKIT_CHECK(matrices.size() == norms.size() && matrices.size() == masks.size(),
                "prune_rows_: there must be one of norms and of masks for each of matrices");
  FASTKIT_CHECK(ratio >= 0 && ratio < 1, "prune_rows_: ratio must be in [0, 1)");
  if (matrices.empty()) return;
  const Tensor& first = matrices[0];
  for (size_t i = 0; i < matrices.size(); ++i) check_matrix(matrices[i], norms[i], masks[i], first);
  const auto device = device_guard(first);
  std::vector<Tensor> dense;
  for (const Tensor& norm : norms) {
    dense.push_back(norm.size(0) <= 1 || norm.stride(0) == 1 ? norm : contiguous(norm));
    if (norm.is_cpu()) check_values(static_cast<const float*>(dense.back().data_ptr()), norm.size(0));
  }
  Table<float> of_f32;
  Table<double> of_f64;
  Table<BFloat16> of_bf16;
  Table<Half> of_f16;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& matrix = matrices[i];
    dispatch_floating("prune_rows_", matrix, [&](auto zero) {
      using E = decltype(zero);
      const auto add = [&](auto& table) { table.add(matrix, dense[i], masks[i], ratio); };
      if constexpr (IsSame<E, float>) add(of_f32);
      if constexpr (IsSame<E, double>) add(of_f64);
      if constexpr (IsSame<E, BFloat16>) add(of_bf16);
      if constexpr (IsSame<E, Half>) add(of_f16);
    });
  }
  of_f32.run(first), of_f64.run(first), of_bf16.run(first), of_f16.run(first);
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("column_square_sums", TORCH_BOX(&fastkit::column_square_sums));
  m.impl("prune_rows_", TORCH_BOX(&fastkit::prune_rows_));
}

#ifdef FASTKIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkit, CUDA, m) { m.impl("prune_rows_", TORCH_BOX(&fastkit::prune_rows_)); }
#endif
