// Vectors of the instruction set that this file is being compiled for (namespace FASTKIT_ISA).
//
// Plain compiler vectors: arithmetic operators contract to FMA, and the few shuffles that an op needs are built here
// from two interleaves. FASTKIT_HALF_VECTORS, defined before this file, asks for at most 32 bytes: better where
// shuffles are many, since 64-byte ones run on a single port. Only headers whose functions are always inlined are
// included: a shared inline function compiled for AVX-512 could otherwise be the one that the linker keeps for all.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/element.h"

#ifdef FASTKIT_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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
#ifdef __aarch64__
inline constexpr bool kManyRegisters = true;  // 32 of vectors, not 16
#else
inline constexpr bool kManyRegisters = kVectorBytes == 64;
#endif

template <class E>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Arithmetic<E>));
template <class E>
inline constexpr int kLine = kLineBytes / static_cast<int>(sizeof(E));  // elements of a cache line

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

// kLanes elements, in the type of arithmetic: reading widens half precision, writing rounds to it.
template <class E>
using Vec = typename VectorOf<Arithmetic<E>>::type;

#define FASTKIT_INLINE static FASTKIT_ALWAYS_INLINE

template <class T>
inline constexpr T kInfinity = __builtin_inf();

// n, up to a multiple.
FASTKIT_INLINE int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// --- half precision ------------------------------------------------------------------------------------------

template <class E>
inline constexpr bool kIsHalf = IsSame<E, BFloat16> || IsSame<E, Half>;

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <class E>
FASTKIT_INLINE Vec<float> widen(Halves h) {
  if constexpr (IsSame<E, BFloat16>) {
    return (Vec<float>)(__builtin_convertvector(h, Words) << 16);
  } else {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);  // plain, gcc 12 warns of what its own header does
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
    return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (Vec<float>)vcvt_f32_f16((float16x4_t)h);
#else
    const Words w = __builtin_convertvector(h, Words);
    const Words magnitude = w & 0x7fff, sign = (w & 0x8000) << 16;
    const Words normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | (255u << 23);
    const Words subnormal = (Words)(__builtin_convertvector(magnitude, Vec<float>) * 0x1p-24f);
    const Words below = (Words)(magnitude < 0x400), above = (Words)(magnitude >= 0x7c00);
    return (Vec<float>)(sign | (subnormal & below) | (special & above) | (normal & ~below & ~above));
#endif
  }
}

