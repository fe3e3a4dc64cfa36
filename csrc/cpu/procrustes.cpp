// The factor of polar on the CPU: products of blocks, in the order that their sums depend on each other.
//
// What       G = X^T X, then steps: rational, (b/c) X + (a - b/c) X (1 + c G)^-1 by a Cholesky factor L; or quintic,
//            X (c0 + c1 G + c2 G^2). G again after each step: of the last it says whether X is orthogonal, and where
//            it is not the quintic steps are taken once more.
// Blocks     a matrix is squares of kWide x kWide numbers, each contiguous, one column of squares after the other, with
//            zeros behind the last row and column. Every product is sums of squares, accumulate(), whose one kernel
//            holds kTile rows of kVectors vectors in registers.
// Work       in multiply-adds, with n columns: G and G^2 n^3 / 2 each, of their squares only those on and above the
//            diagonal; X (..) n^3; L n^3 / 6, and two triangular systems of n^3 / 2 each.
// Parallel   squares of a product; of the Cholesky factor, and the first triangular system beside it, the squares of a
//            column; of the second system rows of squares.
// Numerics   sums in T, of kGroup squares each, and of these; none depends on the number of threads. The largest
//            singular value is estimated by powers of G, a little too low at most: kMargin covers it.
#include "cpu/simd.h"
#include "fastkit/procrustes.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kVectors = kVectorBytes == 64 ? 2 : 3;
template <class T>
constexpr int kWide = kVectors * kLanes<T>;
template <class T>  // rows whose sums are in registers, beside one row of vectors; a divisor of kWide
constexpr int kTile = kVectorBytes == 64 ? 8 : kManyRegisters ? 6 : kWide<T> % 4 == 0 ? 4 : 3;
template <class T>
constexpr int kSquare = kWide<T> * kWide<T>;
static_assert(kWide<float> % kTile<float> == 0 && kWide<double> % kTile<double> == 0);
template <class T>
constexpr int kGroup = 24 * 1024 / (kSquare<T> * static_cast<int>(sizeof(T)));  // squares that the first cache holds
constexpr int64_t kGrain = int64_t{1} << 17;  // multiply-adds that are worth a thread
constexpr int kPowers = 6;
constexpr double kMargin = 1.2;

template <class T>
struct Blocks {
  T* data = nullptr;
  int64_t rows = 0, columns = 0;  // in squares

  T* at(int64_t i, int64_t j) const { return data + (j * rows + i) * kSquare<T>; }
  int64_t across() const { return rows * kSquare<T>; }  // from a square to the next of its row
  int64_t size() const { return rows * columns * kSquare<T>; }
};

template <class T>
int64_t squares(int64_t n) {
  return (n + kWide<T> - 1) / kWide<T>;
}

// What a call works on, in one piece of memory.
template <class T>
struct Room {
  Blocks<T> x, y, gram, square;  // square: G^2, or L
  Blocks<T> across;              // the row of L that is being used, its squares transposed
  Blocks<T> inverse, inverse_t;  // of the diagonal squares of L
  Blocks<T> probe, image;        // what powers of G are applied to

  int64_t size = 0;

  static Room of(int64_t rows, int64_t columns, T* data) {  // null data: only its size is asked for
    const int64_t p = squares<T>(rows), q = squares<T>(columns);
    Room room;
    const auto take = [&](Blocks<T>& blocks, int64_t rows, int64_t columns) {
      blocks = {data == nullptr ? nullptr : data + room.size, rows, columns};
      room.size += blocks.size();
    };
    take(room.x, p, q), take(room.y, p, q), take(room.gram, q, q), take(room.square, q, q);
    take(room.across, q, 1), take(room.inverse, q, 1), take(room.inverse_t, q, 1);
    take(room.probe, q, 1), take(room.image, q, 1);
    return room;
  }
};

// Subnormal numbers are zero in it.
struct Flushing {
  KernelScope scope;
};
struct Keeping {};

