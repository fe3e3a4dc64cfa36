// lora_linear on the CPU: everything but the products with the frozen weight, which are the vendor's.
//
// What       h = x A'^T and y += scale h B^T in one pass over the tokens; backward gh = scale gy B, gB and gbias from
//            one read of gy, gA and gx += gh A' from one read of x. The column sums of squares of x in the read of x
//            that A' makes anyway.
// Parallel   segments of tokens, each with sums of its own, which finish() adds up in order. In a segment a block of
//            kBlock tokens at a time, and of it a chunk of columns at a time, copied into the first-level cache: tiles
//            of kWide columns, in the type of arithmetic. Three kernels read the tiles:
//              project     h[token] += tile[token] P      lanes are ranks, a number of x meets a row of P
//              accumulate  S += h^T tile                  lanes are columns
//              expand      tile = h Q                     lanes are columns, added to what y holds
// Bytes      fp32, per element: forward reads x, reads and writes y; backward reads gy and x, reads and writes gx.
//            P and Q, (D + O) R numbers, are read again for each block, from the second-level cache.
// Numerics   sums run over all columns, and over the tokens of a segment, in the type of arithmetic; segments follow
//            the number of threads, and so may the last bit of gA, gB, gbias and the statistic.
#define FASTKIT_HALF_VECTORS  // ranks are few: of a longer vector more lanes would be empty
#include "cpu/simd.h"
#include "fastkit/lora_linear.h"

namespace fastkit::FASTKIT_ISA {
namespace {

constexpr int kBlock = 24;  // tokens; kernels take 4, 6 or 12 at a time
constexpr int kChunk = 4;   // tiles
constexpr int kVectors = 3;
constexpr int kAhead = 8;  // cache lines: how far a row is prefetched that is read,
constexpr int kNear = 2;   // tiles: and one that is added to
template <class T>
constexpr int kWide = kVectors * kLanes<T>;
template <class T>
constexpr int kTile = kBlock * kWide<T>;  // numbers

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

template <class T>
FASTKIT_INLINE int64_t tiles_of(int64_t columns) {
  return (columns + kWide<T> - 1) / kWide<T>;
}
// Ranks with the zeros that fill up the lanes; accumulate takes four at a time.
template <class T>
FASTKIT_INLINE int64_t padded(int64_t rank) {
  return up_to(rank, kLanes<T> < 4 ? 4 : kLanes<T>);
}

// --- the order in which matrices are read ----------------------------------------------------------------------

// P: the matrix (rank, columns) as (columns, padded ranks), zeros behind. element(r, k) is its element.
template <class T, class Element>
void pack_for_project(T* p, int64_t rank, int64_t columns, Element&& element) {
  const int64_t ranks = padded<T>(rank), all = tiles_of<T>(columns) * kWide<T>;
  for (int64_t i = columns * ranks; i < all * ranks; ++i) p[i] = 0;
  for (int64_t k = 0; k < columns; ++k) {
    for (int64_t r = 0; r < rank; ++r) p[k * ranks + r] = element(r, k);
    for (int64_t r = rank; r < ranks; ++r) p[k * ranks + r] = 0;
  }
}

// Q: the same matrix as (tiles, rank, kWide), zeros behind.
template <class T, class Element>
void pack_for_expand(T* q, int64_t rank, int64_t columns, Element&& element) {
  for (int64_t tile = 0; tile < tiles_of<T>(columns); ++tile) {
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t i = 0; i < kWide<T>; ++i) {
        const int64_t k = tile * kWide<T> + i;
        *q++ = k < columns ? element(r, k) : T{0};
      }
    }
  }
}

// --- tiles -----------------------------------------------------------------------------------------------------

// Columns [column, column + tiles * kWide) of n rows into tiles (tiles, kBlock, kWide), zeros behind the last column.
template <class E, class T = Arithmetic<E>>
FASTKIT_INLINE void copy_tiles(const Rows<const E>& rows, int64_t token, int n, int64_t column, int64_t columns,
                               int64_t tiles, T* to) {
  for (int i = 0; i < n; ++i) {
    const E* from = rows.row(token + i) + column;
    T* row = to + i * kWide<T>;
    for (int64_t left = columns - column; left > columns - column - tiles * kWide<T>; left -= kWide<T>) {
      prefetch(from + kAhead * kLine<E>);
      prefetch(from + (kAhead + 1) * kLine<E>);
      if (left >= kWide<T>) {
        for (int v = 0; v < kVectors; ++v) store(row + v * kLanes<T>, load(from + v * kLanes<T>));
      } else {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t n = left - v * kLanes<T>;
          store(row + v * kLanes<T>, n >= kLanes<T> ? load(from + v * kLanes<T>) : load(from + v * kLanes<T>, n));
        }
      }
      from += kWide<T>;
      row += kTile<T>;
    }
  }
}

