// mtadam on the GPU: what its warps do. Plain functors of a team of warps (common/warp.h), which tests also run on the
// host.
//
// What       one step of Adam for several losses: the formulas at the head of mtadam.h.
// Kernels    SquareSums  of a gradient's chunks, in `partials`;
//            Totals      of a gradient, from its partials;
//            Balance     of a tensor: norms, factors, the count of steps, and what Update needs besides;
//            Update      of a tensor's chunks: moments and the parameter.
// Parallel   tensors are cut into chunks. A team to a chunk, in SquareSums to a chunk and a term; neighbouring threads
//            have neighbouring packs of up to 16 bytes, or single elements where a pointer is not aligned to them. A
//            team to a gradient in Totals, a lane to a tensor in Balance.
// Tables     of tensors and their pointers are parameters of the kernels, as many tensors to a launch as fit. So nothing
//            is copied to the device, and a CUDA graph captures a call.
// Latency    hidden by loads that do not wait for each other: Update's of kGroup terms, SquareSums' of kInFlight packs.
// Bytes      fp32, per element under L terms: SquareSums reads g, 4 L. Update reads g, reads and writes v, 12 L, and p
//            and m, 16; amsgrad's maximum 8. Of terms folded by an earlier piece the last one reads v, 4 each.
// Numerics   a thread sums its squares in T, kChunk / kTeamThreads of them at most, the rest is summed in double: so
//            what overflows or vanishes as a square in T does so here. The parameter is rounded once. No atomics, and a
//            fixed order of every sum: the same call gives the same bits.
#pragma once

#include "common/convert.h"
#include "common/warp.h"
#include "fastkit/mtadam_balance.h"
#include "fastkit/mtadam_cuda.h"

namespace fastkit::mtadam_warps {

inline constexpr int kTeamWarps = 4;
inline constexpr int kTeamThreads = kTeamWarps * kWarpLanes;
inline constexpr int kPackBytes = 16;  // of E in SquareSums, of T in Update
inline constexpr int kInFlight = 4;    // packs that a thread of SquareSums loads before it computes
inline constexpr int kGroup = 4;       // terms, likewise in Update
// Elements: few enough that a matrix of 768x768 has a team for half the multiprocessors of a large GPU, and so many that
// looking for the tensor takes no time beside them.
inline constexpr int32_t kChunk = 8192;

FASTKIT_ALWAYS_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Of elements that move together, aligned to what they take in all.
template <class U, int kPack>
struct alignas(sizeof(U) * kPack) Pack {
  U at[kPack];

  static FASTKIT_DEVICE Pack load(const U* from) { return *reinterpret_cast<const Pack*>(from); }
  // In PTX: nvcc 13.0 takes most copies of a pack to memory apart into its elements.
  FASTKIT_DEVICE void store(U* to) const {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Pack) >= 8) {
      uint32_t words[sizeof(Pack) / 4];
      memcpy(words, at, sizeof(Pack));
      if constexpr (sizeof(Pack) == 8) {
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
      } else {
        static_assert(sizeof(Pack) == 16);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
                     "r"(words[2]), "r"(words[3])
                     : "memory");
      }
      return;
    }
#endif
    *reinterpret_cast<Pack*>(to) = *this;
  }
};

// The tensors of a launch in chunks, each with a row of `width` pointers.
struct Table {
  static constexpr int kTensors = 480, kPointers = 3000;  // of the 32764 bytes of a kernel's parameters since CUDA 12.1

  void* pointers[kPointers];
  int64_t numel[kTensors];
  int64_t ends[kTensors];  // chunks of it and of those before
  bool packed[kTensors];   // its pointers are aligned to packs
  int32_t width = 0, count = 0;
  int64_t first = 0, first_chunk = 0;  // tensors of the call before those of the table, and their chunks

  struct Chunk {
    int32_t tensor, row;  // of the table; the tensor's first pointer
    bool packed;
    int64_t begin;
    int32_t numel;
  };

