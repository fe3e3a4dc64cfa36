// mtadam: tensors -> raw pointers, for the CPU and CUDA; on the CPU, also which thread does what.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/stream.h"
#include "fastkit/mtadam.h"
#include "fastkit/mtadam_balance.h"
#include "fastkit/mtadam_cuda.h"

namespace fastkit {
namespace {

using torch::stable::new_empty;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kSerialElements = 32768;  // fewer gradients are not worth a second thread

// --- threads -------------------------------------------------------------------------------------------------------

// A call on the CPU. A thread takes a tensor, sums its squares and updates it, from its last block to its first: the
// latest that were read are still in its caches. Tensors that would keep one thread busy while others have nothing left
// to do are shared by all, with the same blocks for a thread in both passes.
template <class E>
class CpuCall {
  using T = Arithmetic<E>;

 public:
  explicit CpuCall(const MTAdam<E>& call) : call_(call), kernels_(mtadam_kernels().of<E>()) {}

  void update() {
    each([&](int64_t i) { update_alone(i); }, [&](int64_t i) { update_together(i); });
  }

  void square_sums(double* sums) {
    const int64_t folded = call_.rule.folded;
    each([&](int64_t i) { sum_alone(i, sums + i * folded); }, [&](int64_t i) { sum_together(i, sums + i * folded); });
  }

 private:
  const MTAdamTensor<E>& tensor(int64_t i) const { return call_.tensors[i]; }
  int64_t blocks(int64_t i) const { return (tensor(i).numel + kMTAdamBlock - 1) / kMTAdamBlock; }

  // alone(i) on one thread, together(i) on all.
  template <class Alone, class Together>
  void each(Alone&& alone, Together&& together) {
    int64_t elements = 0;
    for (int64_t i = 0; i < call_.count; ++i) elements += tensor(i).numel;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t passes = call_.rule.applies ? call_.rule.terms : call_.rule.folded;
    const int64_t workers = std::clamp<int64_t>(elements * passes / kSerialElements + 1, 1, threads);
    std::vector<int64_t> order;
    for (int64_t i = 0; i < call_.count; ++i) {
      if (workers > 1 && tensor(i).numel > elements / (4 * workers) && blocks(i) > 1) {
        together(i);
      } else {
        order.push_back(i);
      }
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return tensor(i).numel > tensor(j).numel; });
    std::atomic<size_t> next = 0;
    torch::stable::parallel_for(0, std::min<int64_t>(workers, order.size()), 1, [&](int64_t, int64_t) {
      for (size_t k = next++; k < order.size(); k = next++) alone(order[k]);
    });
  }

  void sum_alone(int64_t i, double* sums) const {
    std::vector<double> of_blocks(blocks(i));
    for (int32_t f = 0; f < call_.rule.folded; ++f) {
      sums[f] = 0;
      if (tensor(i).grads[f] == nullptr) continue;
      kernels_.square_sums(tensor(i).grads[f], tensor(i).numel, 0, blocks(i), of_blocks.data());
      sums[f] = std::accumulate(of_blocks.begin(), of_blocks.end(), 0.0);
    }
  }

