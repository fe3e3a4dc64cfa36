// Vectors of the instruction set that this file is being compiled for (namespace FASTKIT_ISA).
//
// Plain compiler vectors: arithmetic operators contract to FMA, and the few shuffles that an op needs are built here
// from two interleaves. FASTKIT_HALF_VECTORS, defined before this file, asks for at most 32 bytes: better where
// shuffles are many, since 64-byte ones run on a single port. Only headers whose functions are always inlined are
// included: a shared inline function compiled for AVX-512 could otherwise be the one that the linker keeps for all.
#pragma once

#include <cstdint>

#include "common/isa.h"

#ifdef FASTKIT_X86
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && !defined(FASTKIT_HALF_VECTORS)
#define FASTKIT_VECTOR_BYTES 64
#define FASTKIT_WIDTH bytes64
#elif defined(__AVX2__)
#define FASTKIT_VECTOR_BYTES 32
#define FASTKIT_WIDTH bytes32
#else
#define FASTKIT_VECTOR_BYTES 16
#define FASTKIT_WIDTH bytes16
#endif

namespace fastkit::FASTKIT_ISA {
inline namespace FASTKIT_WIDTH {  // two widths of one ISA are different functions

inline constexpr int kVectorBytes = FASTKIT_VECTOR_BYTES;
inline constexpr int kLineBytes = 64;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));  // elements of a cache line

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

#define FASTKIT_INLINE static FASTKIT_ALWAYS_INLINE

template <class T>
FASTKIT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
FASTKIT_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class T>
FASTKIT_INLINE Vec<T> load(const T* p, int64_t n) {  // n < lanes elements, zeros behind
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
}

template <class T>
FASTKIT_INLINE void store(T* p, Vec<T> v, int64_t n) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < n) p[i] = v[i];
  }
}

// Past the caches; p on a vector's boundary.
template <class T>
FASTKIT_INLINE void stream(T* p, Vec<T> v) {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(FASTKIT_X86)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}

// Into the second-level cache; any address will do.
FASTKIT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

FASTKIT_INLINE bool on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLineBytes == 0; }

// Within its scope subnormal numbers are zero (a decaying filter would otherwise live among them,
// slowly), and at its end streamed stores are visible to other threads.
class KernelScope {
 public:
#ifdef FASTKIT_X86
  KernelScope() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~KernelScope() {
    _mm_setcsr(saved_);
    _mm_sfence();
  }

 private:
  unsigned saved_;
#else
  KernelScope() {}
#endif
};

// --- interleaves ---------------------------------------------------------------------------------------------

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <class T, class Pick, int... I>
FASTKIT_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, Pick, Indices<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Pick::of(I)...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<T>::index{Pick::of(I)...});
#endif
}

// Of the elements of each 16-byte block: a0 b0 a1 b1 (High: from the block's middle).
template <class T, bool High>
struct ElementPick {
  static constexpr int of(int i) {
    constexpr int block = 16 / static_cast<int>(sizeof(T));
    int within = i % block;
    return i - within + within / 2 + (High ? block / 2 : 0) + (within % 2) * kLanes<T>;
  }
};

// Of whole 16-byte blocks: A0 B0 A1 B1 (High: from the vector's middle).
template <class T, bool High>
struct BlockPick {
  static constexpr int of(int i) {
    constexpr int block = 16 / static_cast<int>(sizeof(T));
    int which = i / block;
    int from = which / 2 + (High ? kLanes<T> / block / 2 : 0);
    return from * block + i % block + (which % 2) * kLanes<T>;
  }
};

template <class T, template <class, bool> class Pick, bool High>
FASTKIT_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return shuffle<T>(a, b, Pick<T, High>{}, typename MakeIndices<kLanes<T>>::type{});
}

// One stage over vectors v[0], v[stride], ...: (i, i + N/2) -> (2i, 2i + 1).
template <class T, template <class, bool> class Pick, int N>
FASTKIT_INLINE void interleave_stage(Vec<T>* v, int stride) {
  Vec<T> out[N];
  for (int i = 0; i < N / 2; ++i) {
    out[2 * i] = interleave<T, Pick, false>(v[i * stride], v[(i + N / 2) * stride]);
    out[2 * i + 1] = interleave<T, Pick, true>(v[i * stride], v[(i + N / 2) * stride]);
  }
  for (int i = 0; i < N; ++i) v[i * stride] = out[i];
}

// Transposes the square of kLanes vectors: first the squares of 16-byte blocks, then the blocks.
template <class T>
FASTKIT_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int block = 16 / static_cast<int>(sizeof(T));
  constexpr int blocks = kLanes<T> / block;
#pragma GCC unroll 16
  for (int g = 0; g < blocks; ++g) {
#pragma GCC unroll 4
    for (int n = 1; n < block; n *= 2) interleave_stage<T, ElementPick, block>(v + g * block, 1);
  }
#pragma GCC unroll 4
  for (int j = 0; j < block; ++j) {
#pragma GCC unroll 4
    for (int n = 1; n < blocks; n *= 2) interleave_stage<T, BlockPick, blocks>(v + j, block);
  }
  // v[g * block + j] now holds column g * block + j.
}

// Element i of the result is the sum of the elements of v[i]; v is used up.
template <class T>
FASTKIT_INLINE Vec<T> sum_each(Vec<T> (&v)[kLanes<T>]) {
  transpose<T>(v);
  Vec<T> total = v[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes<T>; ++i) total += v[i];
  return total;
}

}  // namespace FASTKIT_WIDTH
}  // namespace fastkit::FASTKIT_ISA