template <class Scope = Flushing, class Body>
void each(ParallelRanges parallel, int64_t tasks, int64_t products, Body&& body) {  // products: of a task
  if (tasks <= 0) return;
  const auto call = [](void* context, int64_t begin, int64_t end) {
    [[maybe_unused]] const Scope scope{};
    for (int64_t task = begin; task < end; ++task) (*static_cast<Body*>(context))(task);
  };
  parallel(kGrain / (products + 1) + 1, tasks, call, &body);
}

// --- squares ---------------------------------------------------------------------------------------------------

template <class T>
FASTKIT_INLINE void clear(T* c) {
  for (int i = 0; i < kSquare<T>; ++i) c[i] = 0;
}
template <class T>
FASTKIT_INLINE void copy(const T* from, T* to) {
  for (int i = 0; i < kSquare<T>; ++i) to[i] = from[i];
}
template <class T>
FASTKIT_INLINE void transposed(const T* from, T* to) {
  for (int i = 0; i < kWide<T>; ++i) {
    for (int j = 0; j < kWide<T>; ++j) to[j * kWide<T> + i] = from[i * kWide<T> + j];
  }
}
// c = alpha c + beta from
template <class T>
FASTKIT_INLINE void combine(T* c, T alpha, const T* from, T beta) {
  for (int i = 0; i < kSquare<T>; ++i) c[i] = alpha * c[i] + beta * from[i];
}

// c += sum over k of a_k b_k, or of a_k^T b_k: squares `across` numbers apart, and one after another.
template <bool kTransposed, class T>
FASTKIT_INLINE void accumulate(T* c, const T* a, int64_t across, const T* b, int64_t count) {
  constexpr int of_row = kTransposed ? 1 : kWide<T>, of_k = kTransposed ? kWide<T> : 1;
  for (int64_t first = 0; first < count; first += kGroup<T>) {
    const int64_t last = count - first < kGroup<T> ? count : first + kGroup<T>;
    for (int row = 0; row < kWide<T>; row += kTile<T>) {
      T* sums = c + row * kWide<T>;
      Vec<T> sum[kTile<T>][kVectors] = {};
      for (int64_t k = first; k < last; ++k) {
        const T* of_a = a + k * across + row * of_row;
        const T* of_b = b + k * kSquare<T>;
        for (int m = 0; m < kWide<T>; ++m) {
          Vec<T> x[kVectors];
#pragma GCC unroll 3
          for (int v = 0; v < kVectors; ++v) x[v] = load(of_b + m * kWide<T> + v * kLanes<T>);
#pragma GCC unroll 8
          for (int r = 0; r < kTile<T>; ++r) {
            const Vec<T> factor = broadcast(of_a[r * of_row + m * of_k]);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(factor, x[v], sum[r][v]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTile<T>; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          T* to = sums + r * kWide<T> + v * kLanes<T>;
          store(to, load(to) + sum[r][v]);
        }
      }
    }
  }
}

// c (lower triangle) = L L^T, replaced by L with zeros above; inverse = L^-1. NaN where c is not positive definite.
template <class T>
void factor_square(T* c, T* inverse) {
  constexpr int n = kWide<T>;
  clear(inverse);
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < j; ++i) c[i * n + j] = 0;
    T pivot = c[j * n + j];
    for (int k = 0; k < j; ++k) pivot -= c[j * n + k] * c[j * n + k];
    pivot = IsSame<T, float> ? __builtin_sqrtf(pivot) : __builtin_sqrt(pivot);
    c[j * n + j] = pivot;
    for (int i = j + 1; i < n; ++i) {
      T sum = c[i * n + j];
      for (int k = 0; k < j; ++k) sum -= c[i * n + k] * c[j * n + k];
      c[i * n + j] = sum / pivot;
    }
  }
  for (int i = 0; i < n; ++i) {  // row i: (e_i - sum over k < i of L_ik row_k) / L_ii
    T* row = inverse + i * n;
    row[i] = 1;
    for (int k = 0; k < i; ++k) {
      for (int j = 0; j <= k; ++j) row[j] -= c[i * n + k] * inverse[k * n + j];
    }
    for (int j = 0; j <= i; ++j) row[j] /= c[i * n + i];
  }
}