  void sum_together(int64_t i, double* sums) const {
    const int64_t folded = call_.rule.folded, n = blocks(i);
    std::vector<double> of_blocks(folded * n);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t f = 0; f < folded; ++f) {
        if (tensor(i).grads[f] == nullptr) continue;
        kernels_.square_sums(tensor(i).grads[f], tensor(i).numel, begin, end, of_blocks.data() + f * n);
      }
    });
    for (int64_t f = 0; f < folded; ++f) {
      sums[f] = std::accumulate(of_blocks.begin() + f * n, of_blocks.begin() + (f + 1) * n, 0.0);
    }
  }

  // Blocks [begin, end), the last first.
  void update_blocks(int64_t i, const T* factors, const MTAdamStep<T>& step, int64_t begin, int64_t end) const {
    for (int64_t block = end - 1; block >= begin; --block) {
      const int64_t first = block * kMTAdamBlock;
      kernels_.update(call_.rule, tensor(i), factors, step, first, std::min(first + kMTAdamBlock, tensor(i).numel));
    }
  }

  template <class Sum, class Update>
  void update(int64_t i, Sum&& sum, Update&& update) const {
    const MTAdamRule& rule = call_.rule;
    if (rule.first == 0 && std::all_of(tensor(i).grads, tensor(i).grads + rule.folded, [](auto g) { return !g; })) {
      return;  // no term reaches it: it does not take part
    }
    std::vector<double> sums(rule.folded);
    if (call_.square_sums != nullptr) {
      std::copy_n(call_.square_sums + i * rule.folded, rule.folded, sums.begin());
    } else {
      sum(sums.data());
    }
    std::vector<T> factors(rule.folded);
    T* const norms = call_.grad_norms + i * rule.terms;
    if (!mtadam_balance(rule, sums.data(), call_.grad_scales, call_.ranks, norms, factors.data())) return;
    if (rule.applies) call_.steps[i] += 1;
    update(factors.data(), mtadam_step<T>(rule, call_.lr == nullptr ? rule.lr : *call_.lr, call_.steps[i]));
  }

  void update_alone(int64_t i) const {
    update(
        i, [&](double* sums) { sum_alone(i, sums); },
        [&](const T* factors, const MTAdamStep<T>& step) { update_blocks(i, factors, step, 0, blocks(i)); });
  }

  void update_together(int64_t i) const {
    update(
        i, [&](double* sums) { sum_together(i, sums); },
        [&](const T* factors, const MTAdamStep<T>& step) {
          torch::stable::parallel_for(0, blocks(i), 1, [&](int64_t begin, int64_t end) {
            update_blocks(i, factors, step, begin, end);
          });
        });
  }

  const MTAdam<E>& call_;
  const MTAdamFunctions<E>& kernels_;
};

// --- tensors -------------------------------------------------------------------------------------------------------

bool same_shape(const Tensor& t, const Tensor& like) {
  const auto a = t.sizes(), b = like.sizes();
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

bool same_strides(const Tensor& t, const Tensor& like) {
  const auto sizes = like.sizes(), a = t.strides(), b = like.strides();
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] > 1 && a[axis] != b[axis]) return false;
  }
  return true;
}

// Without gaps, in whatever order of the dimensions.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    if (t.size(axis) > 1) axes.emplace_back(t.stride(axis), t.size(axis));
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The lists of a call as pointers. What has not the strides of its first moment is copied, and a parameter copied back.
template <class E>
class Pointers {
  using T = Arithmetic<E>;

 public:
  Pointers(int64_t count, int64_t terms, int64_t folded)
      : tensors_(count), grads_(count * folded), exp_avg_sqs_(count * terms), terms_(terms), folded_(folded) {
    for (int64_t i = 0; i < count; ++i) {
      tensors_[i].grads = grads_.data() + i * folded;
      tensors_[i].exp_avg_sqs = exp_avg_sqs_.data() + i * terms;
    }
  }

  void add_param(int64_t i, const Tensor& param, const Tensor& exp_avg) {
    Tensor dense = param;
    if (!same_strides(param, exp_avg)) {
      dense = copy(param, exp_avg);
      written_back_.emplace_back(param, dense);
    }
    tensors_[i].numel = param.numel();
    tensors_[i].param = static_cast<E*>(dense.data_ptr());
    tensors_[i].exp_avg = static_cast<T*>(exp_avg.data_ptr());
  }
  void add_grad(int64_t i, int64_t f, const Tensor& grad, const Tensor* exp_avg) {
    static const E nothing{};  // an empty tensor has no address, and is a gradient nevertheless
    const E*& pointer = grads_[i * folded_ + f];
    tensors_[i].numel = grad.numel();
    pointer = grad.numel() == 0 ? &nothing : static_cast<const E*>(grad.data_ptr());
    // Nor have the zeros that autograd keeps without memory, which PyTorch makes tensors of in other lists.
    const bool usable = grad.numel() == 0 || exp_avg == nullptr || (pointer != nullptr && same_strides(grad, *exp_avg));
    if (!usable) pointer = static_cast<const E*>(copy(grad, *exp_avg).data_ptr());
  }
  void add_exp_avg_sq(int64_t i, int64_t l, const Tensor& t) {
    exp_avg_sqs_[i * terms_ + l] = static_cast<T*>(t.data_ptr());
  }
  void add_max(int64_t i, const Tensor& t) { tensors_[i].max_exp_avg_sq = static_cast<T*>(t.data_ptr()); }

