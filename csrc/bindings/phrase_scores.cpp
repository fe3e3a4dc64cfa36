// phrase_scores and select_phrases: tensors -> raw pointers, for the CPU.
#include "fastkit/phrase_scores.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/aligned.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/ranges.h"

namespace fastkit {
namespace {

using torch::stable::new_empty;

// An argument of one set, or of all: dense, its last dimensions of so many numbers.
struct Of {
  const void* data = nullptr;
  int64_t numel = 0, sets = 1;

  template <class T>
  const T* set(int64_t i) const {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + (sets == 1 ? 0 : i * numel);
  }
};

struct Arguments {
  const char* op;
  ScalarType dtype;
  int64_t sets = 1;

  Of take(const char* name, const std::optional<Tensor>& given, int64_t numel) {
    if (!given) return {};
    const Tensor& t = *given;
    FASTKIT_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.dim() >= 1, op, ": ", name,
                  " must be dense, on the CPU, in the dtype of candidates");
    const int64_t count = t.size(0);
    FASTKIT_CHECK(t.numel() == count * numel, op, ": ", name, " must have ", numel, " numbers for each set");
    FASTKIT_CHECK(count == 1 || sets == 1 || count == sets, op, ": ", name, " must be of one set, or of ", sets);
    if (count != 1) sets = count;
    return {t.data_ptr(), numel, count};
  }
};

// Of all sets: in turn, each by all threads, or each by one.
template <class T, class Call>
void for_each_set(int64_t sets, int64_t bytes, Call&& call) {
  const auto some = [&](int64_t begin, int64_t end, ParallelRanges parallel) {
    const Aligned<char> room(bytes);
    for (int64_t i = begin; i < end; ++i) call(i, room.data(), parallel);
  };
  if (sets < static_cast<int64_t>(torch::stable::get_num_threads())) return some(0, sets, in_parallel);
  torch::stable::parallel_for(0, sets, 1, [&](int64_t begin, int64_t end) { some(begin, end, in_order); });
}

template <class Call>
void dispatch(const char* op, const Tensor& candidates, Call&& call) {
  FASTKIT_CHECK(candidates.dim() == 3 && candidates.is_cpu(), op, ": candidates must have shape (G, m, D), on the CPU");
  if (candidates.scalar_type() == ScalarType::Float) return call(float(), phrase_scores_kernels().f32);
  FASTKIT_CHECK(candidates.scalar_type() == ScalarType::Double, op, ": candidates must be float32 or float64");
  call(double(), phrase_scores_kernels().f64);
}

struct Sets {
  int64_t count, columns, sets;
  Of candidates, centroid, scatter, prior;

  static Sets of(Arguments& arguments, const Tensor& candidates, const Tensor& centroid, const Tensor& scatter,
                 const std::optional<Tensor>& prior) {
    Sets sets{candidates.size(1), candidates.size(2), 1, {}, {}, {}, {}};
    sets.candidates = arguments.take("candidates", candidates, sets.count * sets.columns);
    sets.centroid = arguments.take("centroid", centroid, sets.columns);
    sets.scatter = arguments.take("scatter", scatter, sets.columns * sets.columns);
    sets.prior = arguments.take("prior", prior, sets.count);
    return sets;
  }

  template <class T>
  void give(PhraseSet<T>& p, int64_t i) const {
    p.count = count, p.columns = columns;
    p.candidates = candidates.set<T>(i), p.centroid = centroid.set<T>(i), p.scatter = scatter.set<T>(i);
    p.prior = prior.set<T>(i);
  }
};

std::tuple<Tensor, Tensor, Tensor> phrase_scores_fwd(const Tensor& candidates, const Tensor& centroid,
                                                     const Tensor& scatter, const std::optional<Tensor>& chosen,
                                                     const std::optional<Tensor>& prior, double variance_weight,
                                                     double orthogonality_weight, double prior_weight) {
  Tensor score, variance, increment;
  dispatch("phrase_scores", candidates, [&]<class T>(T, const PhraseFunctions<T>& functions) {
    Arguments arguments{"phrase_scores", candidates.scalar_type()};
    const Sets sets = Sets::of(arguments, candidates, centroid, scatter, prior);
    FASTKIT_CHECK(!chosen || chosen->dim() == 3, "phrase_scores: chosen must have shape (G, S, D)");
    const int64_t some = chosen ? chosen->size(1) : 0;
    const Of before = arguments.take("chosen", chosen, some * sets.columns);
    for (Tensor* t : {&score, &variance, &increment}) *t = new_empty(candidates, {arguments.sets, sets.count});
    PhraseScoring<T> p;
    sets.give(static_cast<PhraseSet<T>&>(p), 0);
    for_each_set<T>(arguments.sets, functions.room(p, some), [&](int64_t i, char* room, ParallelRanges parallel) {
      PhraseScoring<T> of;
      sets.give(static_cast<PhraseSet<T>&>(of), i);
      of.variance_weight = variance_weight, of.orthogonality_weight = orthogonality_weight;
      of.prior_weight = prior_weight, of.room = room;
      of.chosen = before.set<T>(i), of.chosen_count = some;
      of.score = static_cast<T*>(score.data_ptr()) + i * sets.count;
      of.variance = static_cast<T*>(variance.data_ptr()) + i * sets.count;
      of.increment = static_cast<T*>(increment.data_ptr()) + i * sets.count;
      functions.score(of, parallel);
    });
  });
  return {score, variance, increment};
}

std::tuple<Tensor, Tensor, Tensor> select_phrases_fwd(const Tensor& candidates, const Tensor& centroid,
                                                      const Tensor& scatter, const std::optional<Tensor>& prior,
                                                      int64_t k, bool deflate, double variance_weight,
                                                      double orthogonality_weight, double prior_weight) {
  Tensor indices, scores, variances;
  dispatch("select_phrases", candidates, [&]<class T>(T, const PhraseFunctions<T>& functions) {
    Arguments arguments{"select_phrases", candidates.scalar_type()};
    const Sets sets = Sets::of(arguments, candidates, centroid, scatter, prior);
    FASTKIT_CHECK(k >= 0 && k <= sets.count, "select_phrases: k must be from 0 to the number of candidates, ",
                  sets.count);
    indices = new_empty(candidates, {arguments.sets, k}, ScalarType::Long);
    scores = new_empty(candidates, {arguments.sets, k}), variances = new_empty(candidates, {arguments.sets, k});
    PhraseChoice<T> p;
    sets.give(static_cast<PhraseSet<T>&>(p), 0);
    for_each_set<T>(arguments.sets, functions.room(p, 0), [&](int64_t i, char* room, ParallelRanges parallel) {
      PhraseChoice<T> of;
      sets.give(static_cast<PhraseSet<T>&>(of), i);
      of.variance_weight = variance_weight, of.orthogonality_weight = orthogonality_weight;
      of.prior_weight = prior_weight, of.room = room, of.k = k, of.deflate = deflate;
      of.indices = static_cast<int64_t*>(indices.data_ptr()) + i * k;
      of.scores = static_cast<T*>(scores.data_ptr()) + i * k;
      of.variances = static_cast<T*>(variances.data_ptr()) + i * k;
      functions.select(of, parallel);
    });
  });
  return {indices, scores, variances};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("phrase_scores_fwd", TORCH_BOX(&fastkit::phrase_scores_fwd));
  m.impl("select_phrases_fwd", TORCH_BOX(&fastkit::select_phrases_fwd));
}
