// icp_epoch on the CPU: an epoch of one restart.
//
// What       Search: scores x . k - |k|^2 / 2 of rows x against the mapped rows k of the other table, and the best of
//            each; none is stored. Then steps: the batch's four moments C = X^T Y / B, eight products of D x D, Adam.
// Order      kWide rows x, packed columns first once for all restarts, stay in the first-level cache while a block of
//            mapped rows, kTile at a time, is led past them.
// Parallel   restarts, by the caller; where these are few, panels of rows x, and rows of a product.
// Bytes      of a step the gathered batch, 4 B D numbers, and some 20 matrices: both stay in the second-level cache.
// Numerics   a score is a sum over the columns, one after another from -|k|^2 / 2 on, likewise for every pair: equal
//            rows have equal scores, of which the first is taken. A NaN never is. Costs are means of |x - k|^2 of the
//            pairs that were chosen, in double; so are the constants of Adam. Sums of a product run over its depth in
//            order, whatever the number of threads.
#include "fastkit/icp.h"

#include "cpu/products.h"
#include "fastkit/philox.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kTile = kManyRegisters ? 8 : 6;  // kTile kVectors sums, beside kVectors vectors, in registers
constexpr int64_t kBlockBytes = int64_t{1} << 17;  // of mapped rows that panels are led past
template <class T>
using Index = decltype(typename VectorOf<T>::index{}[0] + 0);

// --- products --------------------------------------------------------------------------------------------------------

// Rows of a multiple of kWide numbers, those beyond the columns zero.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t stride = 0;

  T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
FASTKIT_INLINE Left<T> plain(const Matrix<T>& m) {
  return {m.data, m.stride, 1};
}
template <class T>
FASTKIT_INLINE Left<T> transposed(const Matrix<T>& m) {
  return {m.data, 1, m.stride};
}

// emit(row, column, sums) for all vectors of a b.
template <class T, class Emit>
void multiply(const Left<T>& a, const Matrix<T>& b, int64_t rows, int64_t depth, ParallelRanges parallel,
              const Emit& emit) {
  in_ranges(parallel, (rows + kTile - 1) / kTile, kTile * depth * b.stride, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kTile < rows ? end * kTile : rows;
    for (int64_t column = 0; column < b.stride; column += kWide<T>) {
      int64_t row = begin * kTile;
      const auto tile = [&]<int kRows>() __attribute__((always_inline)) {
        product_tile<kRows>(a, row, b.data + column, b.stride, depth, [&](int r, int v, Vec<T> sum) {
          emit(row + r, column + v * kLanes<T>, sum);
        });
        row += kRows;
      };
      while (row + kTile <= last) tile.template operator()<kTile>();
      while (row + kTile / 2 <= last) tile.template operator()<kTile / 2>();
      while (row < last) tile.template operator()<1>();
    }
  });
}

// --- a restart -------------------------------------------------------------------------------------------------------

template <class T>
struct Room {
  struct Side {
    Matrix<T> map, map_t, first, second;  // W, W^T, and Adam's moments
    Matrix<T> own, other;                 // of a batch x and its targets: X^T X / B, Y^T X / B
    Matrix<T> mapped, cycle, gradient;    // W (own); W' W (own) - own; what is added to the gradient
    Matrix<T> batch, targets;
  };
  Side sides[2];  // source to target, target to source
  Matrix<T> keys;  // mapped rows, of one table after the other
  T* biases = nullptr;
  T* best = nullptr;
  Index<T>* best_index = nullptr;
  int32_t* orders[2] = {};
  int32_t* spare = nullptr;
  uint32_t* words[2] = {};
  int64_t bytes = 0;

