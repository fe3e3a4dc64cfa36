// Kernel interface of topk_similarity: of each row of a table, the seeker, the k best rows of another.
//
//   q . x (+ bias of x), the greatest;  or |q - x|^2, the least
//
// A block of scores comes from the library's matrix product, which sums each pair as it likes. They choose candidates:
// what lies below the k-th best of a seeker by more than the errors of both sums cannot be among its k best. A sum in a
// fixed order, the exact score, decides between candidates. So what is returned does not depend on blocks or threads.
//
// A call is prepare() of the rows of a block of each table, a product of these, and scan_rows() of the block where
// queries seek keys, scan_columns() where keys also seek queries; then finish(). E is the element type of tables,
// T = Arithmetic<E> that of scores.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

namespace fastkit {

// How many candidates a list has room for. When it is full, what has fallen behind is dropped.
FASTKIT_ALWAYS_INLINE constexpr int64_t topk_room(int64_t k) { return 2 * k + 32; }

// A table whose columns have stride 1.
template <class E>
struct TopKTable {
  const E* data = nullptr;
  int64_t stride = 0;

  FASTKIT_ALWAYS_INLINE const E* row(int64_t i) const { return data + i * stride; }
};

template <class T>
struct TopKCandidate {
  T score;        // of the library's product
  T exact;        // once it is decided; of distances their negatives
  int32_t found;  // its row
};

// The best of `known` scores, at most k, are a heap with the least in front. The candidates [0, decided) are a heap
// with the worst in front, those in [decided, count) have no exact score yet.
template <class T>
struct TopKList {
  T floor;  // k rows have exact scores of at least this, less the error; -inf: fewer than k are known
  int32_t known, decided, count;
};

// What some rows of one table seek in the other.
template <class E>
struct TopKSearch {
  using T = Arithmetic<E>;

  TopKTable<E> seekers, found;
  const T* bias = nullptr;  // of the rows that are found; null: none
  int64_t columns = 0, k = 0;
  bool l2 = false;
  double product_error = 0;       // of the library's products, besides their rounding, in units of |q| |x|
  const double* norms = nullptr;  // of the seekers, as prepare() has them
  double reach = 0, bias_reach = 0;  // the largest norm and bias of what may have been found so far
  TopKList<T>* lists = nullptr;      // a list for each seeker
  T* best = nullptr;                       // k for each
  TopKCandidate<T>* candidates = nullptr;  // topk_room(k) for each
  T* thresholds = nullptr;                 // of scan_columns
};

// Of a table, or a block of it, what the library's product takes.
template <class E>
struct TopKBlock {
  using T = Arithmetic<E>;

  TopKTable<E> table;
  int64_t columns = 0;
  const T* center = nullptr;  // for distances, subtracted from each row; null: products
  T* packed = nullptr;        // dense, in the type of arithmetic, less the centre; null: not wanted
  double* norms = nullptr;    // of the packed rows; of products without what is not finite in them
  T* half_squares = nullptr;  // -|x|^2 / 2 of rows that are found by distance; null: not wanted
};

// Scores of rows x columns.
template <class T>
struct TopKScores {
  const T* data = nullptr;
  int64_t stride = 0;  // of rows; that of columns is 1
  int64_t rows = 0, columns = 0;
  const T* bias = nullptr;  // of the columns, added to them; null: none
};

template <class E>
struct TopKFunctions {
  using T = Arithmetic<E>;
  // The mean of some of n rows, or 0 where that is no number.
  void (*center)(const TopKTable<E>&, int64_t n, int64_t columns, T* center);
  void (*prepare)(const TopKBlock<E>&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*begin)(const TopKSearch<E>&, int64_t begin, int64_t end);   // seekers [begin, end)
  // The seekers are the rows [begin, end) of a block, whose columns are found from row `first` on.
  void (*scan_rows)(const TopKSearch<E>&, const TopKScores<T>&, int64_t first, int64_t begin, int64_t end);
  // The seekers are the columns [begin, end) of a block, whose rows are found from row `first` on.
  void (*scan_columns)(const TopKSearch<E>&, const TopKScores<T>&, int64_t first, int64_t begin, int64_t end);
  // Dense (seekers, k), the best first; NaN and -1 where there are fewer.
  void (*finish)(const TopKSearch<E>&, int64_t begin, int64_t end, T* values, int64_t* indices);
  void (*unit_rows)(const TopKTable<E>&, int64_t columns, T* to, int64_t begin, int64_t end);  // `to` dense
};

using TopKKernels = OfEachElement<TopKFunctions>;
FASTKIT_TABLE(TopKKernels, topk_kernels)

}  // namespace fastkit
