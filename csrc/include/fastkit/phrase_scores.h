// Kernel interface of phrase_scores and select_phrases: m candidates of D numbers, of one image set.
//
//   t = candidate / |candidate|,  a = centroid / |centroid|,  u = (t - a) / |t - a|, 0 where |t - a| <= kLeastLength
//   variance  = u^T scatter u, not below 0
//   increment = sqrt(O^2 + 2 overlap) - O,  O = |F F^T - I|,  overlap = sum of (t . f)^2 over rows f of F, unit as t is
//   score     = prior_weight prior + variance_weight variance - orthogonality_weight increment
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "fastkit/parallel.h"

namespace fastkit {

inline constexpr double kLeastLength = 1e-3;  // below which what is left of a direction is noise

template <class T>
struct PhraseSet {
  int64_t count = 0, columns = 0;   // m, D
  const T* candidates = nullptr;    // (m, D)
  const T* centroid = nullptr;      // (D)
  const T* scatter = nullptr;       // (D, D)
  const T* prior = nullptr;         // (m), or null
  double variance_weight = 0, orthogonality_weight = 0, prior_weight = 0;
  char* room = nullptr;  // as many bytes as room() says, from a cache line on
};

template <class T>
struct PhraseScoring : PhraseSet<T> {
  int64_t chosen_count = 0;  // S
  const T* chosen = nullptr;  // (S, D)
  T* score = nullptr;         // (m), as the others
  T* variance = nullptr;
  T* increment = nullptr;
};

template <class T>
struct PhraseChoice : PhraseSet<T> {
  int64_t k = 0;         // at most m
  bool deflate = false;  // the direction's part that is orthogonal to those chosen, instead of an increment
  int64_t* indices = nullptr;  // (k)
  T* scores = nullptr;         // (k)
  T* variances = nullptr;      // (k)
};

template <class T>
struct PhraseFunctions {
  int64_t (*room)(const PhraseSet<T>&, int64_t chosen);  // S, or 0 of a choice
  void (*score)(const PhraseScoring<T>&, ParallelRanges);
  void (*select)(const PhraseChoice<T>&, ParallelRanges);
};

struct PhraseScoresKernels {
  PhraseFunctions<float> f32;
  PhraseFunctions<double> f64;
};
FASTKIT_TABLE(PhraseScoresKernels, phrase_scores_kernels)

}  // namespace fastkit