// --- products --------------------------------------------------------------------------------------------------

// to = alpha a^T a + beta plus, symmetric: squares on and above the diagonal are computed, the others mirrored.
template <class T>
void symmetric(const Blocks<T>& a, const Blocks<T>& to, T alpha, T beta, const Blocks<T>& plus,
               ParallelRanges parallel) {
  const int64_t n = a.columns, count = n * (n + 1) / 2;
  each(parallel, count, a.rows * kSquare<T> * kWide<T>, [&](int64_t task) {
    int64_t j = 0;
    while (task > j) task -= ++j;  // task is now the row i <= j
    T c[kSquare<T>];
    clear(c);
    accumulate<true>(c, a.at(0, task), kSquare<T>, a.at(0, j), a.rows);
    if (alpha != 1 || beta != 0) combine(c, alpha, plus.at(task, j), beta);
    copy(c, to.at(task, j));
    if (task < j) transposed(c, to.at(j, task));
  });
}

// y = c0 x + x s
template <class T>
void times(const Blocks<T>& x, const Blocks<T>& s, T c0, const Blocks<T>& y, ParallelRanges parallel) {
  each(parallel, x.rows * x.columns, s.rows * kSquare<T> * kWide<T>, [&](int64_t task) {
    const int64_t i = task / x.columns, j = task % x.columns;  // a row of squares, far apart, stays in a cache
    T c[kSquare<T>];
    clear(c);
    accumulate<false>(c, x.at(i, 0), x.across(), s.at(0, j), s.rows);
    combine(c, T{1}, x.at(i, j), c0);
    copy(c, y.at(i, j));
  });
}

// to(i, k) = (from(i, k) - sum over m < k of to(i, m) L(k, m)^T) L(k, k)^-T
template <class T>
FASTKIT_INLINE void solve_square(const Room<T>& room, const Blocks<T>& from, const Blocks<T>& to, int64_t i,
                                 int64_t k) {
  T c[kSquare<T>];
  clear(c);
  accumulate<false>(c, to.at(i, 0), to.across(), room.across.data, k);
  combine(c, T{-1}, from.at(i, k), T{1});
  T* result = to.at(i, k);
  clear(result);
  accumulate<false>(result, c, 0, room.inverse_t.at(k, 0), 1);
}

// x = b / c x + (a - b / c) x (1 + c G)^-1; G is used up.
template <class T>
void rational_step(const Room<T>& room, const double* step, ParallelRanges parallel) {
  const T a = static_cast<T>(step[0] - step[1] / step[2]), b = static_cast<T>(step[1] / step[2]);
  const Blocks<T>&x = room.x, &y = room.y, &gram = room.gram, &lower = room.square;
  const int64_t n = gram.rows;
  each(parallel, n, n * kSquare<T>, [&](int64_t j) {
    for (int64_t i = j; i < n; ++i) {
      T* c = gram.at(i, j);
      for (int k = 0; k < kSquare<T>; ++k) c[k] *= static_cast<T>(step[2]);
    }
    for (int k = 0; k < kWide<T>; ++k) gram.at(j, j)[k * (kWide<T> + 1)] += 1;
  });
  for (int64_t k = 0; k < n; ++k) {
    {
      KernelScope scope;
      for (int64_t m = 0; m < k; ++m) transposed(lower.at(k, m), room.across.at(m, 0));
      T* c = lower.at(k, k);
      clear(c);
      accumulate<false>(c, lower.at(k, 0), lower.across(), room.across.data, k);
      combine(c, T{-1}, gram.at(k, k), T{1});
      factor_square(c, room.inverse.at(k, 0));
      transposed(room.inverse.at(k, 0), room.inverse_t.at(k, 0));
    }
    const int64_t below = n - k - 1;
    each(parallel, below + x.rows, (k + 1) * kSquare<T> * kWide<T>, [&](int64_t task) {
      if (task < below) {
        solve_square(room, gram, lower, k + 1 + task, k);
      } else {
        solve_square(room, x, y, task - below, k);
      }
    });
  }
  each(parallel, x.rows, n * n * kSquare<T> * kWide<T> / 2, [&](int64_t i) {
    for (int64_t k = n - 1; k >= 0; --k) {  // y(i, k) = (y(i, k) - sum over m > k of y(i, m) L(m, k)) L(k, k)^-1
      T c[kSquare<T>];
      clear(c);
      T* result = y.at(i, k);
      if (k + 1 < n) accumulate<false>(c, y.at(i, k + 1), y.across(), lower.at(k + 1, k), n - k - 1);
      combine(c, T{-1}, result, T{1});
      clear(result);
      accumulate<false>(result, c, 0, room.inverse.at(k, 0), 1);
    }
    for (int64_t k = 0; k < n; ++k) combine(x.at(i, k), b, y.at(i, k), a);
  });
}

