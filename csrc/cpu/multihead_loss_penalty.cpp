// orthogonality_penalty on the CPU: rho and its slope, of a block of rows of a Gram matrix.
//
// Parallel   rows.
// Bytes      an element of a cache: 4 read, and with a gradient 4 written (float64: 8).
// Numerics   the arithmetic of the matrix; a row is summed over the lanes of a vector first, then over those.
#include "cpu/simd.h"
#include "fastkit/multihead_loss_penalty.h"

namespace fastkit::FASTKIT_ISA {
namespace {

template <class T>
struct Rho {
  Vec<T> value, slope;
};

template <class T, PenaltyKind Kind>
FASTKIT_INLINE Rho<T> rho_of(Vec<T> t, T width) {
  const Vec<T> one = broadcast<T>(1), zero{};
  const Vec<T> sign = t > zero ? one : (t < zero ? -one : t);  // 0 and NaN are their own
  const Vec<T> size = t * sign;
  if constexpr (Kind == PenaltyKind::abs) return {size, sign};
  if constexpr (Kind == PenaltyKind::squared) return {t * t, t + t};
  const Vec<T> inside = size * (size / broadcast(2 * width)), beyond = size - broadcast(width / 2);
  const auto is_inside = size <= broadcast(width);
  return {is_inside ? inside : beyond, is_inside ? t / broadcast(width) : sign};
}

template <class T, PenaltyKind Kind>
void rows_of(const PenaltyRows<T>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  constexpr int lanes = kLanes<T>;
  // Entries [from, to) of a row: what rho' is, and the sum of rho.
  const auto of_span = [&](T* row, int64_t from, int64_t to) __attribute__((always_inline)) {
    Vec<T> sum{};
    int64_t j = from;
    for (; j + lanes <= to; j += lanes) {
      const Rho<T> rho = rho_of<T, Kind>(load(row + j), p.width);
      sum += rho.value;
      if (p.gradient) store(row + j, rho.slope);
    }
    if (j < to) {
      const Rho<T> rho = rho_of<T, Kind>(load(row + j, to - j), p.width);  // rho(0) = 0
      sum += rho.value;
      if (p.gradient) store(row + j, rho.slope, to - j);
    }
    T total = 0;
    for (int i = 0; i < lanes; ++i) total += sum[i];
    return total;
  };
  for (int64_t r = begin; r < end; ++r) {
    T* row = p.gram + r * p.columns;
    if (p.gradient) {
      of_span(row, 0, r);
      row[r] = 0;
    }
    p.sums[r] = of_span(row, r + 1, p.columns);
  }
}

template <class T>
void rows(const PenaltyRows<T>& p, int64_t begin, int64_t end) {
  if (p.kind == PenaltyKind::abs) return rows_of<T, PenaltyKind::abs>(p, begin, end);
  if (p.kind == PenaltyKind::squared) return rows_of<T, PenaltyKind::squared>(p, begin, end);
  rows_of<T, PenaltyKind::huber>(p, begin, end);
}

}  // namespace

const MultiheadLossPenaltyKernels multihead_loss_penalty_kernels = {rows<float>, rows<double>};

}  // namespace fastkit::FASTKIT_ISA