  const MTAdamTensor<E>* tensors() const { return tensors_.data(); }
  void write_back() const {
    for (const auto& [param, dense] : written_back_) {
      Tensor to = param;
      torch::stable::copy_(to, dense);
    }
  }

 private:
  Tensor copy(const Tensor& t, const Tensor& exp_avg) {
    Tensor dense = torch::stable::to(torch::stable::clone(exp_avg), t.scalar_type());
    torch::stable::copy_(dense, t);
    copies_.push_back(dense);
    return dense;
  }

  std::vector<MTAdamTensor<E>> tensors_;
  std::vector<const E*> grads_;
  std::vector<T*> exp_avg_sqs_;
  int64_t terms_, folded_;
  Tensors copies_;
  std::vector<std::pair<Tensor, Tensor>> written_back_;
};

// What the tensors of a call are held to: those of one parameter to its shape, those of state to the strides of one.
struct Expected {
  const char* op;
  ScalarType state;
  bool on_cpu;
  int32_t device;

  // Of the first parameter, or gradient.
  Expected(const char* op, const Tensor& first)
      : op(op), state(arithmetic(first)), on_cpu(first.is_cpu()), device(first.get_device_index()) {}

  void check(const char* name, int64_t i, const Tensor& t, ScalarType dtype) const {
    FASTKIT_CHECK(t.is_cpu() == on_cpu && (on_cpu || t.get_device_index() == device), op, ": ", name, "[", i,
                  "] must be on the device of the others");
    FASTKIT_CHECK(is_strided(t) && t.scalar_type() == dtype, op, ": ", name, "[", i,
                  "] must be dense and have the dtype of the others; state is float32, for float64 it is float64");
  }
  void check_state(const char* name, int64_t i, const Tensor& t, const Tensor& like) const {
    check(name, i, t, state);
    FASTKIT_CHECK(same_shape(t, like) && same_strides(t, like), op, ": ", name, "[", i,
                  "] must have the shape and the strides of the first moment of its parameter");
  }
  // Null where there is none.
  const void* numbers(const char* name, const std::optional<Tensor>& t, ScalarType dtype, int64_t count) const {
    if (!t) return nullptr;
    check(name, 0, *t, dtype);
    FASTKIT_CHECK(t->numel() == count && t->is_contiguous(), op, ": ", name, " must be ", count, " numbers, dense");
    return t->data_ptr();
  }
};

NonFinite nonfinite_of(const std::string& name) {
  if (name == "skip") return NonFinite::skip;
  if (name == "skip_term") return NonFinite::skip_term;
  FASTKIT_CHECK(name == "propagate", "mtadam_update_: nonfinite must be skip, skip_term or propagate, got ", name);
  return NonFinite::propagate;
}

// --- ops -----------------------------------------------------------------------------------------------------------

