// Every op of the library: its schema, and in a line what it does. The page to open first.
//
// bindings/<stem>.cpp implements an op for each device; python/fastkit/ops/<stem>.py checks its arguments,
// chooses the implementation and differentiates.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/isa.h"
#include "fastkit/device.h"

namespace {

std::string quoted(const char* text) { return '"' + std::string(text) + '"'; }

// What this library is, as JSON; python/fastkit/_native.py refuses a library that does not fit the package.
std::string build_info() {
  const char* refusal = fastkit::isa_refusal();
  std::string isas;
  for (fastkit::Isa isa : fastkit::kIsas) {
    if (fastkit::isa_usable(isa)) isas += (isas.empty() ? "" : ", ") + quoted(fastkit::isa_name(isa));
  }
  const std::string cuda = fastkit::cuda_version();
  return "{\"version\": " + quoted(FASTKIT_VERSION) + ", \"schema_sha256\": " + quoted(FASTKIT_SCHEMA_SHA256) +
         ", \"compiler\": " + quoted(FASTKIT_COMPILER) + ", \"torch_target\": \"2.10\", \"cuda\": " +
         (cuda.empty() ? "null" : quoted(cuda.c_str())) + ", \"cuda_archs\": " + quoted(FASTKIT_CUDA_ARCHS) +
         ", \"cpu_isas\": [" + isas + "], \"cpu_isa\": " + quoted(fastkit::isa_name(fastkit::active_isa())) +
         ", \"refusal\": " + (refusal == nullptr ? "null" : quoted(refusal)) + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY(fastkit, m) {
  // What the library was built from and for, and the instruction set that its CPU kernels use: JSON.
  m.def("build_info() -> str");

  // Second-order recursive filter of each row of x (B,C,T), coefficients a (B|1,C|1,K,2), b (B|1,C|1,K,3) per chunk.
  m.def("iir_scan_fwd(Tensor x, Tensor a, Tensor? b, int chunk, bool carry) -> Tensor");
  // Its gradients to x, and to a and b per row (B,C,K,2|3); empty where not needed.
  m.def(
      "iir_scan_bwd(Tensor gy, Tensor x, Tensor y, Tensor a, Tensor? b, int chunk, bool carry, bool needs_x, "
      "bool needs_coefficients) -> (Tensor gx, Tensor ga, Tensor gb)");
}

STABLE_TORCH_LIBRARY_IMPL(fastkit, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
