// The gates of FocusLayer: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/focus_gates.h"

namespace fastkit {
namespace {

using torch::stable::new_empty;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// Raw pointers of one block of rows, whose tensors have to fit the logits.
class Block {
 public:
  explicit Block(const Tensor& logits) : logits_(logits) {
    FASTKIT_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) % 3 == 0 && logits.is_contiguous() &&
                      logits.scalar_type() == ScalarType::Float,
                  "focus_gates: logits must be float32 on the CPU, dense and have shape (N, 3 C)");
    call.channels = logits.size(1) / 3;
    call.logits = static_cast<float*>(logits.data_ptr());
  }

  float* of(const char* name, const Tensor& t) const {
    FASTKIT_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == logits_.size(0) && t.size(1) == call.channels &&
                      t.is_contiguous() && t.scalar_type() == ScalarType::Float,
                  "focus_gates: ", name, " must be float32 on the CPU, dense and have shape (", logits_.size(0), ", ",
                  call.channels, ")");
    return static_cast<float*>(t.data_ptr());
  }

  template <class Kernel>
  void run(Kernel kernel) const {
    if (call.channels == 0) return;
    torch::stable::parallel_for(0, logits_.size(0), kGrain / call.channels + 1,
                                [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  }

  FocusGates call;

 private:
  const Tensor& logits_;
};

Tensor focus_gates_reset(const Tensor& logits, const Tensor& y) {
  Block block(logits);
  block.call.y = block.of("y", y);
  Tensor s = new_empty(y, {y.size(0), y.size(1)});
  block.call.s = block.of("s", s);
  block.run(focus_gates_kernels().reset);
  return s;
}

void focus_gates_update_(Tensor& m, const Tensor& logits, const Tensor& residual) {
  Block block(logits);
  block.call.m = block.of("m", m), block.call.residual = block.of("residual", residual);
  block.run(focus_gates_kernels().update);
}

void focus_gates_update_bwd_(Tensor& logits, Tensor& m, const Tensor& residual, const Tensor& go) {
  Block block(logits);
  block.call.m = block.of("m", m), block.call.residual = block.of("residual", residual);
  block.call.go = block.of("go", go);
  block.run(focus_gates_kernels().update_bwd);
}

void focus_gates_reset_bwd_(Tensor& logits, Tensor& gs, const Tensor& y) {
  Block block(logits);
  block.call.s = block.of("gs", gs), block.call.y = block.of("y", y);
  block.run(focus_gates_kernels().reset_bwd);
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("focus_gates_reset", TORCH_BOX(&fastkit::focus_gates_reset));
  m.impl("focus_gates_update_", TORCH_BOX(&fastkit::focus_gates_update_));
  m.impl("focus_gates_update_bwd_", TORCH_BOX(&fastkit::focus_gates_update_bwd_));
  m.impl("focus_gates_reset_bwd_", TORCH_BOX(&fastkit::focus_gates_reset_bwd_));
}