  static Room of(const ICPCall<T>& call, char* data) {  // null data: only its size is asked for
    const int64_t columns = call.columns, stride = up_to(columns, kWide<T>);
    const int64_t n = call.source.count, m = call.target.count, most = n > m ? n : m;
    const int64_t batch = call.batch_size < most ? call.batch_size : most;
    Room room;
    const auto take = [&]<class U>(U*& pointer, int64_t count) {
      pointer = data == nullptr ? nullptr : reinterpret_cast<U*>(data + room.bytes);
      room.bytes += up_to(count * static_cast<int64_t>(sizeof(U)), kLineBytes);
    };
    const auto take_matrix = [&](Matrix<T>& matrix, int64_t rows) {
      take(matrix.data, rows * stride);
      matrix.stride = stride;
    };
    for (Side& side : room.sides) {
      Matrix<T>* const squares[] = {&side.map,   &side.map_t,  &side.first, &side.second,  &side.own,
                                    &side.other, &side.mapped, &side.cycle, &side.gradient};
      for (Matrix<T>* square : squares) take_matrix(*square, columns);
      take_matrix(side.batch, batch), take_matrix(side.targets, batch);
    }
    take_matrix(room.keys, up_to(most, kTile)), take(room.biases, up_to(most, kTile));
    take(room.best, up_to(most, kWide<T>)), take(room.best_index, up_to(most, kWide<T>));
    take(room.orders[0], n), take(room.orders[1], m), take(room.spare, most);
    take(room.words[0], most), take(room.words[1], most);
    return room;
  }
};

// --- search ----------------------------------------------------------------------------------------------------------

template <class T>
int64_t packed_size(int64_t rows, int64_t columns) {
  return up_to(rows, kWide<T>) * columns;
}

// kWide rows after kWide rows as (columns, kWide), zeros behind the last.
template <class T>
void pack(const ICPTable<T>& table, int64_t columns, T* to) {
  for (int64_t first = 0; first < table.count; first += kWide<T>) {
    for (int64_t d = 0; d < columns; ++d) {
      for (int64_t i = first; i < first + kWide<T>; ++i) *to++ = i < table.count ? table.rows[i * columns + d] : T{0};
    }
  }
}

// keys = table W^T, and -|k|^2 / 2 of each; behind the last, as many as fill a tile, rows that are never the best.
template <class T>
void map_rows(const ICPTable<T>& table, int64_t columns, const Matrix<T>& map_t, const Room<T>& room,
              ParallelRanges parallel) {
  const Left<T> rows{table.rows, columns, 1};
  multiply(rows, map_t, table.count, columns, parallel,
           [&](int64_t row, int64_t column, Vec<T> sum) { store(room.keys.row(row) + column, sum); });
  in_ranges(parallel, table.count, columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Vec<T> sum{};
      for (int64_t d = 0; d < room.keys.stride; d += kLanes<T>) {
        const Vec<T> x = load(room.keys.row(i) + d);
        sum = fma<T>(x, x, sum);
      }
      T total = 0;
      for (int lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
      room.biases[i] = -total / 2;
    }
  });
  for (int64_t i = table.count; i % kTile != 0; ++i) {
    room.biases[i] = -kInfinity<T>;
    for (int64_t d = 0; d < room.keys.stride; ++d) room.keys.row(i)[d] = 0;
  }
}

// Whether any element of a is greater than that of b.
template <class T>
FASTKIT_INLINE bool any_greater(Vec<T> a, Vec<T> b) {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
  if constexpr (IsSame<T, float>) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  if constexpr (IsSame<T, double>) return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
  if constexpr (IsSame<T, float>) return _mm256_movemask_ps((__m256)(a > b)) != 0;
  if constexpr (IsSame<T, double>) return _mm256_movemask_pd((__m256d)(a > b)) != 0;
#elif defined(FASTKIT_X86)
  if constexpr (IsSame<T, float>) return _mm_movemask_ps((__m128)(a > b)) != 0;
  if constexpr (IsSame<T, double>) return _mm_movemask_pd((__m128d)(a > b)) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)(a > b)) != 0;
#else
  for (int i = 0; i < kLanes<T>; ++i) {
    if (a[i] > b[i]) return true;
  }
  return false;
#endif
}

