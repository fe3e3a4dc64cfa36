// multihead_loss and orthogonality_penalty: tensors -> raw pointers, for the CPU.
#include "fastkit/multihead_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/multihead_loss_penalty.h"

namespace fastkit {
namespace {

constexpr int64_t kGrain = 1 << 12;  // elements that are worth a thread

template <class T>
T* data_of(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t numel) {
  FASTKIT_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == numel, op, ": ", name,
                " must be dense, on the CPU, of ", numel, " elements of the dtype that belongs to the first argument's");
  return static_cast<T*>(t.data_ptr());
}

template <class Body>
void dispatch(const char* op, const char* name, const Tensor& t, Body&& body) {
  FASTKIT_CHECK(t.is_cpu() && t.is_contiguous(), op, ": ", name, " must be dense and on the CPU");
  if (t.scalar_type() == ScalarType::Float) return body(float());
  FASTKIT_CHECK(t.scalar_type() == ScalarType::Double, op, ": ", name, " must be float32 or float64");
  body(double());
}

template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t count, int64_t each) {
  torch::stable::parallel_for(0, count, kGrain / (each + 1) + 1,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void multihead_loss_rows_(const Tensor& z, const Tensor& target, const std::optional<Tensor>& coefficients,
                          const std::optional<Tensor>& class_weight, double scale, std::string problem, bool gradient,
                          const Tensor& loss, const Tensor& correct) {
  const char* op = "multihead_loss";
  FASTKIT_CHECK(z.dim() == 3, op, ": z must have shape (H, C, B)");
  const int64_t heads = z.size(0), classes = z.size(1), rows = z.size(2);
  dispatch(op, "z", z, [&]<class T>(T) {
    MultiheadRows<T> p;
    p.classes = classes, p.rows = rows, p.z = static_cast<T*>(z.data_ptr());
    p.scale = static_cast<T>(scale), p.gradient = gradient;
    p.loss = data_of<T>(op, "loss", loss, z.scalar_type(), heads);
    p.correct = data_of<int64_t>(op, "correct", correct, ScalarType::Long, heads);
    if (class_weight) p.class_weight = data_of<T>(op, "class_weight", *class_weight, z.scalar_type(), classes);
    const MultiheadLossKernels& kernels = multihead_loss_kernels();
    const MultiheadFunctions<T>* functions;
    if constexpr (IsSame<T, float>) functions = &kernels.f32;
    if constexpr (IsSame<T, double>) functions = &kernels.f64;
    if (problem == "single_label") {
      FASTKIT_CHECK(coefficients.has_value(), op, ": coefficients must be there for a single label");
      p.target = data_of<int64_t>(op, "target", target, ScalarType::Long, rows);
      p.coefficients = data_of<T>(op, "coefficients", *coefficients, z.scalar_type(), 3 * rows);
      return run(functions->single_label, p, heads, classes * rows);
    }
    p.wanted = data_of<T>(op, "target", target, z.scalar_type(), classes * rows);
    FASTKIT_CHECK(problem == "multi_label" || problem == "regression", op, ": problem must be one of three");
    run(problem == "multi_label" ? functions->multi_label : functions->regression, p, heads, classes * rows);
  });
}

void multihead_loss_penalty_rows_(const Tensor& gram, std::string kind, double width, bool gradient,
                                  const Tensor& sums) {
  const char* op = "orthogonality_penalty";
  FASTKIT_CHECK(gram.dim() == 2 && gram.size(0) <= gram.size(1), op, ": gram must have shape (n, m), n <= m");
  dispatch(op, "gram", gram, [&]<class T>(T) {
    PenaltyRows<T> p;
    p.kind = kind == "abs" ? PenaltyKind::abs : kind == "squared" ? PenaltyKind::squared : PenaltyKind::huber;
    FASTKIT_CHECK(p.kind != PenaltyKind::huber || (kind == "huber" && width > 0), op,
                  ": kind must be abs, squared, or huber with a width");
    p.width = static_cast<T>(width), p.columns = gram.size(1), p.gradient = gradient;
    p.gram = static_cast<T*>(gram.data_ptr());
    p.sums = data_of<T>(op, "sums", sums, gram.scalar_type(), gram.size(0));
    const MultiheadLossPenaltyKernels& kernels = multihead_loss_penalty_kernels();
    PenaltyFunction<T> function;
    if constexpr (IsSame<T, float>) function = kernels.f32;
    if constexpr (IsSame<T, double>) function = kernels.f64;
    run(function, p, gram.size(0), p.columns);
  });
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("multihead_loss_rows_", TORCH_BOX(&fastkit::multihead_loss_rows_));
  m.impl("multihead_loss_penalty_rows_", TORCH_BOX(&fastkit::multihead_loss_penalty_rows_));
}
