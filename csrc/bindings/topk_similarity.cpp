// topk_similarity: tensors -> raw pointers, for the CPU; and the walk over blocks of both tables.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/topk_similarity.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr int64_t kSerial = 65536;  // fewer numbers are not worth a second thread

// Of a block of scores, which then stays in a last-level cache between the product and the scan. Rows of 2048 have the
// rate of a large product.
constexpr int64_t kScoreBytes = int64_t{1} << 24;
constexpr int64_t kRows = 2048;
constexpr int64_t kLine = 64;  // scores to which rows of a block are filled up: products are slower on others
constexpr int64_t kCandidateBytes = int64_t{1} << 26;  // of the lists of rows, where k is large
constexpr int64_t kKeyNumbers = int64_t{1} << 19;      // of a block of keys, for few queries

// body(begin, end) for parts of n units, each of so many numbers.
template <class Body>
void parallel(int64_t n, int64_t numbers, Body&& body) {
  torch::stable::parallel_for(0, n, kSerial / std::max<int64_t>(numbers, 1) + 1, body);
}

// --- products of the library -----------------------------------------------------------------------------------------

// A matrix on memory that others own.
template <class T>
Tensor matrix(const T* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<T*>(data), 2, sizes.data(), strides.data(), 0,
      sizeof(T) == sizeof(float) ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = a b^T. By mm.out, which autocast leaves alone.
template <class T>
void multiply(const TopKTable<T>& a, int64_t rows, const TopKTable<T>& b, int64_t columns, int64_t inner, T* out,
              int64_t stride) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(matrix(a.data, {rows, inner}, {a.stride, 1})),
      torch::stable::detail::from(matrix(b.data, {inner, columns}, {1, b.stride})),
      torch::stable::detail::from(matrix<T>(out, {rows, columns}, {stride, 1}))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference
}

// How far a product may be off beyond its rounding, in units of |q| |x|. PyTorch may have been told to round factors in
// float32 to fewer bits (torch.set_float32_matmul_precision), to bfloat16 at worst: then 1 + 2^-12 is taken as 1.
template <class T>
double product_error() {
  if (sizeof(T) == sizeof(double)) return 0;
  constexpr int64_t n = 32;  // less might take another path
  std::array<T, n * n> factor, product;
  factor.fill(static_cast<T>(1 + 0x1p-12));
  multiply<T>({factor.data(), n}, n, {factor.data(), n}, n, n, product.data(), n);
  return product[0] > n * (1 + 0x1p-12) ? 0 : 0x1p-7;
}

// --- the walk --------------------------------------------------------------------------------------------------------

template <class E>
struct Lists {
  using T = Arithmetic<E>;

  std::unique_ptr<TopKList<T>[]> lists;
  std::unique_ptr<TopKCandidate<T>[]> candidates;
  std::unique_ptr<T[]> best, thresholds;

  // For n seekers.
  void allot(TopKSearch<E>& search, int64_t n) {
    lists = std::make_unique_for_overwrite<TopKList<T>[]>(n);
    candidates = std::make_unique_for_overwrite<TopKCandidate<T>[]>(n * topk_room(search.k));
    best = std::make_unique_for_overwrite<T[]>(n * search.k);
    thresholds = std::make_unique_for_overwrite<T[]>(n);
    search.lists = lists.get(), search.candidates = candidates.get();
    search.best = best.get(), search.thresholds = thresholds.get();
  }
};

template <class T>
struct Result {
  T* values;
  int64_t* indices;  // both dense (rows, k)
};

template <class E>
TopKSearch<E> seekers_from(TopKSearch<E> search, int64_t i) {
  search.seekers.data = search.seekers.row(i);
  search.norms += i, search.lists += i, search.thresholds += i;
  search.best += i * search.k, search.candidates += i * topk_room(search.k);
  return search;
}

template <class E>
class Sweep {
  using T = Arithmetic<E>;
  static constexpr bool kHalf = sizeof(E) < sizeof(T);

 public:
  Sweep(TopKTable<E> queries, int64_t n, TopKTable<E> keys, int64_t m, int64_t columns, int64_t k, bool l2,
        const T* bias)
      : kernels_(topk_kernels().of<E>()), n_(n), m_(m), columns_(columns), packs_(l2 || kHalf), bias_(bias) {
    const int64_t of_list = topk_room(k) * static_cast<int64_t>(sizeof(TopKCandidate<T>));
    rows_ = std::clamp<int64_t>(std::min(n, kRows), 1, std::max<int64_t>(kCandidateBytes / of_list, 1));
    const int64_t scores = kScoreBytes / static_cast<int64_t>(sizeof(T));
    const int64_t most = std::min(scores / rows_, std::max(kKeyNumbers / columns, kRows));
    stride_ = (std::min(m, most) + kLine - 1) / kLine * kLine;
    keys_ = std::min(m, stride_);
    rows_search_.seekers = queries, rows_search_.found = keys, rows_search_.bias = bias;
    rows_search_.columns = columns, rows_search_.k = k, rows_search_.l2 = l2;
    if (static_cast<double>(n) * m * columns >= kLeastLowered) rows_search_.product_error = product_error<T>();
    for (int64_t j = 0; bias != nullptr && j < m; ++j) {
      const double size = std::abs(static_cast<double>(bias[j]));
      if (std::isfinite(size)) rows_search_.bias_reach = std::max(rows_search_.bias_reach, size);
    }
    columns_search_ = rows_search_;
    std::swap(columns_search_.seekers, columns_search_.found);
  }

