// The pruning of lora_linear's A on NumPy arrays, for tests: the CPU's kernels of every ISA, and the GPU's functors
// with a warp that is a loop (host/warp.h).
#include "fastkit/lora_linear_prune.h"

#include <algorithm>
#include <string>
#include <vector>

#include "fastkit/lora_linear_prune_warps.h"
#include "host/arrays.h"
#include "host/warp.h"

namespace {

using namespace fastkit;

template <class E>
std::vector<PruneMatrix<E>> table(std::vector<Array<Stored<E>>>& matrices, const std::vector<Array<float>>& norms,
                                  std::vector<Array<bool>>& kept, const std::vector<int64_t>& pruned) {
  std::vector<PruneMatrix<E>> table;
  int64_t rows = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    auto& m = matrices[i];
    rows += m.shape(0);
    table.push_back({reinterpret_cast<E*>(m.mutable_data()), stride(m, 0), stride(m, 1), norms[i].data(),
                     kept[i].mutable_data(), m.shape(1), pruned[i], rows});
  }
  return table;
}

template <class E>
void prune_rows(const std::string& isa, std::vector<Array<Stored<E>>> matrices, const std::vector<Array<float>>& norms,
                std::vector<Array<bool>> kept, const std::vector<int64_t>& pruned) {
  const auto all = table<E>(matrices, norms, kept, pruned);
  if (all.empty()) return;
  if (isa == "warps") {
    HostStream stream(1);
    return lora_linear_warps::prune_rows(all.data(), static_cast<int64_t>(all.size()), stream);
  }
  const auto& kernels = prune_rows_kernels(isa_of(isa)).of<E>();
  int64_t longest = 0;
  for (const auto& m : all) longest = std::max(longest, m.columns);
  std::vector<Score<E>> scores(kernels.room(longest));
  kernels.run(all.data(), 0, all.back().end_rows, scores.data());
}

template <class E>
Array<float> column_square_sums(const std::string& isa, const Array<Stored<E>>& x) {
  const auto& kernels = column_squares_kernels(isa_of(isa)).of<E>();
  ColumnSquares<E> p;
  p.rows = x.shape(0), p.columns = x.shape(1);
  p.x = {reinterpret_cast<const E*>(x.data()), stride(x, 0)};
  std::vector<Arithmetic<E>> partial(p.parts() * p.columns);
  Array<float> sums(p.columns);
  p.partial = partial.data(), p.sums = sums.mutable_data();
  kernels.run(p, 0, kernels.units(p));
  kernels.finish(p, 0, p.columns);
  return sums;
}

template <class E>
void bind(py::module_& m, const std::string& suffix) {
  m.def(("prune_rows_" + suffix).c_str(), &prune_rows<E>);
  m.def(("column_square_sums_" + suffix).c_str(), &column_square_sums<E>);
}

}  // namespace

void bind_lora_linear_prune(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<BFloat16>(m, "bfloat16");
  bind<Half>(m, "float16");
}
