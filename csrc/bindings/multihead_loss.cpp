// multihead_loss and orthogonality_penalty: tensors -> raw pointers, for the CPU.
#include "fastkit/multihead_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "common/aligned.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/ranges.h"
#include "fastkit/multihead_loss_penalty.h"

namespace fastkit {
namespace {

template <class T>
T* data_of(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t numel) {
  FASTKIT_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == numel, op, ": ", name,
                " must be dense, on the CPU, of ", numel, " elements of the dtype that belongs to the first argument's");
  return static_cast<T*>(t.data_ptr());
}

// call(T(), functions), by the dtype of x.
template <class Kernels, class Call>
void dispatch(const char* op, const char* name, const Tensor& x, const Kernels& kernels, Call&& call) {
  if (x.scalar_type() == ScalarType::Float) return call(float(), kernels.f32);
  FASTKIT_CHECK(x.scalar_type() == ScalarType::Double, op, ": ", name, " must be float32 or float64");
  call(double(), kernels.f64);
}

template <class T>
void set_common(Multihead<T>& p, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& target,
                int64_t ignore_index) {
  const char* op = "multihead_loss";
  FASTKIT_CHECK(x.dim() == 2 && x.is_cpu() && (x.stride(1) == 1 || x.size(1) <= 1 || x.numel() == 0), op,
                ": x must have shape (B, D), on the CPU, where the features of a row are neighbours");
  FASTKIT_CHECK(weight.dim() == 3, op, ": weight must have shape (H, C, D)");
  p.heads = weight.size(0), p.classes = weight.size(1), p.rows = x.size(0), p.columns = x.size(1);
  p.x = static_cast<const T*>(x.data_ptr()), p.x_stride = x.stride(0);
  p.weight = data_of<T>(op, "weight", weight, x.scalar_type(), p.heads * p.classes * p.columns);
  if (target) p.target = data_of<int64_t>(op, "target", *target, ScalarType::Long, p.rows);
  p.ignore_index = ignore_index;
}

// Single label has target, the others have wanted.
void multihead_loss_fwd_(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& target,
                         const std::optional<Tensor>& wanted, const std::optional<Tensor>& class_weight,
                         std::string problem, double label_smoothing, int64_t ignore_index, bool gradient,
                         const Tensor& z, const Tensor& loss, const Tensor& correct, const Tensor& count) {
  const char* op = "multihead_loss";
  dispatch(op, "x", x, multihead_loss_kernels(), [&]<class T>(T, const MultiheadFunctions<T>& functions) {
    const ScalarType dtype = x.scalar_type();
    MultiheadForward<T> p;
    set_common(p, x, weight, target, ignore_index);
    FASTKIT_CHECK(problem == "single_label" || problem == "multi_label" || problem == "regression", op,
                  ": problem must be one of three");
    p.problem = problem == "single_label"  ? HeadProblem::single_label
                : problem == "multi_label" ? HeadProblem::multi_label
                                           : HeadProblem::regression;
    const bool single = p.problem == HeadProblem::single_label;
    FASTKIT_CHECK(target.has_value() == single && wanted.has_value() != single, op,
                  ": a single label has target, the other two have wanted");
    p.bias = data_of<T>(op, "bias", bias, dtype, p.heads * p.classes);
    if (wanted) p.wanted = data_of<T>(op, "wanted", *wanted, dtype, p.classes * p.rows);
    if (class_weight) p.class_weight = data_of<T>(op, "class_weight", *class_weight, dtype, p.classes);
    p.label_smoothing = label_smoothing, p.gradient = gradient;
    p.z = data_of<T>(op, "z", z, dtype, p.heads * p.classes * p.rows);
    p.loss = data_of<T>(op, "loss", loss, dtype, p.heads);
    p.correct = data_of<int64_t>(op, "correct", correct, ScalarType::Long, p.heads);
    p.count = data_of<int64_t>(op, "count", count, ScalarType::Long, 1);
    const Aligned<T> room(functions.room(p));
    p.room = room.data();
    functions.forward(p, in_parallel);
  });
}

void multihead_loss_bwd_(const Tensor& g_loss, const Tensor& dz, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& target, int64_t ignore_index, const std::optional<Tensor>& g_x,
                         const std::optional<Tensor>& g_weight, const std::optional<Tensor>& g_bias) {
  const char* op = "multihead_loss";
  dispatch(op, "x", x, multihead_loss_kernels(), [&]<class T>(T, const MultiheadFunctions<T>& functions) {
    const ScalarType dtype = x.scalar_type();
    MultiheadBackward<T> p;
    set_common(p, x, weight, target, ignore_index);
    p.g_loss = data_of<T>(op, "g_loss", g_loss, dtype, p.heads);
    p.dz = data_of<T>(op, "dz", dz, dtype, p.heads * p.classes * p.rows);
    if (g_x) p.g_x = data_of<T>(op, "g_x", *g_x, dtype, p.rows * p.columns);
    if (g_weight) p.g_weight = data_of<T>(op, "g_weight", *g_weight, dtype, p.heads * p.classes * p.columns);
    if (g_bias) p.g_bias = data_of<T>(op, "g_bias", *g_bias, dtype, p.heads * p.classes);
    functions.backward(p, in_parallel);
  });
}

void multihead_loss_penalty_(const Tensor& rows, std::string kind, double width, const Tensor& sums,
                             const std::optional<Tensor>& gradient) {
  const char* op = "orthogonality_penalty";
  FASTKIT_CHECK(rows.dim() == 3 && rows.is_cpu() && (rows.stride(2) == 1 || rows.size(2) <= 1 || rows.numel() == 0), op,
                ": rows must have shape (H, C, D), on the CPU, where the features of a row are neighbours");
  dispatch(op, "rows", rows, multihead_loss_penalty_kernels(), [&]<class T>(T, const PenaltyFunctions<T>& functions) {
    PenaltyCall<T> p;
    p.kind = kind == "abs" ? PenaltyKind::abs : kind == "squared" ? PenaltyKind::squared : PenaltyKind::huber;
    FASTKIT_CHECK(p.kind != PenaltyKind::huber || (kind == "huber" && width > 0), op,
                  ": kind must be abs, squared, or huber with a width");
    p.width = static_cast<T>(width);
    p.heads = rows.size(0), p.classes = rows.size(1), p.columns = rows.size(2);
    p.rows = static_cast<const T*>(rows.data_ptr()), p.of_head = rows.stride(0), p.of_class = rows.stride(1);
    p.sums = data_of<T>(op, "sums", sums, rows.scalar_type(), p.heads * p.classes);
    if (gradient) p.gradient = data_of<T>(op, "gradient", *gradient, rows.scalar_type(), rows.numel());
    const Aligned<T> room(functions.room(p));
    p.room = room.data();
    functions.penalty(p, in_parallel);
  });
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("multihead_loss_fwd_", TORCH_BOX(&fastkit::multihead_loss_fwd_));
  m.impl("multihead_loss_bwd_", TORCH_BOX(&fastkit::multihead_loss_bwd_));
  m.impl("multihead_loss_penalty_", TORCH_BOX(&fastkit::multihead_loss_penalty_));
}
