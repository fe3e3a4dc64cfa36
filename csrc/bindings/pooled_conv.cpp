// pooled_conv: tensors -> raw pointers, for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "fastkit/pooled_conv.h"

namespace fastkit {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// Calls body with the functions of a float32 or float64 tensor.
template <class Body>
void dispatch(const Tensor& x, Body&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(pooled_conv_kernels().f32);
  FASTKIT_CHECK(x.scalar_type() == ScalarType::Double, "pooled_conv: x must be float32 or float64");
  body(pooled_conv_kernels().f64);
}

Tensor readable(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : contiguous(x); }

void check(const Tensor& x, const Tensor& h, int64_t block, int64_t pool) {
  FASTKIT_CHECK(x.is_cpu() && x.dim() == 3 && x.size(1) >= 1 && x.size(2) >= 1,
                "pooled_conv: x must be on the CPU and have shape (B, T, C) with T, C >= 1");
  FASTKIT_CHECK(h.is_cpu() && h.dim() == 2 && h.size(0) == x.size(2) && h.size(1) >= 1 &&
                    h.scalar_type() == x.scalar_type(),
                "pooled_conv: taps must be on the CPU, have the dtype of x and shape (", x.size(2), ", n) with n >= 1");
  FASTKIT_CHECK(pool >= 1 && block >= pool && block % pool == 0 && block < int64_t{1} << 31,
                "pooled_conv: block must be a multiple of pool, got ", block, " and ", pool);
}

// x and h must outlive what comes back.
template <class T, class Call>
void describe(Call& p, const Tensor& x, const Tensor& h, int64_t block, int64_t pool) {
  p.batch = x.size(0), p.time = x.size(1), p.channels = x.size(2), p.taps = h.size(1);
  p.block = block, p.pool = pool, p.blocks = (p.time - 1) / block;
  p.x = static_cast<const T*>(x.data_ptr()), p.x_batch = x.stride(0), p.x_time = x.stride(1);
  p.h = static_cast<const T*>(h.data_ptr());
}

std::tuple<Tensor, Tensor> pooled_conv_fwd(const Tensor& x, const Tensor& taps, int64_t block, int64_t pool) {
  check(x, taps, block, pool);
  const Tensor in = readable(x), h = contiguous(taps);
  const int64_t blocks = (x.size(1) - 1) / block;
  Tensor maxima = new_empty(x, {x.size(0), blocks, x.size(2), pool});
  Tensor places = new_empty(x, {x.size(0), blocks, x.size(2), pool}, ScalarType::Int);
  if (maxima.numel() == 0) return {maxima, places};
  dispatch(x, [&]<class T>(const PooledConvFunctions<T>& functions) {
    PooledConvForward<T> p;
    describe<T>(p, in, h, block, pool);
    p.maxima = static_cast<T*>(maxima.data_ptr()), p.places = static_cast<int32_t*>(places.data_ptr());
    torch::stable::parallel_for(0, p.batch * functions.groups(p), 1, [&](int64_t begin, int64_t end) {
      const Tensor room = new_empty(x, {functions.forward_room(p)});
      functions.forward(p, begin, end, static_cast<T*>(room.data_ptr()));
    });
  });
  return {maxima, places};
}

std::tuple<Tensor, Tensor> pooled_conv_bwd(const Tensor& gmaxima, const Tensor& places, const Tensor& x,
                                           const Tensor& taps, int64_t block, int64_t pool) {
  check(x, taps, block, pool);
  const int64_t blocks = (x.size(1) - 1) / block;
  const auto fits = [&](const Tensor& t) {
    return t.is_cpu() && t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == blocks && t.size(2) == x.size(2) &&
           t.size(3) == pool;
  };
  FASTKIT_CHECK(fits(gmaxima) && gmaxima.scalar_type() == x.scalar_type() && fits(places) &&
                    places.scalar_type() == ScalarType::Int,
                "pooled_conv: gradient and places must be shaped like the maxima");
  const Tensor in = readable(x), h = contiguous(taps), g = contiguous(gmaxima), at = contiguous(places);
  Tensor gx = new_empty(x, {x.size(0), x.size(1), x.size(2)}), gh = new_empty(taps, {taps.size(0), taps.size(1)});
  if (gmaxima.numel() == 0) {
    torch::stable::zero_(gx), torch::stable::zero_(gh);
    return {gx, gh};
  }
  const int32_t* begin_of_places = static_cast<const int32_t*>(at.data_ptr());
  FASTKIT_CHECK(std::all_of(begin_of_places, begin_of_places + at.numel(),
                            [&](int32_t place) { return place >= 0 && place < block; }),
                "pooled_conv: places must lie in the block");
  dispatch(x, [&]<class T>(const PooledConvFunctions<T>& functions) {
    PooledConvBackward<T> p;
    describe<T>(p, in, h, block, pool);
    const int64_t groups = functions.groups(p);
    p.segments = std::clamp<int64_t>(16 / groups, 1, p.batch);  // units for some threads, whatever their number
    const Tensor parts = new_empty(taps, {p.segments, p.channels, p.taps});
    p.gmaxima = static_cast<const T*>(g.data_ptr()), p.places = begin_of_places;
    p.gx = static_cast<T*>(gx.data_ptr()), p.gh = static_cast<T*>(gh.data_ptr());
    p.gh_parts = static_cast<T*>(parts.data_ptr());
    torch::stable::parallel_for(0, groups * p.segments, 1, [&](int64_t begin, int64_t end) {
      const Tensor room = new_empty(x, {functions.backward_room(p)});
      functions.backward(p, begin, end, static_cast<T*>(room.data_ptr()));
    });
    const int64_t grain = (int64_t{1} << 16) / p.taps + 1;
    torch::stable::parallel_for(0, p.channels, grain,
                                [&](int64_t begin, int64_t end) { functions.finish(p, begin, end); });
  });
  return {gx, gh};
}

}  // namespace
}  // namespace fastkit

STABLE_TORCH_LIBRARY_IMPL(fastkit, CPU, m) {
  m.impl("pooled_conv_fwd", TORCH_BOX(&fastkit::pooled_conv_fwd));
  m.impl("pooled_conv_bwd", TORCH_BOX(&fastkit::pooled_conv_bwd));
}