  FASTKIT_DEVICE Chunk chunk(int64_t which) const {
    int32_t i = 0, end = count - 1;  // the first whose end is beyond the chunk
    while (i < end) {
      const int32_t middle = (i + end) / 2;
      if (ends[middle] > which) {
        end = middle;
      } else {
        i = middle + 1;
      }
    }
    const int64_t begin = (which - (i == 0 ? 0 : ends[i - 1])) * kChunk, left = numel[i] - begin;
    return {i, i * width, packed[i], begin, left < kChunk ? static_cast<int32_t>(left) : kChunk};
  }

  // On the host.

  int64_t chunks() const { return count == 0 ? 0 : ends[count - 1]; }
  bool full() const { return count == kTensors || (count + 1) * width > kPointers; }
  // Goes on behind the tensors that it has.
  void restart() {
    first += count, first_chunk += chunks();
    count = 0;
  }
  // A tensor, whose pointers point(add) adds, each with the bytes of a pack.
  template <class Point>
  void append(int64_t of, Point&& point) {
    void** to = pointers + count * width;
    bool aligned = true;
    point([&](const void* pointer, int bytes) {
      *to++ = const_cast<void*>(pointer);
      aligned &= reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    });
    numel[count] = of, ends[count] = chunks() + chunks_of(of), packed[count] = aligned;
    ++count;
  }
};

struct SumRoom {
  double of_warp[kTeamWarps];
};

// The sum of what the threads of a team have, v.
template <class Team, class PerThread>
FASTKIT_DEVICE void sum_up(Team& team, SumRoom& room, PerThread& v, double* sum) {
  scan(team, v, [](double upper, double lower) { return upper + lower; });
  team.each([&](int thread) {
    if (thread % kWarpLanes == kWarpLanes - 1) room.of_warp[thread / kWarpLanes] = v[thread];
  });
  team.sync();
  team.each([&](int thread) {
    if (thread != 0) return;
    double all = 0;
FASTKIT_UNROLL
    for (int w = 0; w < kTeamWarps; ++w) all += room.of_warp[w];
    *sum = all;
  });
}

// A unit is a chunk and a term.
template <class E>
struct SquareSums {
  using T = Arithmetic<E>;
  using Room = SumRoom;
  static constexpr int kWarps = kTeamWarps, kWide = kPackBytes / sizeof(E);

  Table table;                 // of the gradients
  double* partials = nullptr;  // (chunks, folded)

  // What a thread has of that many packs.
  template <int kPack>
  static FASTKIT_DEVICE double of_thread(const E* grad, int32_t packs, int thread) {
    T sums[kPack] = {};
    for (int32_t i = thread; i < packs; i += kInFlight * kTeamThreads) {
      Pack<E, kPack> g[kInFlight];
FASTKIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        const int32_t at = i + j * kTeamThreads;
        g[j] = {};
        if (at < packs) g[j] = Pack<E, kPack>::load(grad + at * kPack);
      }
FASTKIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
FASTKIT_UNROLL
        for (int k = 0; k < kPack; ++k) {
          const T x = widen_element(g[j].at[k]);
          sums[k] += x * x;
        }
      }
    }
    double sum = 0;
FASTKIT_UNROLL
    for (int k = 0; k < kPack; ++k) sum += sums[k];
    return sum;
  }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const auto which = static_cast<uint32_t>(unit), folded = static_cast<uint32_t>(table.width);
    const Table::Chunk c = table.chunk(which / folded);
    const auto* grad = static_cast<const E*>(table.pointers[c.row + which % folded]);
    typename Team::template PerLane<double> sum;
    team.each([&](int thread) {
      sum[thread] = 0;
      if (grad == nullptr) return;
      const int32_t packs = c.packed ? c.numel / kWide : 0, rest = packs * kWide;
      sum[thread] = of_thread<kWide>(grad + c.begin, packs, thread) +
                    of_thread<1>(grad + c.begin + rest, c.numel - rest, thread);
    });
    sum_up(team, room, sum, partials + table.first_chunk * folded + which);
  }
};

// A unit is a tensor and a term.
struct Totals {
  using Room = SumRoom;
  static constexpr int kWarps = kTeamWarps, kTensors = 1000;

