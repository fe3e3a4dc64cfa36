// Which instruction set the CPU kernels use: the best that the CPU has, or FASTKIT_CPU_ISA.
#pragma once

namespace fastkit {

enum class Isa { baseline, avx2, avx512 };

inline constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512};

const char* isa_name(Isa isa);
bool isa_usable(Isa isa);   // compiled into this library, and the CPU has it
Isa active_isa();           // chosen once, at the first call
const char* isa_refusal();  // null, or what is wrong with FASTKIT_CPU_ISA; then the best usable is active

}  // namespace fastkit

// For functions of headers that every ISA compiles: were one not inlined, the linker would keep a single copy, perhaps
// that of an instruction set which the CPU does not have.
#ifdef __CUDACC__
#define FASTKIT_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define FASTKIT_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

// FASTKIT_TABLE(Kernels, kernels) declares the tables that the per-ISA copies of a kernel file define, and
// kernels(isa), the one to use.
#ifdef FASTKIT_X86
#define FASTKIT_TABLE(Type, name)                              \
  namespace baseline { extern const Type name; }               \
  namespace avx2 { extern const Type name; }                   \
  namespace avx512 { extern const Type name; }                 \
  inline const Type& name(Isa isa = active_isa()) {            \
    return isa == Isa::avx512 ? avx512::name                   \
           : isa == Isa::avx2 ? avx2::name                     \
                              : baseline::name;                \
  }
#else
#define FASTKIT_TABLE(Type, name)                              \
  namespace baseline { extern const Type name; }               \
  inline const Type& name(Isa = active_isa()) { return baseline::name; }
#endif