// The scores of kWide packed rows and kTile keys; the best so far, and its index, kept up to date.
template <class T>
FASTKIT_INLINE void search_tile(const T* packed, const Matrix<T>& keys, const T* biases, int64_t key, int64_t columns,
                                T* best, Index<T>* best_index) {
  const T* rows[kTile];
  Vec<T> sum[kTile][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) {
    rows[r] = keys.row(key + r);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(biases[key + r]);
  }
  for (int64_t d = 0; d < columns; ++d) {
    Vec<T> x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) x[v] = load(packed + d * kWide<T> + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      const Vec<T> k = broadcast(rows[r][d]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(k, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> before = load(static_cast<const T*>(best + v * kLanes<T>));
    Vec<T> most = before;
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) most = sum[r][v] > most ? sum[r][v] : most;  // not where it is NaN
    if (!any_greater<T>(most, before)) continue;
    typename VectorOf<T>::index index, found;
    __builtin_memcpy(&index, best_index + v * kLanes<T>, sizeof(index));
    found = index;
#pragma GCC unroll 8
    for (int r = kTile - 1; r >= 0; --r) {  // of equal scores the first
      const auto which = static_cast<Index<T>>(key + r) - typename VectorOf<T>::index{};
      found = sum[r][v] == most ? which : found;
    }
    index = most > before ? found : index;
    store(best + v * kLanes<T>, most);
    __builtin_memcpy(best_index + v * kLanes<T>, &index, sizeof(index));
  }
}

// Of each row of `table` the nearest of the mapped rows of `other`, -1 if none is; and the mean of squared distances.
template <class T>
double search(const ICPTable<T>& table, const ICPTable<T>& other, int64_t columns, const Matrix<T>& map_t,
              const Room<T>& room, int64_t* nearest, bool given, ParallelRanges parallel) {
  map_rows(other, columns, map_t, room, parallel);
  const int64_t keys = up_to(other.count, kTile);
  const int64_t block = up_to(kBlockBytes / (room.keys.stride * static_cast<int64_t>(sizeof(T))) + 1, kTile);
  if (!given) {
    const int64_t panels = (table.count + kWide<T> - 1) / kWide<T>;
    in_ranges(parallel, panels, kWide<T> * keys * columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kWide<T>; i < end * kWide<T>; ++i) room.best[i] = -kInfinity<T>, room.best_index[i] = -1;
      for (int64_t first = 0; first < keys; first += block) {
        const int64_t last = first + block < keys ? first + block : keys;
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t row = panel * kWide<T>;
          for (int64_t key = first; key < last; key += kTile) {
            search_tile(table.packed + row * columns, room.keys, room.biases, key, columns, room.best + row,
                        room.best_index + row);
          }
        }
      }
    });
    for (int64_t i = 0; i < table.count; ++i) nearest[i] = room.best_index[i];
  }
  double sum = 0;
  for (int64_t i = 0; i < table.count; ++i) {
    if (nearest[i] < 0 || nearest[i] >= other.count) return kInfinity<double>;
    const T *row = table.rows + i * columns, *key = room.keys.row(nearest[i]);
    Vec<T> squares{};
    const auto add = [&](Vec<T> x, Vec<T> k) {
      const Vec<T> difference = x - k;
      squares = fma<T>(difference, difference, squares);
    };
    int64_t d = 0;
    for (; d + kLanes<T> <= columns; d += kLanes<T>) add(load(row + d), load(key + d));
    if (d < columns) add(load(row + d, columns - d), load(key + d, columns - d));
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(squares[lane]);
  }
  return sum / static_cast<double>(table.count);
}

// --- order -----------------------------------------------------------------------------------------------------------

// Sorts `count` rows by their words, which are in words[0], by digits from the last; equal ones keep their order.
template <class T>
void sort_by_words(const Room<T>& room, int32_t*& rows, int64_t count) {
  constexpr int kDigits = 3, kBits = 11;
  uint32_t *from = room.words[0], *to = room.words[1];
  int32_t *rows_from = rows, *rows_to = room.spare;
  for (int digit = 0; digit < kDigits; ++digit) {
    const auto of = [&](uint32_t word) { return word >> (digit * kBits) & ((1u << kBits) - 1); };
    int64_t places[1 << kBits] = {};
    for (int64_t i = 0; i < count; ++i) ++places[of(from[i])];
    int64_t before = 0;
    for (int64_t& place : places) {
      const int64_t here = place;
      place = before, before += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = places[of(from[i])]++;
      to[at] = from[i], rows_to[at] = rows_from[i];
    }
    uint32_t* const words = from;
    from = to, to = words;
    int32_t* const other = rows_from;
    rows_from = rows_to, rows_to = other;
  }
  if (rows_from == rows) return;
  for (int64_t i = 0; i < count; ++i) rows[i] = rows_from[i];
}