  int64_t ends[kTensors];  // chunks of it and of those before, of the launch
  int32_t folded = 0;
  const double* partials = nullptr;  // (chunks, folded), of the launch
  double* sums = nullptr;            // (tensors, folded), of the launch

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room& room) const {
    const auto tensor = static_cast<int32_t>(unit) / folded, term = static_cast<int32_t>(unit) % folded;
    const int64_t begin = tensor == 0 ? 0 : ends[tensor - 1], end = ends[tensor];
    typename Team::template PerLane<double> sum;
    team.each([&](int thread) {
      sum[thread] = 0;
FASTKIT_UNROLL
      for (int64_t chunk = begin + thread; chunk < end; chunk += kTeamThreads) {
        sum[thread] += partials[chunk * folded + term];
      }
    });
    sum_up(team, room, sum, sums + unit);
  }
};

// What Balance tells Update of a tensor.
template <class T>
struct Balanced {
  MTAdamStep<T> step;  // where the rule applies
  bool takes_part;
};

// A unit is as many tensors as a warp has lanes.
template <class E>
struct Balance {
  using T = Arithmetic<E>;
  struct Room {};
  static constexpr int kWarps = 1, kTensors = 1000;

  MTAdam<E> call;        // with square sums; its lists are the host's
  T* factors = nullptr;  // (count, folded)
  Balanced<T>* balanced = nullptr;
  int64_t first = 0;  // tensors of the call before those of the launch
  int32_t count = 0;
  bool reached[kTensors];  // by a gradient, of this piece or an earlier one
  double ranks[kMTAdamTerms];

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room&) const {
    team.each([&](int lane) {
      const auto which = static_cast<int32_t>(unit) * kWarpLanes + lane;
      if (which >= count) return;
      const MTAdamRule& rule = call.rule;
      const int64_t i = first + which;
      const bool stopped = call.found_inf != nullptr && *call.found_inf != 0;
      Balanced<T> b{{}, false};
      if (!stopped && reached[which]) {
        b.takes_part = mtadam_balance<T>(rule, call.square_sums + i * rule.folded, call.grad_scales, ranks,
                                         call.grad_norms + i * rule.terms, factors + i * rule.folded);
      }
      if (b.takes_part && rule.applies) {
        const T step = call.steps[i] += 1;
        b.step = mtadam_step<T>(rule, call.lr == nullptr ? rule.lr : *call.lr, step);
      }
      balanced[i] = b;
    });
  }
};

// As torch has it: NaN if either is.
template <class T>
FASTKIT_DEVICE T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// A unit is a chunk.
template <class E>
struct Update {
  using T = Arithmetic<E>;
  struct Room {};
  static constexpr int kWarps = kTeamWarps, kWide = kPackBytes / sizeof(T);
  // In a row of the table. Gradients are followed by exp_avg_sqs.
  static constexpr int kParam = 0, kExpAvg = 1, kMaxExpAvgSq = 2, kGrads = 3;

  Table table;
  int32_t terms = 0, first = 0, folded = 0;
  bool applies = true, propagates = false;
  T beta1 = 0, of_total = 0, beta2 = 0, of_square = 0, eps = 0, coupled = 0;
  const T* factors = nullptr;  // (count, folded)
  const Balanced<T>* balanced = nullptr;

  explicit Update(const MTAdamRule& rule)
      : terms(rule.terms), first(rule.first), folded(rule.folded), applies(rule.applies),
        propagates(rule.nonfinite == NonFinite::propagate),
        beta1(static_cast<T>(rule.first == 0 ? rule.beta1 : 1.0)), of_total(static_cast<T>(1 - rule.beta1)),
        beta2(static_cast<T>(rule.beta2)), of_square(static_cast<T>(1 - rule.beta2)), eps(static_cast<T>(rule.eps)),
        coupled(static_cast<T>(rule.coupled())) {}

