// The gates of FocusLayer: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/focus_gates.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

void check_logits(const Tensor& logits) {
  FASTKIT_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) % 3 == 0 &&
                    logits.scalar_type() == ScalarType::Float,
                "focus_gates: logits must be float32 on the CPU and have shape (N, 3 C)");
}

// A dense copy, if it is not one, of what must be (N, C).
Tensor dense(const char* name, const Tensor& t, const Tensor& logits) {
  FASTKIT_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == logits.size(0) && 3 * t.size(1) == logits.size(1) &&
                    t.scalar_type() == ScalarType::Float,
                "focus_gates: ", name, " must be float32 on the CPU and have shape (", logits.size(0), ", ",
                logits.size(1) / 3, ")");
  return contiguous(t);
}

const float* read(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
float* written(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

template <class Kernel>
void run(const FocusGates& p, int64_t rows, Kernel kernel) {
  if (p.channels == 0) return;
  torch::stable::parallel_for(0, rows, kGrain / p.channels + 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor focus_gates_reset(const Tensor& logits, const Tensor& y) {
  check_logits(logits);
  const Tensor of_gates = contiguous(logits), in = dense("y", y, logits);
  Tensor s = new_empty(in, {in.size(0), in.size(1)});
  FocusGates p;
  p.channels = in.size(1), p.logits = read(of_gates), p.y = read(in), p.s = written(s);
  run(p, in.size(0), focus_gates_kernels().reset);
  return s;
}

Tensor focus_gates_update(const Tensor& logits, const Tensor& m, const Tensor& residual) {
  check_logits(logits);
  const Tensor of_gates = contiguous(logits), sum = dense("m", m, logits), kept = dense("residual", residual, logits);
  Tensor o = new_empty(sum, {sum.size(0), sum.size(1)});
  FocusGates p;
  p.channels = sum.size(1), p.logits = read(of_gates), p.m = read(sum), p.residual = read(kept), p.o = written(o);
  run(p, sum.size(0), focus_gates_kernels().update);
  return o;
}

std::tuple<Tensor, Tensor> focus_gates_update_bwd(const Tensor& go, const Tensor& logits, const Tensor& m,
                                                  const Tensor& residual) {
  check_logits(logits);
  const Tensor of_gates = contiguous(logits), sum = dense("m", m, logits), kept = dense("residual", residual, logits);
  const Tensor g = dense("go", go, logits);
  Tensor glogits = new_empty(of_gates, {logits.size(0), logits.size(1)});
  Tensor gresidual = new_empty(sum, {sum.size(0), sum.size(1)});
  FocusGates p;
  p.channels = sum.size(1), p.logits = read(of_gates), p.m = read(sum), p.residual = read(kept), p.go = read(g);
  p.glogits = written(glogits), p.gresidual = written(gresidual);
  run(p, sum.size(0), focus_gates_kernels().update_bwd);
  return {glogits, gresidual};
}

Tensor focus_gates_reset_bwd_(Tensor& glogits, const Tensor& gs, const Tensor& logits, const Tensor& y) {
  check_logits(logits);
  check_logits(glogits);
  FASTKIT_CHECK(glogits.is_contiguous() && glogits.size(0) == logits.size(0) && glogits.size(1) == logits.size(1),
                "focus_gates: glogits must be dense and shaped like logits");
  const Tensor of_gates = contiguous(logits), in = dense("y", y, logits), g = dense("gs", gs, logits);
  Tensor gy = new_empty(in, {in.size(0), in.size(1)});
  FocusGates p;
  p.channels = in.size(1), p.logits = read(of_gates), p.y = read(in), p.gs = read(g);
  p.glogits = written(glogits), p.gy = written(gy);
  run(p, in.size(0), focus_gates_kernels().reset_bwd);
  return gy;
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("focus_gates_reset", TORCH_BOX(&fastkit::focus_gates_reset));
  m.impl("focus_gates_update", TORCH_BOX(&fastkit::focus_gates_update));
  m.impl("focus_gates_update_bwd", TORCH_BOX(&fastkit::focus_gates_update_bwd));
  m.impl("focus_gates_reset_bwd_", TORCH_BOX(&fastkit::focus_gates_reset_bwd_));
}
