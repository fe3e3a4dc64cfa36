// mtadam on NumPy arrays, for tests: the GPU's functors with teams of warps that are loops (host/warp.h).
#include "fastkit/mtadam.h"

#include <optional>
#include <string>
#include <vector>

#include "fastkit/mtadam_warps.h"
#include "host/arrays.h"
#include "host/warp.h"

namespace {

using namespace fastkit;

template <class U>
using Arrays = std::vector<Array<U>>;
template <class E>
using Gradients = std::vector<std::optional<Array<Stored<E>>>>;  // term-major

// Tensors and their lists of pointers, as the kernels want them.
template <class E>
struct Lists {
  using T = Arithmetic<E>;
  int64_t folded;
  std::vector<MTAdamTensor<E>> tensors;
  std::vector<const E*> grads;
  std::vector<T*> exp_avg_sqs;

  Lists(const Gradients<E>& of, int64_t count)
      : folded(count == 0 ? 0 : static_cast<int64_t>(of.size()) / count), tensors(count), grads(of.size()) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t l = 0; l < folded; ++l) {
        const auto& grad = of[l * count + i];
        if (!grad) continue;
        grads[i * folded + l] = reinterpret_cast<const E*>(grad->data());
        tensors[i].numel = grad->size();
      }
      tensors[i].grads = grads.data() + i * folded;
    }
  }
};

template <class E>
Array<double> square_sums(const Gradients<E>& grads, int64_t count) {
  const Lists<E> lists(grads, count);
  MTAdam<E> call;
  call.count = count, call.tensors = lists.tensors.data();
  call.rule.terms = call.rule.folded = static_cast<int32_t>(lists.folded);
  Array<double> sums({count, lists.folded});
  HostStream stream(1);
  mtadam_warps::square_sums(call, sums.mutable_data(), stream);
  return sums;
}

template <class U>
const U* data_of(const std::optional<Array<U>>& array) {
  return array ? array->data() : nullptr;
}

template <class E, class T = Arithmetic<E>>
void update(Arrays<Stored<E>> params, const Gradients<E>& grads, Arrays<T> exp_avgs, Arrays<T> exp_avg_sqs,
            Arrays<T> max_exp_avg_sqs, Array<T> grad_norms, Array<T> steps,
            const std::optional<Array<double>>& square_sums, double lr, const std::optional<Array<double>>& lr_tensor,
            const std::vector<double>& betas, double eps, double weight_decay, bool decoupled,
            const std::vector<double>& ranks, int32_t anchor, double alive_eps, double max_scale, int32_t nonfinite,
            const std::optional<Array<float>>& grad_scales, const std::optional<Array<float>>& found_inf, int32_t first,
            bool applies) {
  const auto count = static_cast<int64_t>(params.size());
  Lists<E> lists(grads, count);
  MTAdam<E> call;
  MTAdamRule& rule = call.rule;
  rule.terms = static_cast<int32_t>(grad_norms.shape(1));
  rule.first = first, rule.folded = static_cast<int32_t>(lists.folded), rule.anchor = anchor;
  rule.applies = applies, rule.decoupled = decoupled, rule.nonfinite = static_cast<NonFinite>(nonfinite);
  rule.lr = lr, rule.beta1 = betas[0], rule.beta2 = betas[1], rule.beta3 = betas[2];
  rule.eps = eps, rule.weight_decay = weight_decay, rule.alive = alive_eps, rule.max_scale = max_scale;
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t l = 0; l < rule.terms; ++l) lists.exp_avg_sqs.push_back(exp_avg_sqs[l * count + i].mutable_data());
  }
  for (int64_t i = 0; i < count; ++i) {
    MTAdamTensor<E>& tensor = lists.tensors[i];
    tensor.numel = params[i].size();
    tensor.param = reinterpret_cast<E*>(params[i].mutable_data());
    tensor.exp_avg = exp_avgs[i].mutable_data();
    tensor.max_exp_avg_sq = max_exp_avg_sqs.empty() ? nullptr : max_exp_avg_sqs[i].mutable_data();
    tensor.exp_avg_sqs = lists.exp_avg_sqs.data() + i * rule.terms;
  }
  call.tensors = lists.tensors.data(), call.count = count;
  call.grad_norms = grad_norms.mutable_data(), call.steps = steps.mutable_data();
  call.square_sums = data_of(square_sums), call.grad_scales = data_of(grad_scales);
  call.ranks = ranks.empty() ? nullptr : ranks.data();
  call.lr = data_of(lr_tensor), call.found_inf = data_of(found_inf);
  HostStream stream(1);
  mtadam_warps::update(call, stream);
}

template <class E>
void bind(py::module_& m, const std::string& suffix) {
  m.def(("mtadam_square_sums_" + suffix).c_str(), &square_sums<E>);
  m.def(("mtadam_update_" + suffix).c_str(), &update<E>);
}

}  // namespace

void bind_mtadam(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<BFloat16>(m, "bfloat16");
  bind<Half>(m, "float16");
}