// Rows of a table in the order in which they are visited, and how many: all, or those whose nearest's nearest they are.
template <class T>
int64_t visit_order(const ICPCall<T>& call, const ICPRestart<T>& restart, int side, const Room<T>& room) {
  const int64_t count = side == 0 ? call.source.count : call.target.count;
  const int64_t* forth = side == 0 ? restart.nearest_target : restart.nearest_source;
  const int64_t* back = side == 0 ? restart.nearest_source : restart.nearest_target;
  int64_t visited = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (call.mutual_only && back[forth[i]] != i) continue;
    room.words[0][visited] = philox_word(restart.seed, static_cast<uint32_t>(i), call.epoch, static_cast<uint32_t>(side));
    room.orders[side][visited++] = static_cast<int32_t>(i);
  }
  int32_t* rows = room.orders[side];
  sort_by_words(room, rows, visited);
  return visited;
}

// --- steps -----------------------------------------------------------------------------------------------------------

template <class T>
void gather(const ICPTable<T>& table, int64_t columns, int64_t row, T* to, int64_t stride) {
  for (int64_t d = 0; d < columns; ++d) to[d] = table.rows[row * columns + d];
  for (int64_t d = columns; d < stride; ++d) to[d] = 0;
}

template <class T>
void transpose_square(const Matrix<T>& from, const Matrix<T>& to, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < to.stride; ++j) to.row(i)[j] = j < columns ? from.row(j)[i] : T{0};
  }
}

template <class T>
void load_map(const T* from, const typename Room<T>::Side& side, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < side.map.stride; ++j) {
      side.map.row(i)[j] = j < columns ? from[i * columns + j] : T{0};
      side.first.row(i)[j] = side.second.row(i)[j] = 0;
    }
  }
  transpose_square(side.map, side.map_t, columns);
}

// The moments of a batch, and of them what does not need the other side.
template <class T>
void take_moments(const typename Room<T>::Side& side, int64_t columns, int64_t batch, ParallelRanges parallel) {
  const Vec<T> share = broadcast(T{1} / static_cast<T>(batch));
  const auto into = [&](const Matrix<T>& to) {
    return [&, share](int64_t row, int64_t column, Vec<T> sum) { store(to.row(row) + column, sum * share); };
  };
  multiply(transposed(side.batch), side.batch, columns, batch, parallel, into(side.own));
  multiply(transposed(side.targets), side.batch, columns, batch, parallel, into(side.other));
  multiply(plain(side.map), side.own, columns, columns, parallel,
           [&](int64_t row, int64_t column, Vec<T> sum) { store(side.mapped.row(row) + column, sum); });
}

// gradient = W'^T P + Q W'^T, of this side's map W: with P = W' W (own) - own, and Q that of the other side.
template <class T>
void take_cycle(const typename Room<T>::Side& side, const typename Room<T>::Side& other, int64_t columns,
                ParallelRanges parallel) {
  multiply(plain(other.map_t), side.cycle, columns, columns, parallel,
           [&](int64_t row, int64_t column, Vec<T> sum) { store(side.gradient.row(row) + column, sum); });
  multiply(plain(other.cycle), other.map_t, columns, columns, parallel, [&](int64_t row, int64_t column, Vec<T> sum) {
    T* to = side.gradient.row(row) + column;
    store(to, load(to) + sum);
  });
}

// Adam, with the whole gradient: mapped - other + cycle_weight gradient.
template <class T>
void update(const ICPCall<T>& call, const typename Room<T>::Side& side, double left1, double left2,
            ParallelRanges parallel) {
  const auto constant = [](double x) { return broadcast(static_cast<T>(x)); };
  const Vec<T> cycle_weight = constant(call.cycle_weight), rate = constant(call.lr / left1);
  const Vec<T> root = constant(__builtin_sqrt(left2)), eps = constant(call.eps);
  const Vec<T> beta1 = constant(call.beta1), rest1 = constant(1 - call.beta1);
  const Vec<T> beta2 = constant(call.beta2), rest2 = constant(1 - call.beta2);
  in_ranges(parallel, call.columns, 8 * call.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < call.columns; j += kLanes<T>) {
        const auto at = [&](const Matrix<T>& matrix) { return matrix.row(i) + j; };
        const Vec<T> plain = load(at(side.mapped)) - load(at(side.other));
        const Vec<T> g = fma<T>(cycle_weight, load(at(side.gradient)), plain);
        const Vec<T> first = fma<T>(beta1, load(at(side.first)), rest1 * g);
        const Vec<T> second = fma<T>(beta2, load(at(side.second)), rest2 * g * g);
        const Vec<T> step = rate * first / (square_root<T>(second) / root + eps);
        store(at(side.first), first), store(at(side.second), second);
        const int64_t left = call.columns - j;  // beyond the columns 0 / eps, which may be 0
        if (left >= kLanes<T>) {
          store(at(side.map), load(at(side.map)) - step);
        } else {
          store(at(side.map), load(at(side.map)) - step, left);
        }
      }
    }
  });
  transpose_square(side.map, side.map_t, call.columns);
}

