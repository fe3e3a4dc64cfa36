// topk_similarity: tensors -> raw pointers, for the CPU; and who sweeps what.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "common/aligned.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/topk_similarity.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr int64_t kSerial = int64_t{1} << 18;        // fewer multiply-adds are not worth a second thread
constexpr int64_t kQueries = 2048;                   // of a sweep: their rows stay in a last-level cache
constexpr int64_t kQueryBytes = int64_t{1} << 22;    // also where there are many columns
constexpr int64_t kLeastQueries = 64;                // for which a thread copies all keys
constexpr int64_t kListBytes = int64_t{1} << 25;     // of the queries of a sweep, where k is large
constexpr int64_t kKeyListBytes = int64_t{1} << 29;  // of the keys, of all threads

template <class T>
struct Result {
  T* values = nullptr;
  int64_t* indices = nullptr;

  Result from(int64_t row, int64_t k) const { return {values + row * k, indices + row * k}; }
};

template <class T>
class Lists {
 public:
  Lists(int64_t rows, int64_t k)
      : entries_(new TopKEntry<T>[static_cast<size_t>(rows * k)]),
        counts_(new int64_t[static_cast<size_t>(rows)]),
        thresholds_(new T[static_cast<size_t>(rows + kTopKPadding)]()) {
    lists = {k, entries_.get(), counts_.get(), thresholds_.get()};
  }
  TopKLists<T> lists;

 private:
  std::unique_ptr<TopKEntry<T>[]> entries_;
  std::unique_ptr<int64_t[]> counts_;
  std::unique_ptr<T[]> thresholds_;
};

// All queries and all keys, and the lists of one or both.
template <class E>
class Search {
 public:
  using T = Arithmetic<E>;

  Search(const TopKSweep<E>& all, int64_t k, bool both) : kernels_(topk_kernels().of<E>()), all_(all), k_(k) {
    const int64_t products = all.query_count * all.key_count * all.columns;
    threads_ = std::clamp<int64_t>(products / kSerial, 1, torch::stable::get_num_threads());
    const int64_t of_keys = (all.key_count + kTopKPadding) * list_bytes();
    if (both) threads_ = std::clamp<int64_t>(kKeyListBytes / of_keys, 1, threads_);
    const int64_t of_lists = kListBytes / list_bytes();
    const int64_t of_rows = std::max(kQueryBytes / (all.columns * static_cast<int64_t>(sizeof(T))), kLeastQueries);
    rows_ = std::clamp<int64_t>(std::min(of_lists, of_rows), 1, kQueries);
  }

  void run(const Result<T>& of_queries, const Result<T>& of_keys) const {
    if (all_.query_count >= threads_ * kLeastQueries || 4 * all_.query_count >= all_.key_count) {
      split_queries(of_queries, of_keys);
    } else {
      split_keys(of_queries, of_keys);
    }
  }

 private:
  int64_t list_bytes() const { return k_ * static_cast<int64_t>(sizeof(TopKEntry<T>)); }

