// Kernel interface of topk_similarity: of each row of a table the k best rows of another.
//
//   q . x (+ bias of x), the greatest;  or |q - x|^2, the least
//
// A thread sweeps some queries over some keys. Where others sweep the same queries over other keys, or other queries
// over the same keys, lists are merged. E is the element type of tables, T = Arithmetic<E> that of scores.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

namespace fastkit {

// A table whose columns have stride 1.
template <class E>
struct TopKTable {
  const E* data = nullptr;
  int64_t stride = 0;

  FASTKIT_ALWAYS_INLINE const E* row(int64_t i) const { return data + i * stride; }
};

template <class T>
struct TopKEntry {
  T score;  // of distances their negatives
  int64_t index;
};

// Behind the thresholds of a sweep so many more are read, and ignored; keys that are cut are cut at multiples.
inline constexpr int64_t kTopKPadding = 64;

// Of each row of a table the best that was found, at most k; null entries: not wanted.
template <class T>
struct TopKLists {
  int64_t k = 0;
  TopKEntry<T>* entries = nullptr;  // k for each, of which the first `counts` are a heap with the worst in front
  int64_t* counts = nullptr;
  T* thresholds = nullptr;  // what is less is not wanted: -inf, or of a full list what is next above its worst score

  TopKLists from(int64_t row) const {
    if (entries == nullptr) return *this;
    return {k, entries + row * k, counts + row, thresholds + row};
  }
};

template <class E>
struct TopKSweep {
  using T = Arithmetic<E>;

  TopKTable<E> queries, keys;
  int64_t query_count = 0, key_count = 0, columns = 0;
  int64_t first_query = 0, first_key = 0;  // the indices of the first rows
  const T* bias = nullptr;                 // of the keys; null: none
  bool l2 = false;
  TopKLists<T> of_queries, of_keys;
  T* room = nullptr;  // of as many T as room(query_count, columns) says
};

template <class E>
struct TopKFunctions {
  using T = Arithmetic<E>;
  int64_t (*room)(int64_t query_count, int64_t columns);
  void (*begin)(const TopKLists<T>&, int64_t rows);
  void (*sweep)(const TopKSweep<E>&);
  void (*merge)(const TopKLists<T>& from, const TopKLists<T>& into, int64_t rows);
  // Dense (rows, k), the best first; NaN and -1 where there are fewer.
  void (*finish)(const TopKLists<T>&, int64_t rows, bool l2, T* values, int64_t* indices);
  // Each row over its norm: 0 of a row of zeros, NaN of one with inf or NaN; `to` dense.
  void (*unit_rows)(const TopKTable<E>&, int64_t columns, T* to, int64_t begin, int64_t end);
};

using TopKKernels = OfEachElement<TopKFunctions>;
FASTKIT_TABLE(TopKKernels, topk_kernels)

}  // namespace fastkit
