// Chooses the instruction set of the CPU kernels, once.
#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastkit {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

bool isa_usable(Isa isa) {
#ifdef FASTKIT_X86
  switch (isa) {
    case Isa::avx512:
      return isa_usable(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2");  // and F16C: whatever has AVX2 has it
    default: return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

namespace {

struct Choice {
  Isa isa = Isa::baseline;
  const char* refusal = nullptr;

  Choice() {
    for (Isa candidate : kIsas) {
      if (isa_usable(candidate)) isa = candidate;
    }
    const char* wanted = std::getenv("FASTKIT_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return;
    for (Isa candidate : kIsas) {
      if (std::strcmp(wanted, isa_name(candidate)) != 0) continue;
      if (isa_usable(candidate)) {
        isa = candidate;
      } else {
        refusal = "this CPU does not have the instruction set that FASTKIT_CPU_ISA names; unset it";
      }
      return;
    }
    refusal = "FASTKIT_CPU_ISA must be baseline, avx2 or avx512; unset it for the best that the CPU has";
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

Isa active_isa() { return choice().isa; }

const char* isa_refusal() { return choice().refusal; }

}  // namespace fastkit