  // body(thread, begin, end), of n rows.
  template <class Body>
  void each_thread(int64_t n, int64_t multiple, Body&& body) const {
    const int64_t share = (n + threads_ * multiple - 1) / (threads_ * multiple) * multiple;
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        if (t * share < n) body(t, t * share, std::min(n, (t + 1) * share));
      }
    });
  }

  // A part of the whole, whose lists are given.
  void sweep(int64_t query, int64_t queries, int64_t key, int64_t keys, const TopKLists<T>& of_queries,
             const TopKLists<T>& of_keys) const {
    TopKSweep<E> part = all_;
    part.queries.data = all_.queries.row(query), part.query_count = queries, part.first_query = query;
    part.keys.data = all_.keys.row(key), part.key_count = keys, part.first_key = key;
    if (all_.bias != nullptr) part.bias = all_.bias + key;
    part.of_queries = of_queries, part.of_keys = of_keys;
    const Aligned<T> room(kernels_.room(queries, all_.columns));
    part.room = room.data();
    kernels_.sweep(part);
  }

  void finish(const TopKLists<T>& lists, int64_t rows, const Result<T>& result) const {
    kernels_.finish(lists, rows, all_.l2, result.values, result.indices);
  }

  void split_queries(const Result<T>& of_queries, const Result<T>& of_keys) const {
    const int64_t all_keys = all_.key_count, share = (all_.query_count + threads_ - 1) / threads_;
    const int64_t rows = std::min(rows_, share);
    const bool both = of_keys.values != nullptr;
    const Lists<T> query_lists(threads_ * rows, k_), key_lists(both ? threads_ * (all_keys + kTopKPadding) : 0, k_);
    const auto keys_of = [&](int64_t t) {
      return both ? key_lists.lists.from(t * (all_keys + kTopKPadding)) : TopKLists<T>{};
    };
    each_thread(all_.query_count, 1, [&](int64_t t, int64_t first, int64_t last) {
      const TopKLists<T> mine = query_lists.lists.from(t * rows);
      if (both) kernels_.begin(keys_of(t), all_keys);
      for (int64_t query = first; query < last; query += rows) {
        const int64_t n = std::min(rows, last - query);
        kernels_.begin(mine, n);
        sweep(query, n, 0, all_keys, mine, keys_of(t));
        finish(mine, n, of_queries.from(query, k_));
      }
    });
    if (!both) return;
    each_thread(all_keys, 1, [&](int64_t, int64_t first, int64_t last) {
      const TopKLists<T> into = keys_of(0).from(first);
      for (int64_t t = 1; t < threads_ && t * share < all_.query_count; ++t) {
        kernels_.merge(keys_of(t).from(first), into, last - first);
      }
      finish(into, last - first, of_keys.from(first, k_));
    });
  }

  void split_keys(const Result<T>& of_queries, const Result<T>& of_keys) const {
    const int64_t m = all_.key_count, rows = std::min(rows_, all_.query_count);
    const bool both = of_keys.values != nullptr;
    const Lists<T> query_lists(threads_ * rows, k_), key_lists(both ? m : 0, k_);
    if (both) kernels_.begin(key_lists.lists, m);
    for (int64_t query = 0; query < all_.query_count; query += rows) {
      const int64_t n = std::min(rows, all_.query_count - query);
      kernels_.begin(query_lists.lists, threads_ * rows);
      each_thread(m, kTopKPadding, [&](int64_t t, int64_t first, int64_t last) {
        sweep(query, n, first, last - first, query_lists.lists.from(t * rows),
              both ? key_lists.lists.from(first) : TopKLists<T>{});
      });
      each_thread(n, 1, [&](int64_t, int64_t first, int64_t last) {
        const TopKLists<T> into = query_lists.lists.from(first);
        for (int64_t t = 1; t < threads_; ++t) {
          kernels_.merge(query_lists.lists.from(t * rows + first), into, last - first);
        }
        finish(into, last - first, of_queries.from(query + first, k_));
      });
    }
    if (!both) return;
    each_thread(m, 1, [&](int64_t, int64_t first, int64_t last) {
      finish(key_lists.lists.from(first), last - first, of_keys.from(first, k_));
    });
  }

  const TopKFunctions<E>& kernels_;
  const TopKSweep<E>& all_;
  int64_t k_, threads_;
  int64_t rows_;  // of a sweep
};

// --- tensors ---------------------------------------------------------------------------------------------------------

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
}

std::pair<Tensor, Tensor> empty_result(const Tensor& like, int64_t rows, int64_t k) {
  return {new_empty(like, {rows, k}, arithmetic(like)), new_empty(like, {rows, k}, ScalarType::Long)};
}

template <class T>
Result<T> pointers(const std::pair<Tensor, Tensor>& result) {
  return {static_cast<T*>(result.first.data_ptr()), static_cast<int64_t*>(result.second.data_ptr())};
}

template <class E>
TopKSweep<E> describe(const Tensor& queries, const Tensor& keys) {
  TopKSweep<E> all;
  all.queries = table<E>(queries), all.query_count = queries.size(0);
  all.keys = table<E>(keys), all.key_count = keys.size(0), all.columns = queries.size(1);
  return all;
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
  const Tensor q = readable_rows(queries), x = readable_rows(keys);
  const auto result = empty_result(queries, n, k);
  dispatch_floating("topk_similarity", queries, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    if (n == 0) return;
    TopKSweep<E> all = describe<E>(q, x);
    all.l2 = l2;
    if (bias) all.bias = static_cast<const T*>(bias->data_ptr());
    Search<E>(all, k, false).run(pointers<T>(result), {});
  });
  return {result.first, result.second};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_similarity_both_fwd(const Tensor& queries, const Tensor& keys,
                                                                    int64_t k) {
  check(queries, keys, k, keys.dim() == 2 && queries.dim() == 2 ? std::min(queries.size(0), keys.size(0)) : 0);
  const Tensor q = readable_rows(queries), x = readable_rows(keys);
  const auto of_queries = empty_result(queries, q.size(0), k), of_keys = empty_result(queries, x.size(0), k);
  dispatch_floating("topk_similarity", queries, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    const bool swapped = q.size(0) < x.size(0);  // a thread holds the lists of all keys: the lesser table's
    const TopKSweep<E> all = swapped ? describe<E>(x, q) : describe<E>(q, x);
    const auto of_rows = pointers<T>(swapped ? of_keys : of_queries);
    Search<E>(all, k, true).run(of_rows, pointers<T>(swapped ? of_queries : of_keys));
  });
  return {of_queries.first, of_queries.second, of_keys.first, of_keys.second};
}

Tensor unit_rows(const Tensor& x) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) >= 1,
                "topk_similarity: a table must be on the CPU and have shape (n, D) with D >= 1");
  const Tensor in = readable_rows(x);
  Tensor unit = new_empty(x, {x.size(0), x.size(1)}, arithmetic(x));
  dispatch_floating("topk_similarity", x, [&](auto zero) {
    using E = decltype(zero);
    auto* to = static_cast<Arithmetic<E>*>(unit.data_ptr());
    const int64_t grain = kSerial / (8 * x.size(1)) + 1;
    torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
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
