// Kernel interface of the pruning of lora_linear's A: the statistic of the inputs, and the selection in each row.
//
//   sums[k] = sum over rows i of x[i][k]^2
//   of each row r of a matrix A, the `pruned` entries with the least |A[r][k]| norm[k] become zero
//
// Scores are ranked by their bits, which order like the numbers themselves once the sign is cleared: as integers, a NaN
// above infinity. E is the element type of x or A, T = Arithmetic<E> that of sums and scores.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"
#include "fastkit/lora_linear.h"

namespace fastkit {

// --- column sums of squares --------------------------------------------------------------------------------------

inline constexpr int64_t kSquareRows = 256;  // that a partial sum is over

template <class E>
struct ColumnSquares {
  using T = Arithmetic<E>;
  int64_t rows = 0, columns = 0;
  Rows<const E> x;
  T* partial = nullptr;   // dense (parts(), columns)
  float* sums = nullptr;  // (columns)

  FASTKIT_ALWAYS_INLINE int64_t parts() const { return (rows + kSquareRows - 1) / kSquareRows; }
};

template <class E>
struct ColumnSquaresFunctions {
  int64_t (*units)(const ColumnSquares<E>&);
  void (*run)(const ColumnSquares<E>&, int64_t begin, int64_t end);     // units [begin, end): the partial sums
  void (*finish)(const ColumnSquares<E>&, int64_t begin, int64_t end);  // columns [begin, end) of their sum
};

// --- rows --------------------------------------------------------------------------------------------------------

// The bits of a score.
template <class E>
struct ScoreOf {
  using type = int32_t;
};
template <>
struct ScoreOf<double> {
  using type = int64_t;
};
template <class E>
using Score = typename ScoreOf<E>::type;

// That of every NaN: the least above infinity's.
template <class S>
inline constexpr S kNanScore = sizeof(S) == 4 ? static_cast<S>(0x7f800001) : static_cast<S>(0x7ff0000000000001);

// A (rows, columns) matrix to be pruned; strides in elements.
template <class E>
struct PruneMatrix {
  E* data = nullptr;
  int64_t row = 0, column = 0;
  const float* norm = nullptr;  // (columns)
  bool* kept = nullptr;         // dense (rows, columns), written
  int64_t columns = 0;
  int64_t pruned = 0;    // of each row, at most `columns`
  int64_t end_rows = 0;  // rows of all matrices up to this one's last
};

template <class E>
struct PruneRowsFunctions {
  int64_t (*room)(int64_t columns);  // scores that a row takes
  // Rows [begin, end) of all matrices; scores: room of the longest row.
  void (*run)(const PruneMatrix<E>* matrices, int64_t begin, int64_t end, Score<E>* scores);
};

using ColumnSquaresKernels = OfEachElement<ColumnSquaresFunctions>;
using PruneRowsKernels = OfEachElement<PruneRowsFunctions>;

FASTKIT_TABLE(ColumnSquaresKernels, column_squares_kernels)
FASTKIT_TABLE(PruneRowsKernels, prune_rows_kernels)

}  // namespace fastkit