template <class T>
void take_steps(const ICPCall<T>& call, const ICPRestart<T>& restart, const Room<T>& room, ParallelRanges parallel) {
  const int64_t columns = call.columns;
  const auto &forth = room.sides[0], &back = room.sides[1];
  const int64_t of_source = visit_order(call, restart, 0, room), of_target = visit_order(call, restart, 1, room);
  const int64_t visited = of_source < of_target ? of_source : of_target;
  const int64_t batch = call.batch_size < visited || !call.mutual_only ? call.batch_size : visited;
  double power1 = 1, power2 = 1;
  for (int64_t first = 0; batch > 0 && first + batch <= visited; first += batch) {
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t x = room.orders[0][first + i], y = room.orders[1][first + i];
      gather(call.source, columns, x, forth.batch.row(i), forth.batch.stride);
      gather(call.target, columns, restart.nearest_target[x], forth.targets.row(i), forth.batch.stride);
      gather(call.target, columns, y, back.batch.row(i), back.batch.stride);
      gather(call.source, columns, restart.nearest_source[y], back.targets.row(i), back.batch.stride);
    }
    for (const auto& side : room.sides) take_moments<T>(side, columns, batch, parallel);
    for (int s = 0; s < 2; ++s) {
      const auto &side = room.sides[s], &other = room.sides[1 - s];
      multiply(plain(other.map), side.mapped, columns, columns, parallel, [&](int64_t row, int64_t column, Vec<T> sum) {
        store(side.cycle.row(row) + column, sum - load(side.own.row(row) + column));
      });
    }
    take_cycle<T>(forth, back, columns, parallel);
    take_cycle<T>(back, forth, columns, parallel);
    power1 *= call.beta1, power2 *= call.beta2;
    for (const auto& side : room.sides) update<T>(call, side, 1 - power1, 1 - power2, parallel);
  }
}

template <class T>
int64_t room_bytes(const ICPCall<T>& call) {
  return Room<T>::of(call, nullptr).bytes;
}

template <class T>
void epoch(const ICPCall<T>& call, const ICPRestart<T>& restart, ParallelRanges parallel) {
  ExactScope scope;
  const Room<T> room = Room<T>::of(call, restart.room);
  const auto &forth = room.sides[0], &back = room.sides[1];
  load_map<T>(restart.w_xy, forth, call.columns), load_map<T>(restart.w_yx, back, call.columns);
  const double costs[] = {
      search(call.source, call.target, call.columns, back.map_t, room, restart.nearest_target, restart.given, parallel),
      search(call.target, call.source, call.columns, forth.map_t, room, restart.nearest_source, restart.given,
             parallel)};
  int64_t mutual = 0;
  for (int64_t i = 0; i < call.source.count; ++i) {
    const int64_t j = restart.nearest_target[i];
    mutual += j >= 0 && j < call.target.count && restart.nearest_source[j] == i;
  }
  *restart.mutual = mutual;
  const bool finite = costs[0] < kInfinity<double> && costs[1] < kInfinity<double>;  // and neither is NaN
  *restart.cost = static_cast<T>(!finite ? kInfinity<double> : costs[0] < costs[1] ? costs[0] : costs[1]);
  if (finite) take_steps(call, restart, room, parallel);
  for (int64_t i = 0; i < call.columns; ++i) {
    for (int64_t j = 0; j < call.columns; ++j) {
      restart.next_xy[i * call.columns + j] = forth.map.row(i)[j];
      restart.next_yx[i * call.columns + j] = back.map.row(i)[j];
    }
  }
}

template <class T>
constexpr ICPFunctions<T> kFunctions = {packed_size<T>, pack<T>, room_bytes<T>, epoch<T>};

}  // namespace

const ICPKernels icp_kernels = {kFunctions<float>, kFunctions<double>};

}  // namespace fastkit::FASTKIT_ISA
