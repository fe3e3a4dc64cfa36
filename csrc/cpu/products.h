// What kernels that form matrix products share: tiles, whose sums stay in registers from the first to the last, and work
// in ranges.
#pragma once

#include "cpu/simd.h"
#include "fastkit/parallel.h"

namespace fastkit::FASTKIT_ISA {
inline namespace FASTKIT_WIDTH {

inline constexpr int kVectors = 2;
template <class T>
inline constexpr int kWide = kVectors * kLanes<T>;

inline constexpr int64_t kGrain = int64_t{1} << 17;  // multiply-adds that are worth a thread

// body(begin, end), of tasks of so many multiply-adds.
template <class Body>
FASTKIT_INLINE void in_ranges(ParallelRanges parallel, int64_t tasks, int64_t products, Body body) {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    ExactScope scope;
    (*static_cast<Body*>(context))(begin, end);
  };
  parallel(kGrain / (products + 1) + 1, tasks, call, &body);
}

// The left side: element (i, k) is data[i of_row + k of_k].
template <class T>
struct Left {
  const T* data;
  int64_t of_row, of_k;
};

// Rows `row` to row + kRows - 1 of a, times b (depth, kWide), whose rows are of_k apart: emit(r, v, sums) for each r and
// vector v. Sums run over the depth in order.
template <int kRows, class T, class Emit>
FASTKIT_INLINE void product_tile(const Left<T>& a, int64_t row, const T* b, int64_t of_k, int64_t depth,
                                 const Emit& emit) {
  const T* from = a.data + row * a.of_row;
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) x[v] = load(b + k * of_k + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> factor = broadcast(from[r * a.of_row + k * a.of_k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(factor, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) emit(r, v, sum[r][v]);
  }
}

// f(row), of kTile, 4 or 1 rows, its template argument, for rows [begin, end).
template <int kTile, class F>
FASTKIT_INLINE void in_tiles(int64_t begin, int64_t end, F&& f) {
  int64_t row = begin;
  for (; row + kTile <= end; row += kTile) f.template operator()<kTile>(row);
  for (; row + 4 <= end; row += 4) f.template operator()<4>(row);
  for (; row < end; ++row) f.template operator()<1>(row);
}

}  // namespace FASTKIT_WIDTH
}  // namespace fastkit::FASTKIT_ISA