Tensor mtadam_square_sums(const MaybeTensors& grads, int64_t n) {
  const char* op = "mtadam_square_sums";
  const auto present = std::find_if(grads.begin(), grads.end(), [](const auto& g) { return g.has_value(); });
  FASTKIT_CHECK(present != grads.end() && n >= 1 && grads.size() % n == 0, op,
                ": grads must be n for each term, and one of them a tensor");
  const Tensor& like = **present;
  const Expected expected(op, like);
  const int64_t terms = static_cast<int64_t>(grads.size()) / n;
  FASTKIT_CHECK(terms <= kMTAdamTerms, op, ": there must be at most ", kMTAdamTerms, " terms");
  const auto device = device_guard(like);
  Tensor sums = new_empty(like, {n, terms}, ScalarType::Double);
  dispatch_floating(op, like, [&](auto zero) {
    using E = decltype(zero);
    Pointers<E> pointers(n, 0, terms);
    Tensors dense;
    for (int64_t i = 0; i < n; ++i) {
      const Tensor* shape = nullptr;
      for (int64_t l = 0; l < terms; ++l) {
        const auto& grad = grads[l * n + i];
        if (!grad) continue;
        expected.check("grads", l * n + i, *grad, like.scalar_type());
        FASTKIT_CHECK(shape == nullptr || same_shape(*grad, *shape), op, ": grads[", l * n + i,
                      "] must have the shape of its tensor's other gradients");
        shape = &*grad;
        dense.push_back(is_dense(*grad) ? *grad : torch::stable::contiguous(*grad));
        pointers.add_grad(i, l, dense.back(), nullptr);
      }
    }
    MTAdam<E> call;
    call.rule.terms = call.rule.folded = static_cast<int32_t>(terms);
    call.tensors = pointers.tensors(), call.count = n;
    auto* const to = static_cast<double*>(sums.data_ptr());
    if (like.is_cpu()) return CpuCall<E>(call).square_sums(to);
#ifdef FASTKIT_WITH_CUDA
    StreamMemory memory{like};
    check_launch(op, mtadam_square_sums_cuda(call, to, current_stream(like), std::ref(memory)));
#endif
  });
  return sums;
}