// sums[k] += sum over n rows of term(tile[row][k])
template <class T, class Term>
FASTKIT_INLINE void sum_columns(const T* from, int n, int64_t tiles, T* sums, Term&& term) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const T* rows = from + tile * kTile<T>;
    Vec<T> sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = load(sums + v * kLanes<T>);
    for (int i = 0; i < n; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[v] = term(load(rows + i * kWide<T> + v * kLanes<T>), sum[v]);
    }
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes<T>, sum[v]);
    sums += kWide<T>;
  }
}

// h (kTokens, kOf vectors of ranks) += tiles P
template <int kTokens, int kOf, class T>
FASTKIT_INLINE void project_some(const T* from, int64_t tiles, const T* p, int64_t ranks, T* h) {
  Vec<T> sum[kTokens][kOf];
#pragma GCC unroll 12
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kOf; ++v) sum[i][v] = load(h + i * ranks + v * kLanes<T>);
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const T* rows = from + tile * kTile<T>;
    for (int k = 0; k < kWide<T>; ++k) {
      Vec<T> of_k[kOf];
#pragma GCC unroll 3
      for (int v = 0; v < kOf; ++v) of_k[v] = load(p + v * kLanes<T>);
#pragma GCC unroll 12
      for (int i = 0; i < kTokens; ++i) {
        const Vec<T> x = broadcast(rows[i * kWide<T> + k]);
#pragma GCC unroll 3
        for (int v = 0; v < kOf; ++v) sum[i][v] = fma<T>(x, of_k[v], sum[i][v]);
      }
      p += ranks;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kOf; ++v) store(h + i * ranks + v * kLanes<T>, sum[i][v]);
  }
}

// h (kBlock, ranks) += tiles P, of the first n tokens; p is P from the first column of the tiles on.
template <class T>
FASTKIT_INLINE void project(const T* from, int n, int64_t tiles, const T* p, int64_t ranks, T* h) {
  const auto some = [&](auto tokens, auto vectors, int64_t first) {
    constexpr int kTokens = decltype(tokens)::value, kOf = decltype(vectors)::value;
    for (int i = 0; i < n; i += kTokens) {
      project_some<kTokens, kOf>(from + i * kWide<T>, tiles, p + first, ranks, h + i * ranks + first);
    }
    return int64_t{kOf};
  };
  for (int64_t v = 0, all = ranks / kLanes<T>; v < all;) {  // as many sums as registers hold: 12
    const int64_t left = all - v, first = v * kLanes<T>;
    v += left >= 3 && left != 4 ? some(Count<4>{}, Count<3>{}, first)
         : left >= 2            ? some(Count<6>{}, Count<2>{}, first)
                                : some(Count<12>{}, Count<1>{}, first);
  }
}

// sums (tiles, ranks, kWide) += h^T tiles, over the first n tokens
template <class T>
FASTKIT_INLINE void accumulate(const T* from, int n, int64_t tiles, const T* h, int64_t ranks, T* sums) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const T* rows = from + tile * kTile<T>;
    for (int64_t first = 0; first < ranks; first += 4) {
      Vec<T> sum[4][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * kWide<T> + v * kLanes<T>);
      }
      for (int i = 0; i < n; ++i) {
        Vec<T> x[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) x[v] = load(rows + i * kWide<T> + v * kLanes<T>);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const Vec<T> of_r = broadcast(h[i * ranks + first + r]);
#pragma GCC unroll 3
          for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(of_r, x[v], sum[r][v]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) store(sums + r * kWide<T> + v * kLanes<T>, sum[r][v]);
      }
      sums += 4 * kWide<T>;
    }
  }
}

