// linear_cross_entropy: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/linear_cross_entropy.h"

namespace fastkit {
namespace {

constexpr int64_t kGrain = 1 << 13;  // elements that are worth a thread

template <class Body>
void dispatch(const Tensor& logits, Body&& body) {
  if (logits.scalar_type() == ScalarType::Float) return body(linear_cross_entropy_kernels().f32);
  FASTKIT_CHECK(logits.scalar_type() == ScalarType::Double, "linear_cross_entropy: logits must be float32 or float64");
  body(linear_cross_entropy_kernels().f64);
}

void check_block(const char* name, const Tensor& t) {
  FASTKIT_CHECK(t.is_cpu() && t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1) && t.stride(0) >= 0,
                "linear_cross_entropy: ", name, " must be on the CPU and have shape (N, c), its columns of stride 1");
}

template <class T>
T* data_of(const char* name, const Tensor& t, const Tensor& logits, int64_t rows, int64_t columns) {
  FASTKIT_CHECK(t.is_cpu() && t.scalar_type() == logits.scalar_type() && t.is_contiguous() && t.size(0) == rows &&
                    t.numel() == rows * columns,
                "linear_cross_entropy: ", name, " must be dense, in the dtype of the logits, and have ", columns,
                " numbers for each of ", rows);
  return static_cast<T*>(t.data_ptr());
}

template <class T>
void describe(LogitsBlock<T>& p, const Tensor& logits, const Tensor& target, int64_t first, double softcap,
              const std::optional<Tensor>& class_weight) {
  check_block("logits", logits);
  FASTKIT_CHECK(target.is_cpu() && target.dim() == 1 && target.scalar_type() == ScalarType::Long &&
                    target.is_contiguous() && target.size(0) == logits.size(0),
                "linear_cross_entropy: target must be int64, dense and have shape (N,) on the CPU");
  FASTKIT_CHECK(first >= 0, "linear_cross_entropy: first must not be negative, got ", first);
  p.columns = logits.size(1), p.first = first, p.stride = logits.stride(0);
  p.logits = static_cast<const T*>(logits.data_ptr());
  p.target = static_cast<const int64_t*>(target.data_ptr());
  p.softcap = static_cast<T>(softcap);
  if (!class_weight) return;
  FASTKIT_CHECK(class_weight->dim() == 1 && first <= class_weight->size(0) - p.columns,
                "linear_cross_entropy: class_weight must have a number for each class");
  p.class_weight = data_of<T>("class_weight", *class_weight, logits, class_weight->size(0), 1) + first;
}

template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& p, int64_t tokens) {
  if (p.columns == 0) return;
  torch::stable::parallel_for(0, tokens, kGrain / p.columns + 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void linear_cross_entropy_sums_(const Tensor& state, const Tensor& logits, const Tensor& target, int64_t first,
                                double softcap, const std::optional<Tensor>& class_weight, bool smooths) {
  dispatch(logits, [&]<class T>(const CrossEntropyFunctions<T>& functions) {
    CrossEntropySums<T> p;
    describe<T>(p, logits, target, first, softcap, class_weight);
    p.state = data_of<T>("state", state, logits, logits.size(0), 4);
    p.smooths = smooths;
    run(functions.sums, p, logits.size(0));
  });
}

void linear_cross_entropy_gradient_(const Tensor& dz, const Tensor& logits, const Tensor& target, const Tensor& lse,
                                    const Tensor& coefficients, int64_t first, double softcap,
                                    const std::optional<Tensor>& class_weight) {
  dispatch(logits, [&]<class T>(const CrossEntropyFunctions<T>& functions) {
    CrossEntropyGradient<T> p;
    describe<T>(p, logits, target, first, softcap, class_weight);
    check_block("dz", dz);
    FASTKIT_CHECK(dz.scalar_type() == logits.scalar_type() && dz.size(0) == logits.size(0) &&
                      dz.size(1) == logits.size(1) && (dz.stride(0) >= dz.size(1) || dz.size(0) <= 1),
                  "linear_cross_entropy: dz must have the shape and dtype of the logits, and memory for each entry");
    p.lse = data_of<T>("lse", lse, logits, logits.size(0), 1);
    p.coefficients = data_of<T>("coefficients", coefficients, logits, logits.size(0), 3);
    p.dz = static_cast<T*>(dz.data_ptr()), p.dz_stride = dz.stride(0);
    run(functions.gradient, p, logits.size(0));
  });
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("linear_cross_entropy_sums_", TORCH_BOX(&fastkit::linear_cross_entropy_sums_));
  m.impl("linear_cross_entropy_gradient_", TORCH_BOX(&fastkit::linear_cross_entropy_gradient_));
}