// Rounds to the nearest, ties to even.
template <class E>
FASTKIT_INLINE Halves narrow(Vec<float> v) {
  const Words w = (Words)v;
  if constexpr (IsSame<E, BFloat16>) {
    const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    const Words is_nan = (Words)((w & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((rounded & ~is_nan) | (((w >> 16) | 0x40) & is_nan), Halves);
  } else {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
    return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
    return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (Halves)vcvt_f16_f32((float32x4_t)v);
#else
    const Words magnitude = w & 0x7fffffff, sign = (w >> 16) & 0x8000;
    const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Words half = Words{} + (126u << 23);  // 0.5: its last bit is the smallest half's
    const Words subnormal = (Words)((Vec<float>)magnitude + (Vec<float>)half) - half;
    const Words below = (Words)(magnitude < (113u << 23)), above = (Words)(magnitude >= 0x47800000);
    const Words special = 0x7c00 | ((Words)(magnitude > 0x7f800000) & 0x200);
    return __builtin_convertvector(
        sign | (subnormal & below) | (special & above) | (normal & ~below & ~above), Halves);
#endif
  }
}

// --- arithmetic ----------------------------------------------------------------------------------------------

// a b + c and c - a b, with one rounding where the instruction set can, on every path. Which products the operators
// contract is the compiler's choice, and copies of the same expression, as loops have for whole and for partial
// vectors, may differ in the last bit.
template <class T>
FASTKIT_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (IsSame<T, float>) return (Vec<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  if constexpr (IsSame<T, double>) return (Vec<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

template <class T>
FASTKIT_INLINE Vec<T> fnma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (IsSame<T, float>) return (Vec<T>)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  if constexpr (IsSame<T, double>) return (Vec<T>)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return c - a * b;
#endif
}

template <class T>
FASTKIT_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class T>
FASTKIT_INLINE Vec<T> square_root(Vec<T> v) {
#if defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 64
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);  // plain, gcc 12 warns
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif defined(FASTKIT_X86) && FASTKIT_VECTOR_BYTES == 32
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm256_sqrt_ps((__m256)v);
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#elif defined(FASTKIT_X86)
  if constexpr (IsSame<T, float>) return (Vec<T>)_mm_sqrt_ps((__m128)v);
  if constexpr (IsSame<T, double>) return (Vec<T>)_mm_sqrt_pd((__m128d)v);
#elif defined(__aarch64__)
  if constexpr (IsSame<T, float>) return (Vec<T>)vsqrtq_f32((float32x4_t)v);
  if constexpr (IsSame<T, double>) return (Vec<T>)vsqrtq_f64((float64x2_t)v);
#else
  for (int i = 0; i < kLanes<T>; ++i) v[i] = IsSame<T, float> ? __builtin_sqrtf(v[i]) : __builtin_sqrt(v[i]);
  return v;
#endif
}

// Of single numbers.
FASTKIT_INLINE float fma_one(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
FASTKIT_INLINE double fma_one(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
template <class T>
FASTKIT_INLINE T fnma_one(T a, T b, T c) {
  return fma_one(-a, b, c);
}

// --- memory --------------------------------------------------------------------------------------------------

template <class E>
FASTKIT_INLINE Vec<E> load(const E* p) {
  if constexpr (kIsHalf<E>) {
    return widen<E>(*reinterpret_cast<const UnalignedHalves*>(p));
  } else {
    return *reinterpret_cast<const typename VectorOf<E>::unaligned*>(p);
  }
}

template <class E>
FASTKIT_INLINE void store(E* p, Vec<E> v) {
  if constexpr (kIsHalf<E>) {
    *reinterpret_cast<UnalignedHalves*>(p) = narrow<E>(v);
  } else {
    *reinterpret_cast<typename VectorOf<E>::unaligned*>(p) = v;
  }
}

template <class E>
FASTKIT_INLINE Vec<E> load(const E* p, int64_t n) {  // n < lanes elements, zeros behind
  if constexpr (kIsHalf<E>) {
    Halves h{};
    for (int i = 0; i < kLanes<E>; ++i) {
      if (i < n) h[i] = p[i].bits;
    }
    return widen<E>(h);
  } else {
    Vec<E> v{};
    for (int i = 0; i < kLanes<E>; ++i) {
      if (i < n) v[i] = p[i];
    }
    return v;
  }
}

template <class E>
FASTKIT_INLINE void store(E* p, Vec<E> v, int64_t n) {
  if constexpr (kIsHalf<E>) {
    const Halves h = narrow<E>(v);
    for (int i = 0; i < kLanes<E>; ++i) {
      if (i < n) p[i].bits = h[i];
    }
  } else {
    for (int i = 0; i < kLanes<E>; ++i) {
      if (i < n) p[i] = v[i];
    }
  }
}

// Past the caches; p on a boundary of what is written.
template <class E>
FASTKIT_INLINE void stream(E* p, Vec<E> v) {
#ifdef FASTKIT_X86
  if constexpr (kIsHalf<E>) {
    const Halves h = narrow<E>(v);
#if FASTKIT_VECTOR_BYTES == 64
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif FASTKIT_VECTOR_BYTES == 32
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
    *reinterpret_cast<UnalignedHalves*>(p) = h;
#endif
  } else {
#if FASTKIT_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif FASTKIT_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  }
#else
  store(p, v);
#endif
}

// Element by element.
template <class E>
FASTKIT_INLINE Arithmetic<E> widened(E value) {
  if constexpr (kIsHalf<E>) {
    return widen<E>(Halves{} + value.bits)[0];
  } else {
    return value;
  }
}

template <class E>
FASTKIT_INLINE E rounded(Arithmetic<E> value) {
  if constexpr (kIsHalf<E>) {
    return {narrow<E>(Vec<E>{} + value)[0]};
  } else {
    return value;
  }
}

// Into the second-level cache; any address will do.
FASTKIT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Into the first-level cache: of what is soon written, whose line is read first.
FASTKIT_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

FASTKIT_INLINE bool on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLineBytes == 0; }

// Within its scope subnormal numbers are zero on x86 (a decaying filter would otherwise live among them,
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

// Subnormal numbers are kept within its scope, whatever the mode of the thread: every thread gives the same bits.
class ExactScope {
 public:
#ifdef FASTKIT_X86
  ExactScope() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~ExactScope() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  ExactScope() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    set(saved_ & ~(uint64_t{1} << 24));  // FZ
  }
  ~ExactScope() { set(saved_); }

 private:
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }

  uint64_t saved_;
#else
  ExactScope() {}
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