  // The kPack elements of a tensor from `at` on; `row` and `factors` are the tensor's.
  template <int kPack>
  FASTKIT_DEVICE void update(int32_t row, int64_t at, const T* factors, const MTAdamStep<T>& step) const {
    using Element = Pack<E, kPack>;
    using Value = Pack<T, kPack>;
    const auto of = [&](int32_t l) { return static_cast<T*>(table.pointers[row + kGrads + folded + l]) + at; };
    E* const param_at = static_cast<E*>(table.pointers[row + kParam]) + at;
    T* const exp_avg_at = static_cast<T*>(table.pointers[row + kExpAvg]) + at;
    T* const max_at = static_cast<T*>(table.pointers[row + kMaxExpAvgSq]);
    Element param{};
    if (applies || coupled != 0) param = Element::load(param_at);
    Value exp_avg = Value::load(exp_avg_at), total{}, most{};
    if (applies && max_at != nullptr) most = Value::load(max_at + at);

    for (int32_t l = 0; l < folded; l += kGroup) {
      Element g[kGroup];
      Value v[kGroup];
      T factor[kGroup];
FASTKIT_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        g[j] = {}, v[j] = {}, factor[j] = 0;
        if (l + j >= folded) continue;
        v[j] = Value::load(of(first + l + j));
        if (const auto* grad = static_cast<const E*>(table.pointers[row + kGrads + l + j]); grad != nullptr) {
          g[j] = Element::load(grad + at);
          factor[j] = factors[l + j];
        }
      }
FASTKIT_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        if (l + j >= folded) continue;
FASTKIT_UNROLL
        for (int k = 0; k < kPack; ++k) {
          const bool left_out = factor[j] == 0 && !propagates;  // it may be NaN
          T h = left_out ? T{0} : factor[j] * widen_element(g[j].at[k]);
          if (coupled != 0) h += coupled * widen_element(param.at[k]);
          total.at[k] += h;
          v[j].at[k] = beta2 * v[j].at[k] + of_square * (h * h);
          most.at[k] = maximum(most.at[k], v[j].at[k]);
        }
        v[j].store(of(first + l + j));
      }
    }
FASTKIT_UNROLL
    for (int k = 0; k < kPack; ++k) exp_avg.at[k] = beta1 * exp_avg.at[k] + of_total * total.at[k];
    exp_avg.store(exp_avg_at);
    if (!applies) return;

    for (int32_t l = 0; l < terms - folded; l += kGroup) {  // the terms of other pieces
      Value v[kGroup];
FASTKIT_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        v[j] = {};
        if (l + j >= terms - folded) continue;
        v[j] = Value::load(of(l + j < first ? l + j : l + j + folded));
      }
FASTKIT_UNROLL
      for (int j = 0; j < kGroup; ++j) {
FASTKIT_UNROLL
        for (int k = 0; k < kPack; ++k) most.at[k] = maximum(most.at[k], v[j].at[k]);
      }
    }
    if (max_at != nullptr) most.store(max_at + at);
FASTKIT_UNROLL
    for (int k = 0; k < kPack; ++k) {
      const T root = sqrt(most.at[k]) * step.correction + eps;
      param.at[k] = round_element<E>(step.kept * widen_element(param.at[k]) - step.step_size * exp_avg.at[k] / root);
    }
    param.store(param_at);
  }

  template <class Team>
  FASTKIT_DEVICE void operator()(Team& team, int64_t unit, Room&) const {
    const Table::Chunk c = table.chunk(unit);
    const int64_t tensor = table.first + c.tensor;
    const Balanced<T> b = balanced[tensor];
    if (!b.takes_part) return;
    const T* const of_tensor = factors + tensor * folded;
    const int32_t packs = c.packed ? c.numel / kWide : 0;
    team.each([&](int thread) {
      for (int32_t i = thread; i < packs; i += kTeamThreads) {
        update<kWide>(c.row, c.begin + i * kWide, of_tensor, b.step);
      }
      for (int32_t i = packs * kWide + thread; i < c.numel; i += kTeamThreads) {
        update<1>(c.row, c.begin + i, of_tensor, b.step);
      }
    });
  }
};

// --- the launches. Stream: run(body, units), allocate<U>(count) ------------------------------------------------------

inline constexpr int kParameterBytes = 32764 - sizeof(int64_t);  // of a body; the rest is the number of units
static_assert(sizeof(Update<double>) <= kParameterBytes && sizeof(Totals) <= kParameterBytes &&
              sizeof(SquareSums<double>) <= kParameterBytes && sizeof(Balance<double>) <= kParameterBytes);