void mtadam_update_(const Tensors& params, const MaybeTensors& grads, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, const Tensor& grad_norms,
                    const Tensor& steps, const std::optional<Tensor>& square_sums, double lr,
                    const std::optional<Tensor>& lr_tensor, const std::vector<double>& betas, double eps,
                    double weight_decay, bool decoupled, const std::vector<double>& ranks, int64_t anchor,
                    double alive_eps, double max_scale, const std::string& nonfinite,
                    const std::optional<Tensor>& grad_scales, const std::optional<Tensor>& found_inf, int64_t first,
                    bool applies) {
  const char* op = "mtadam_update_";
  if (params.empty()) return;
  const auto n = static_cast<int64_t>(params.size());
  const Tensor& like = params[0];
  const Expected expected(op, like);
  expected.check("grad_norms", 0, grad_norms, expected.state);
  expected.check("steps", 0, steps, expected.state);
  FASTKIT_CHECK(grad_norms.dim() == 2 && grad_norms.size(0) == n && grad_norms.is_contiguous() && steps.numel() == n &&
                    steps.is_contiguous(),
                op, ": grad_norms must have shape (n, L) and steps (n,), dense, for the n params");
  const int64_t terms = grad_norms.size(1), folded = static_cast<int64_t>(grads.size()) / n;
  FASTKIT_CHECK(terms >= 1 && terms <= kMTAdamTerms && first >= 0 && anchor >= 0 && anchor < terms &&
                    static_cast<int64_t>(grads.size()) == folded * n && first <= terms - folded,
                op, ": grads must be n for each term from `first` on, of 1 to ", kMTAdamTerms, " terms");
  FASTKIT_CHECK(exp_avgs.size() == params.size() && static_cast<int64_t>(exp_avg_sqs.size()) == n * terms &&
                    (max_exp_avg_sqs.empty() || max_exp_avg_sqs.size() == params.size()),
                op, ": there must be one of exp_avgs, L of exp_avg_sqs and one or no max_exp_avg_sqs for each param");
  FASTKIT_CHECK(betas.size() == 3 && (ranks.empty() || static_cast<int64_t>(ranks.size()) == terms), op,
                ": betas must be three numbers, and ranks L");
  const auto device = device_guard(like);
  dispatch_floating(op, like, [&](auto zero) {
    using E = decltype(zero);
    using T = Arithmetic<E>;
    Pointers<E> pointers(n, terms, folded);
    for (int64_t i = 0; i < n; ++i) {
      const Tensor& exp_avg = exp_avgs[i];
      expected.check("params", i, params[i], like.scalar_type());
      expected.check("exp_avgs", i, exp_avg, expected.state);
      FASTKIT_CHECK(same_shape(exp_avg, params[i]) && is_dense(exp_avg), op, ": exp_avgs[", i,
                    "] must be dense and have the shape of its parameter");
      pointers.add_param(i, params[i], exp_avg);
      for (int64_t f = 0; f < folded; ++f) {
        const auto& grad = grads[f * n + i];
        if (!grad) continue;
        expected.check("grads", f * n + i, *grad, like.scalar_type());
        FASTKIT_CHECK(same_shape(*grad, exp_avg), op, ": grads[", f * n + i, "] must have the shape of its parameter");
        pointers.add_grad(i, f, *grad, &exp_avg);
      }
      for (int64_t l = 0; l < terms; ++l) {
        expected.check_state("exp_avg_sqs", l * n + i, exp_avg_sqs[l * n + i], exp_avg);
        pointers.add_exp_avg_sq(i, l, exp_avg_sqs[l * n + i]);
      }
      if (max_exp_avg_sqs.empty()) continue;
      expected.check_state("max_exp_avg_sqs", i, max_exp_avg_sqs[i], exp_avg);
      pointers.add_max(i, max_exp_avg_sqs[i]);
    }
    MTAdam<E> call;
    MTAdamRule& rule = call.rule;
    rule.terms = static_cast<int32_t>(terms);
    rule.first = static_cast<int32_t>(first), rule.folded = static_cast<int32_t>(folded);
    rule.anchor = static_cast<int32_t>(anchor);
    rule.applies = applies, rule.decoupled = decoupled;
    rule.nonfinite = nonfinite_of(nonfinite);
    rule.lr = lr, rule.beta1 = betas[0], rule.beta2 = betas[1], rule.beta3 = betas[2], rule.eps = eps;
    rule.weight_decay = weight_decay, rule.alive = alive_eps, rule.max_scale = max_scale;
    call.tensors = pointers.tensors(), call.count = n;
    call.grad_norms = static_cast<T*>(grad_norms.data_ptr()), call.steps = static_cast<T*>(steps.data_ptr());
    const auto floats = [&](const char* name, const std::optional<Tensor>& t, int64_t count) {
      return static_cast<const float*>(expected.numbers(name, t, ScalarType::Float, count));
    };
    const auto doubles = [&](const char* name, const std::optional<Tensor>& t, int64_t count) {
      return static_cast<const double*>(expected.numbers(name, t, ScalarType::Double, count));
    };
    call.square_sums = doubles("square_sums", square_sums, n * folded);
    call.grad_scales = floats("grad_scales", grad_scales, terms);
    call.lr = doubles("lr", lr_tensor, 1);
    call.found_inf = floats("found_inf", found_inf, 1);
    call.ranks = ranks.empty() ? nullptr : ranks.data();
    if (like.is_cpu()) {
      if (call.found_inf != nullptr && *call.found_inf != 0) return;
      CpuCall<E>(call).update();
    } else {
#ifdef FASTKIT_WITH_CUDA
      StreamMemory memory{like};
      check_launch(op, mtadam_update_cuda(call, current_stream(like), std::ref(memory)));
#endif
    }
    pointers.write_back();
  });
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("mtadam_square_sums", TORCH_BOX(&fastkit::mtadam_square_sums));
  m.impl("mtadam_update_", TORCH_BOX(&fastkit::mtadam_update_));
}

#ifdef FASTKIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastkit, CUDA, m) {
  m.impl("mtadam_square_sums", TORCH_BOX(&fastkit::mtadam_square_sums));
  m.impl("mtadam_update_", TORCH_BOX(&fastkit::mtadam_update_));
}
#endif