// n rows (+)= h Q
template <class E, class T = Arithmetic<E>>
FASTKIT_INLINE void expand(const T* h, int64_t ranks, int64_t rank, const T* q, int64_t columns, const Rows<E>& rows,
                           int64_t token, int n, bool adds) {
  constexpr int kTokens = 4;
  for (int64_t column = 0; column < columns; column += kWide<T>) {
    for (int i = 0; i < n; i += kTokens) {
      for (int j = 0; j < kTokens; ++j) {
        const E* ahead = rows.row(token + i + j) + column + kNear * kWide<T>;
        prefetch_near(ahead);
        prefetch_near(ahead + kLine<E>);
      }
      Vec<T> sum[kTokens][kVectors] = {};
      for (int64_t r = 0; r < rank; ++r) {
        Vec<T> of_r[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) of_r[v] = load(q + r * kWide<T> + v * kLanes<T>);
#pragma GCC unroll 4
        for (int j = 0; j < kTokens; ++j) {
          const Vec<T> of_token = broadcast(h[(i + j) * ranks + r]);
#pragma GCC unroll 3
          for (int v = 0; v < kVectors; ++v) sum[j][v] = fma<T>(of_token, of_r[v], sum[j][v]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j) {
        if (i + j >= n) break;
        E* to = rows.row(token + i + j) + column;
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          E* some = to + v * kLanes<T>;
          const int64_t left = columns - column - v * kLanes<T>;
          if (left >= kLanes<T>) {
            store(some, adds ? load(const_cast<const E*>(some)) + sum[j][v] : sum[j][v]);
          } else if (left > 0) {
            store(some, adds ? load(const_cast<const E*>(some), left) + sum[j][v] : sum[j][v], left);
          }
        }
      }
    }
    q += rank * kWide<T>;
  }
}

// --- passes ----------------------------------------------------------------------------------------------------

// step(first column, tiles) for each chunk
template <class T, class Step>
FASTKIT_INLINE void each_chunk(int64_t columns, Step&& step) {
  const int64_t all = tiles_of<T>(columns);
  for (int64_t tile = 0; tile < all; tile += kChunk) {
    step(tile * kWide<T>, all - tile < kChunk ? all - tile : int64_t{kChunk});
  }
}

// block(first token, tokens) for each block of a segment
template <class E, class Block>
FASTKIT_INLINE void each_block(const LoraLinear<E>& p, int64_t segment, Block&& block) {
  const int64_t all = (p.tokens + kBlock - 1) / kBlock;
  const int64_t end = all * (segment + 1) / p.segments;
  for (int64_t i = all * segment / p.segments; i < end; ++i) {
    const int64_t left = p.tokens - i * kBlock;
    block(i * kBlock, static_cast<int>(left < kBlock ? left : int64_t{kBlock}));
  }
}

template <class T>
FASTKIT_INLINE void zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// Where things lie in the room of a call.
template <class E>
struct ForwardRoom {
  using T = Arithmetic<E>;
  int64_t ranks, p, q, h, squares, segment;  // numbers
  const LoraLinearForward<E>& call;

  FASTKIT_ALWAYS_INLINE explicit ForwardRoom(const LoraLinearForward<E>& c) : call(c) {
    ranks = padded<T>(c.rank);
    p = tiles_of<T>(c.columns) * kWide<T> * ranks;
    q = up_to(tiles_of<T>(c.outputs) * kWide<T> * c.rank, 16);
    h = kBlock * ranks;
    squares = c.square_sum == nullptr ? 0 : tiles_of<T>(c.columns) * kWide<T>;
    segment = up_to(h + squares, 16);
  }
  FASTKIT_ALWAYS_INLINE int64_t all() const { return p + q + call.segments * segment; }
  FASTKIT_ALWAYS_INLINE T* of_p() const { return call.room; }
  FASTKIT_ALWAYS_INLINE T* of_q() const { return call.room + p; }
  FASTKIT_ALWAYS_INLINE T* of_h(int64_t s) const { return call.room + p + q + s * segment; }
  FASTKIT_ALWAYS_INLINE T* of_squares(int64_t s) const { return of_h(s) + h; }
};

template <class E>
int64_t forward_room(const LoraLinearForward<E>& p) {
  return ForwardRoom<E>(p).all();
}

template <class E>
void begin_forward(const LoraLinearForward<E>& p) {
  using T = Arithmetic<E>;
  const ForwardRoom<E> room(p);
  pack_for_project(room.of_p(), p.rank, p.columns, [&](int64_t r, int64_t k) {
    return p.mask == nullptr || p.mask[r * p.columns + k] ? p.a[r * p.columns + k] : T{0};
  });
  pack_for_expand(room.of_q(), p.rank, p.outputs, [&](int64_t r, int64_t o) { return p.scale * p.b[o * p.rank + r]; });
}

template <class E>
void run_forward(const LoraLinearForward<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  KernelScope scope;
  const ForwardRoom<E> room(p);
  const int64_t ranks = room.ranks;
  const bool same = p.observed.data == p.x.data && p.observed.stride == p.x.stride;
  const auto square = [](Vec<T> x, Vec<T> sum) { return fma<T>(x, x, sum); };
  alignas(kLineBytes) T tiles[kChunk * kTile<T>] = {};
  for (int64_t segment = begin; segment < end; ++segment) {
    T* h = room.of_h(segment);
    T* squares = room.of_squares(segment);
    zero(squares, room.squares);
    each_block(p, segment, [&](int64_t token, int n) {
      zero(h, room.h);
      each_chunk<T>(p.columns, [&](int64_t column, int64_t some) {
        copy_tiles(p.x, token, n, column, p.columns, some, tiles);
        project(tiles, n, some, room.of_p() + column * ranks, ranks, h);
        if (p.square_sum == nullptr) return;
        if (!same) copy_tiles(p.observed, token, n, column, p.columns, some, tiles);
        sum_columns(tiles, n, some, squares + column, square);
      });
      for (int i = 0; i < n; ++i) {
        for (int64_t r = 0; r < p.rank; ++r) p.h[(token + i) * p.rank + r] = h[i * ranks + r];
      }
      expand(h, ranks, p.rank, room.of_q(), p.outputs, p.y, token, n, true);
    });
  }
}

template <class E>
int64_t forward_tiles(const LoraLinearForward<E>& p) {
  return p.square_sum == nullptr ? 0 : tiles_of<Arithmetic<E>>(p.columns);
}

template <class E>
void finish_forward(const LoraLinearForward<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  const ForwardRoom<E> room(p);
  const int64_t last = end * kWide<T> < p.columns ? end * kWide<T> : p.columns;
  for (int64_t k = begin * kWide<T>; k < last; ++k) {
    T sum = 0;
    for (int64_t s = 0; s < p.segments; ++s) sum += room.of_squares(s)[k];
    p.square_sum[k] = static_cast<float>(sum);
  }
}

template <class E>
struct BackwardRoom {
  using T = Arithmetic<E>;
  int64_t ranks, p, q, h, sums_a, sums_b, bias, segment;  // numbers
  const LoraLinearBackward<E>& call;

  FASTKIT_ALWAYS_INLINE explicit BackwardRoom(const LoraLinearBackward<E>& c) : call(c) {
    const int64_t columns = tiles_of<T>(c.columns) * kWide<T>, outputs = tiles_of<T>(c.outputs) * kWide<T>;
    ranks = padded<T>(c.rank);
    p = outputs * ranks;
    q = c.gx.data == nullptr ? 0 : up_to(columns * c.rank, 16);
    h = kBlock * ranks;
    sums_a = c.ga == nullptr ? 0 : columns * ranks;
    sums_b = c.ga == nullptr ? 0 : outputs * ranks;
    bias = c.gbias == nullptr ? 0 : outputs;
    segment = up_to(2 * h + sums_a + sums_b + bias, 16);
  }
  FASTKIT_ALWAYS_INLINE int64_t all() const { return p + q + call.segments * segment; }
  FASTKIT_ALWAYS_INLINE T* of_p() const { return call.room; }
  FASTKIT_ALWAYS_INLINE T* of_q() const { return call.room + p; }
  FASTKIT_ALWAYS_INLINE T* of_h(int64_t s) const { return call.room + p + q + s * segment; }
  FASTKIT_ALWAYS_INLINE T* of_gh(int64_t s) const { return of_h(s) + h; }
  FASTKIT_ALWAYS_INLINE T* of_sums_a(int64_t s) const { return of_gh(s) + h; }
  FASTKIT_ALWAYS_INLINE T* of_sums_b(int64_t s) const { return of_sums_a(s) + sums_a; }
  FASTKIT_ALWAYS_INLINE T* of_bias(int64_t s) const { return of_sums_b(s) + sums_b; }
};

template <class E>
int64_t backward_room(const LoraLinearBackward<E>& p) {
  return BackwardRoom<E>(p).all();
}

template <class E>
void begin_backward(const LoraLinearBackward<E>& p) {
  using T = Arithmetic<E>;
  const BackwardRoom<E> room(p);
  pack_for_project(room.of_p(), p.rank, p.outputs, [&](int64_t r, int64_t o) { return p.scale * p.b[o * p.rank + r]; });
  if (p.gx.data == nullptr) return;
  pack_for_expand(room.of_q(), p.rank, p.columns, [&](int64_t r, int64_t k) {
    return p.mask == nullptr || p.mask[r * p.columns + k] ? p.a[r * p.columns + k] : T{0};
  });
}

template <class E>
void run_backward(const LoraLinearBackward<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  KernelScope scope;
  const BackwardRoom<E> room(p);
  const int64_t ranks = room.ranks;
  const auto plus = [](Vec<T> x, Vec<T> sum) { return sum + x; };
  alignas(kLineBytes) T tiles[kChunk * kTile<T>] = {};
  for (int64_t segment = begin; segment < end; ++segment) {
    T *h = room.of_h(segment), *gh = room.of_gh(segment);
    T *sums_a = room.of_sums_a(segment), *sums_b = room.of_sums_b(segment), *bias = room.of_bias(segment);
    zero(sums_a, room.sums_a + room.sums_b + room.bias);
    zero(h, room.h);
    each_block(p, segment, [&](int64_t token, int n) {
      if (p.ga != nullptr) {
        for (int i = 0; i < n; ++i) {
          for (int64_t r = 0; r < p.rank; ++r) h[i * ranks + r] = p.h[(token + i) * p.rank + r];
        }
      }
      zero(gh, room.h);
      each_chunk<T>(p.outputs, [&](int64_t column, int64_t some) {
        copy_tiles(p.gy, token, n, column, p.outputs, some, tiles);
        project(tiles, n, some, room.of_p() + column * ranks, ranks, gh);
        if (p.ga != nullptr) accumulate(tiles, n, some, h, ranks, sums_b + column * ranks);
        if (p.gbias != nullptr) sum_columns(tiles, n, some, bias + column, plus);
      });
      if (p.ga != nullptr) {
        each_chunk<T>(p.columns, [&](int64_t column, int64_t some) {
          copy_tiles(p.x, token, n, column, p.columns, some, tiles);
          accumulate(tiles, n, some, gh, ranks, sums_a + column * ranks);
        });
      }
      if (p.gx.data != nullptr) expand(gh, ranks, p.rank, room.of_q(), p.columns, p.gx, token, n, p.adds);
    });
  }
}

// Of the outputs first, then of the columns.
template <class E>
int64_t backward_tiles(const LoraLinearBackward<E>& p) {
  using T = Arithmetic<E>;
  return tiles_of<T>(p.outputs) + (p.ga == nullptr ? 0 : tiles_of<T>(p.columns));
}

template <class E>
void finish_backward(const LoraLinearBackward<E>& p, int64_t begin, int64_t end) {
  using T = Arithmetic<E>;
  const BackwardRoom<E> room(p);
  const int64_t of_outputs = tiles_of<T>(p.outputs);
  // The sum over the segments of what lies at `offset` from the sums of A.
  const auto total = [&](int64_t offset) {
    T sum = 0;
    for (int64_t s = 0; s < p.segments; ++s) sum += room.of_sums_a(s)[offset];
    return sum;
  };
  for (int64_t tile = begin; tile < end; ++tile) {
    const bool outputs = tile < of_outputs;
    const int64_t of_kind = outputs ? tile : tile - of_outputs, first = of_kind * kWide<T>;
    const int64_t columns = outputs ? p.outputs : p.columns;
    const int64_t n = columns - first < kWide<T> ? columns - first : int64_t{kWide<T>};
    for (int64_t r = 0; p.ga != nullptr && r < p.rank; ++r) {
      const int64_t row = (of_kind * room.ranks + r) * kWide<T>;
      for (int64_t i = 0; i < n; ++i) {
        if (outputs) {
          p.gb[(first + i) * p.rank + r] = p.scale * total(room.sums_a + row + i);
        } else {
          const int64_t to = r * p.columns + first + i;
          p.ga[to] = p.mask == nullptr || p.mask[to] ? total(row + i) : T{0};
        }
      }
    }
    for (int64_t i = 0; outputs && p.gbias != nullptr && i < n; ++i) {
      p.gbias[first + i] = total(room.sums_a + room.sums_b + first + i);
    }
  }
}

template <class E>
constexpr LoraLinearFunctions<E> kFunctions = {
    {forward_room<E>, begin_forward<E>, run_forward<E>, forward_tiles<E>, finish_forward<E>},
    {backward_room<E>, begin_backward<E>, run_backward<E>, backward_tiles<E>, finish_backward<E>},
};

}  // namespace

const LoraLinearKernels lora_linear_kernels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>,
                                               kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