// --- a matrix --------------------------------------------------------------------------------------------------

// x = m / 2^e, whose largest element is in [1, 2).
template <class T>
void read(const PolarMatrix<T>& p, const Blocks<T>& x, ParallelRanges parallel) {
  T largest = 0;
  Vec<T> most{}, nothing{};  // nothing: 0, or NaN where there is inf or NaN, which then is everywhere
  int64_t i = 0, count = p.rows * p.columns;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const Vec<T> x = load(p.m + i), size = x < Vec<T>{} ? -x : x;
    most = size > most ? size : most;
    nothing += x - x;
  }
  for (; i < count; ++i) {
    const T size = p.m[i] < 0 ? -p.m[i] : p.m[i];
    largest = size > largest ? size : largest;
    nothing[0] += size - size;
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    largest = most[lane] > largest ? most[lane] : largest;
    largest += nothing[lane];
  }
  int exponent = 0;
  (void)__builtin_frexp(static_cast<double>(largest), &exponent);
  if (!(largest > 0)) exponent = 1;
  const int first = (1 - exponent) / 2, second = 1 - exponent - first;  // of subnormal numbers the whole is too large
  const T scales[] = {static_cast<T>(__builtin_ldexp(1.0, first)), static_cast<T>(__builtin_ldexp(1.0, second))};
  each<Keeping>(parallel, x.columns, p.rows * kWide<T>, [&](int64_t j) {
    for (int64_t i = 0; i < x.rows * kWide<T>; ++i) {
      T* to = x.at(0, j) + i * kWide<T>;
      for (int64_t k = 0; k < kWide<T>; ++k) {
        const int64_t column = j * kWide<T> + k;
        to[k] = i < p.rows && column < p.columns ? p.m[i * p.columns + column] * scales[0] * scales[1] : T{0};
      }
    }
  });
}

template <class T>
void write(const PolarMatrix<T>& p, const Blocks<T>& x, ParallelRanges parallel) {
  each(parallel, x.columns, p.rows * kWide<T>, [&](int64_t j) {
    const int64_t first = j * kWide<T>, n = p.columns - first < kWide<T> ? p.columns - first : int64_t{kWide<T>};
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t k = 0; k < n; ++k) p.w[i * p.columns + first + k] = (x.at(0, j) + i * kWide<T>)[k];
    }
  });
}