  // of_columns: the rows that keys seek among the queries; null values: not wanted. `like` says where memory is.
  void run(const Tensor& like, const Result<T>& of_rows, const Result<T>& of_columns) {
    const bool both = of_columns.values != nullptr;
    const auto query_norms = std::make_unique_for_overwrite<double[]>(rows_);
    const auto key_norms = std::make_unique_for_overwrite<double[]>(m_);
    const Tensor room = new_empty(like, {rows_ * stride_}, arithmetic(like));  // on a cache line
    T* const scores = static_cast<T*>(room.data_ptr());
    const auto packed = std::make_unique_for_overwrite<T[]>(packs_ ? (rows_ + keys_) * columns_ : 0);
    const auto centered = std::make_unique_for_overwrite<T[]>(rows_search_.l2 ? columns_ + keys_ : 0);
    Lists<E> row_lists, column_lists;
    row_lists.allot(rows_search_, rows_);
    rows_search_.norms = query_norms.get(), columns_search_.norms = key_norms.get();
    if (both) {
      column_lists.allot(columns_search_, m_);
      parallel(m_, 1, [&](int64_t b, int64_t e) { kernels_.begin(columns_search_, b, e); });
    }
    TopKBlock<E> of_queries, of_keys;
    of_queries.columns = of_keys.columns = columns_;
    of_queries.norms = query_norms.get();
    if (packs_) of_queries.packed = packed.get(), of_keys.packed = packed.get() + rows_ * columns_;
    if (rows_search_.l2) {
      kernels_.center(rows_search_.found, m_, columns_, centered.get());
      of_queries.center = of_keys.center = centered.get(), of_keys.half_squares = centered.get() + columns_;
    }

    for (int64_t i = 0; i < n_; i += rows_) {
      const int64_t rows = std::min(rows_, n_ - i);
      TopKSearch<E> search = rows_search_;
      search.seekers.data = of_queries.table.data = search.seekers.row(i);
      of_queries.table.stride = search.seekers.stride;
      prepare(of_queries, rows, columns_search_.reach);
      parallel(rows, 1, [&](int64_t b, int64_t e) { kernels_.begin(search, b, e); });
      for (int64_t j = 0; j < m_; j += keys_) {
        const int64_t keys = std::min(keys_, m_ - j);
        of_keys.table = {rows_search_.found.row(j), rows_search_.found.stride};
        of_keys.norms = key_norms.get() + j;
        if (i == 0 || packs_) prepare(of_keys, keys, rows_search_.reach);
        search.reach = rows_search_.reach;
        multiply(operand(of_queries), rows, operand(of_keys), keys, columns_, scores, stride_);
        const T* bias = of_keys.half_squares != nullptr ? of_keys.half_squares : bias_ == nullptr ? nullptr : bias_ + j;
        const TopKScores<T> block{scores, stride_, rows, keys, bias};
        parallel(rows, keys, [&](int64_t b, int64_t e) { kernels_.scan_rows(search, block, j, b, e); });
        if (!both) continue;
        const TopKSearch<E> seeking = seekers_from(columns_search_, j);
        parallel(keys, rows, [&](int64_t b, int64_t e) { kernels_.scan_columns(seeking, block, i, b, e); });
      }
      finish(search, rows, {of_rows.values + i * search.k, of_rows.indices + i * search.k});
    }
    if (both) finish(columns_search_, m_, of_columns);
  }

 private:
  static constexpr int64_t kLeastLowered = 4096;  // multiply-adds of a product whose factors might be rounded

  // Adds the norms to the reach of what seeks these rows.
  void prepare(const TopKBlock<E>& block, int64_t n, double& reach) const {
    parallel(n, columns_, [&](int64_t b, int64_t e) { kernels_.prepare(block, b, e); });
    for (int64_t i = 0; i < n; ++i) reach = std::isnan(block.norms[i]) ? reach : std::max(reach, block.norms[i]);
  }

  TopKTable<T> operand(const TopKBlock<E>& block) const {
    if constexpr (!kHalf) {
      if (!packs_) return block.table;
    }
    return {block.packed, columns_};
  }

  void finish(const TopKSearch<E>& search, int64_t n, const Result<T>& result) const {
    parallel(n, search.k * columns_, [&](int64_t b, int64_t e) {
      kernels_.finish(search, b, e, result.values, result.indices);
    });
  }

  const TopKFunctions<E>& kernels_;
  int64_t n_, m_, columns_;
  int64_t rows_, keys_, stride_;  // of a block of scores
  bool packs_;
  const T* bias_;
  TopKSearch<E> rows_search_, columns_search_;
};

// --- tensors ---------------------------------------------------------------------------------------------------------