static_assert(Update<double>::kGrads + 2 * kMTAdamTerms <= Table::kPointers);  // a tensor fits

// For the chunks of all tensors, `units` each. point(tensor, add) adds its row of pointers to the table.
template <class E, class Body, class Stream, class Point>
void run_chunks(const MTAdam<E>& call, Body& body, int64_t units, Stream& stream, Point&& point) {
  Table& table = body.table;
  for (int64_t i = 0; i < call.count; table.restart()) {
    for (; i < call.count && !table.full(); ++i) {
      const MTAdamTensor<E>& tensor = call.tensors[i];
      table.append(tensor.numel, [&](auto&& add) { point(tensor, add); });
    }
    stream.run(body, table.chunks() * units);
  }
}

// Of call.tensors' gradients (count, folded).
template <class E, class Stream>
void square_sums(const MTAdam<E>& call, double* sums, Stream& stream) {
  const int32_t folded = call.rule.folded;
  int64_t chunks = 0;
  for (int64_t i = 0; i < call.count; ++i) chunks += chunks_of(call.tensors[i].numel);
  double* const partials = stream.template allocate<double>(chunks * folded);

  SquareSums<E> body;
  body.partials = partials, body.table.width = folded;
  run_chunks(call, body, folded, stream, [&](const MTAdamTensor<E>& tensor, auto&& add) {
    for (int32_t l = 0; l < folded; ++l) add(tensor.grads[l], kPackBytes);
  });

  Totals totals;
  totals.folded = folded, totals.partials = partials, totals.sums = sums;
  for (int64_t i = 0; i < call.count;) {
    int32_t count = 0;
    int64_t end = 0;
    for (; i < call.count && count < Totals::kTensors; ++i) {
      totals.ends[count++] = end += chunks_of(call.tensors[i].numel);
    }
    stream.run(totals, int64_t{count} * folded);
    totals.partials += end * folded, totals.sums += int64_t{count} * folded;
  }
}

template <class E, class Stream>
void update(const MTAdam<E>& call, Stream& stream) {
  using T = Arithmetic<E>;
  const MTAdamRule& rule = call.rule;
  Balance<E> balance;
  balance.call = call;
  if (call.square_sums == nullptr) {
    double* const sums = stream.template allocate<double>(call.count * rule.folded);
    square_sums(call, sums, stream);
    balance.call.square_sums = sums;
  }
  balance.factors = stream.template allocate<T>(call.count * rule.folded);
  balance.balanced = stream.template allocate<Balanced<T>>(call.count);
  for (int32_t l = 0; l < rule.terms; ++l) balance.ranks[l] = call.ranks == nullptr ? 1.0 : call.ranks[l];
  for (int64_t i = 0; i < call.count; balance.first += balance.count) {
    for (balance.count = 0; i < call.count && balance.count < Balance<E>::kTensors; ++i) {
      bool reached = rule.first > 0;
      for (int32_t l = 0; l < rule.folded; ++l) reached |= call.tensors[i].grads[l] != nullptr;
      balance.reached[balance.count++] = reached;
    }
    stream.run(balance, (balance.count + kWarpLanes - 1) / kWarpLanes);
  }

  Update<E> body(rule);
  body.factors = balance.factors, body.balanced = balance.balanced;
  body.table.width = Update<E>::kGrads + rule.folded + rule.terms;
  run_chunks(call, body, 1, stream, [&](const MTAdamTensor<E>& tensor, auto&& add) {
    constexpr int kOfE = Update<E>::kWide * sizeof(E);
    add(tensor.param, kOfE), add(tensor.exp_avg, kPackBytes), add(tensor.max_exp_avg_sq, kPackBytes);
    for (int32_t l = 0; l < rule.folded; ++l) add(tensor.grads[l], kOfE);
    for (int32_t l = 0; l < rule.terms; ++l) add(tensor.exp_avg_sqs[l], kPackBytes);
  });
}

}  // namespace fastkit::mtadam_warps