// A little less than the largest eigenvalue of G: the most that its last power stretches one of kWide signs.
template <class T>
double largest_eigenvalue(const Room<T>& room, int64_t columns, ParallelRanges parallel) {
  const Blocks<T>& gram = room.gram;
  Blocks<T> from = room.probe, to = room.image;
  uint32_t bits = 1;
  for (int64_t i = 0; i < from.size(); ++i) {
    bits = bits * 1664525u + 1013904223u;
    from.data[i] = i / kWide<T> >= columns ? T{0} : bits >> 31 ? T{1} : T{-1};
  }
  double largest = 0;
  for (int power = 0; power < kPowers; ++power) {
    each(parallel, gram.rows, gram.rows * kSquare<T> * kWide<T>, [&](int64_t i) {
      clear(to.at(i, 0));
      accumulate<true>(to.at(i, 0), gram.at(0, i), kSquare<T>, from.data, gram.rows);
    });
    double sums[kWide<T>] = {};
    for (int64_t i = 0; i < to.size(); i += kWide<T>) {
      for (int k = 0; k < kWide<T>; ++k) sums[k] += static_cast<double>(to.data[i + k]) * to.data[i + k];
    }
    largest = 0;
    T inverse[kWide<T>];
    for (int k = 0; k < kWide<T>; ++k) {
      const double stretch = __builtin_sqrt(power == 0 ? sums[k] / columns : sums[k]);
      if (!(stretch <= largest)) largest = stretch;
      inverse[k] = static_cast<T>(1 / __builtin_sqrt(sums[k]));
    }
    for (int64_t i = 0; i < to.size(); i += kWide<T>) {
      for (int k = 0; k < kWide<T>; ++k) to.data[i + k] *= inverse[k];
    }
    const Blocks<T> other = from;
    from = to, to = other;
  }
  return largest;
}

// Whether no element of G - 1 is larger than the tolerance, or NaN.
template <class T>
bool orthogonal(const Blocks<T>& gram, int64_t columns, double tolerance) {
  Vec<T> most{}, nothing{};
  for (int64_t j = 0; j < gram.columns; ++j) {
    for (int64_t i = 0; i <= j; ++i) {
      T square[kSquare<T>];
      copy(gram.at(i, j), square);
      for (int64_t k = j * kWide<T>; i == j && k < columns && k < (j + 1) * kWide<T>; ++k) {
        square[k % kWide<T> * (kWide<T> + 1)] -= 1;
      }
      for (int k = 0; k < kSquare<T>; k += kLanes<T>) {
        const Vec<T> x = load(square + k), size = x < Vec<T>{} ? -x : x;
        most = size > most ? size : most;
        nothing += x - x;
      }
    }
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (!(most[lane] <= tolerance && nothing[lane] == 0)) return false;
  }
  return true;
}

template <class T>
int64_t room_of(int64_t rows, int64_t columns) {
  return Room<T>::of(rows, columns, nullptr).size;
}

template <class T>
bool factor(const PolarMatrix<T>& p, const PolarSchedule& schedule, ParallelRanges parallel) {
  Room<T> room = Room<T>::of(p.rows, p.columns, p.room);
  read(p, room.x, parallel);
  const auto take_gram = [&] { symmetric(room.x, room.gram, T{1}, T{0}, room.gram, parallel); };
  take_gram();
  const double bound = kMargin * kMargin * largest_eigenvalue(room, p.columns, parallel);
  for (int64_t i = 0; i < room.gram.size(); ++i) room.gram.data[i] *= static_cast<T>(1 / bound);
  for (int64_t i = 0; i < room.x.size(); ++i) room.x.data[i] *= static_cast<T>(1 / __builtin_sqrt(bound));
  for (int64_t i = 0; i < schedule.rational_count; ++i) {
    rational_step(room, schedule.rationals + 3 * i, parallel);
    take_gram();
  }
  bool done = false;
  for (int round = 0; round < 2 && !done; ++round) {
    for (int64_t i = 0; i < schedule.quintic_count; ++i) {
      const double* c = schedule.quintics + 3 * i;
      symmetric(room.gram, room.square, static_cast<T>(c[2]), static_cast<T>(c[1]), room.gram, parallel);
      times(room.x, room.square, static_cast<T>(c[0]), room.y, parallel);
      const Blocks<T> before = room.x;
      room.x = room.y, room.y = before;
      take_gram();
    }
    done = orthogonal(room.gram, p.columns, schedule.tolerance);
  }
  write(p, room.x, parallel);
  return done;
}

}  // namespace

const PolarKernels polar_kernels = {{room_of<float>, factor<float>}, {room_of<double>, factor<double>}};

}  // namespace fastkit::FASTKIT_ISA