// The tensor itself where its columns have stride 1, else a copy.
Tensor readable(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : contiguous(t); }

template <class E>
TopKTable<E> table(const Tensor& t) {
  return {static_cast<const E*>(t.data_ptr()), t.stride(0)};
}

void check(const Tensor& queries, const Tensor& keys, int64_t k, int64_t most) {
  FASTKIT_CHECK(queries.is_cpu() && queries.dim() == 2 && queries.size(1) >= 1,
                "topk_similarity: queries must be on the CPU and have shape (n, D) with D >= 1");
  FASTKIT_CHECK(keys.is_cpu() && keys.dim() == 2 && keys.size(1) == queries.size(1) &&
                    keys.scalar_type() == queries.scalar_type(),
                "topk_similarity: keys must be on the CPU and have shape (m, D) and the dtype of queries");
  FASTKIT_CHECK(k >= 1 && k <= most, "topk_similarity: k must be between 1 and ", most, ", got ", k);
  constexpr int64_t largest = std::numeric_limits<int32_t>::max() / 4;  // candidates count rows, and 2 k, in 32 bits
  FASTKIT_CHECK(queries.size(0) <= largest && keys.size(0) <= largest, "topk_similarity: tables must have at most ",
                largest, " rows on the CPU; pass parts of them, and choose from the results");
}

std::pair<Tensor, Tensor> empty_result(const Tensor& like, int64_t rows, int64_t k) {
  return {new_empty(like, {rows, k}, arithmetic(like)), new_empty(like, {rows, k}, ScalarType::Long)};
}

template <class T>
Result<T> pointers(const std::pair<Tensor, Tensor>& result) {
  return {static_cast<T*>(result.first.data_ptr()), static_cast<int64_t*>(result.second.data_ptr())};
}

std::tuple<Tensor, Tensor> topk_similarity_fwd(const Tensor& queries, const Tensor& keys,
                                               const std::optional<Tensor>& key_bias, int64_t k, bool l2) {
  check(queries, keys, k, keys.dim() == 2 ? keys.size(0) : 0);
  const int64_t n = queries.size(0), m = keys.size(0);
  std::optional<Tensor> bias;
  if (key_bias) {
    FASTKIT_CHECK(!l2 && key_bias->is_cpu() && key_bias->dim() == 1 && key_bias->size(0) == m &&
                      (key_bias->scalar_type() == queries.scalar_type() ||
                       key_bias->scalar_type() == arithmetic(queries)),
                  "topk_similarity: key_bias must be on the CPU and have shape (m,) and the dtype of queries, or "
                  "float32 for half precision; with l2 it must be None");
    bias = contiguous(torch::stable::to(*key_bias, arithmetic(queries)));
  }
  const Tensor q = readable(queries), x = readable(keys);
  const auto result = empty_result(queries, n, k);
  dispatch_floating("topk_similarity", queries, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    const T* of_keys = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
    if (n == 0) return;
    Sweep<E>(table<E>(q), n, table<E>(x), m, q.size(1), k, l2, of_keys).run(q, pointers<T>(result), {});
  });
  return {result.first, result.second};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_similarity_both_fwd(const Tensor& queries, const Tensor& keys,
                                                                    int64_t k) {
  check(queries, keys, k, keys.dim() == 2 && queries.dim() == 2 ? std::min(queries.size(0), keys.size(0)) : 0);
  const Tensor q = readable(queries), x = readable(keys);
  const auto of_queries = empty_result(queries, q.size(0), k), of_keys = empty_result(queries, x.size(0), k);
  dispatch_floating("topk_similarity", queries, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    const bool swapped = q.size(0) < x.size(0);  // a call holds the lists of all columns: the lesser table's
    const Tensor &rows = swapped ? x : q, &columns = swapped ? q : x;
    Sweep<E> sweep(table<E>(rows), rows.size(0), table<E>(columns), columns.size(0), q.size(1), k, false, nullptr);
    sweep.run(q, pointers<T>(swapped ? of_keys : of_queries), pointers<T>(swapped ? of_queries : of_keys));
  });
  return {of_queries.first, of_queries.second, of_keys.first, of_keys.second};
}

Tensor unit_rows(const Tensor& x) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) >= 1,
                "topk_similarity: a table must be on the CPU and have shape (n, D) with D >= 1");
  const Tensor in = readable(x);
  Tensor unit = new_empty(x, {x.size(0), x.size(1)}, arithmetic(x));
  dispatch_floating("topk_similarity", x, [&](auto zero) {
    using E = decltype(zero);
    auto* to = static_cast<Arithmetic<E>*>(unit.data_ptr());
    parallel(x.size(0), 8 * x.size(1), [&](int64_t begin, int64_t end) {
      topk_kernels().of<E>().unit_rows(table<E>(in), x.size(1), to, begin, end);
    });
  });
  return unit;
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("topk_similarity_fwd", TORCH_BOX(&fastkit::topk_similarity_fwd));
  m.impl("topk_similarity_both_fwd", TORCH_BOX(&fastkit::topk_similarity_both_fwd));
  m.impl("unit_rows", TORCH_BOX(&fastkit::unit_rows));
}
