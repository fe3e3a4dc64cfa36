// iir_scan on the CPU: the entry of one ISA, which picks the kernels that suit a call.
#include "cpu/iir_scan_kernels.h"
#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

template <class E>
const IirScanFunctions<E>& functions(const IirScan<E>& p) {
  const bool short_chunks = p.chunk < kShortChunk && p.chunk < p.time;
  if (p.filters == 1 && p.chunk == 1 && p.carry && !p.channels_last) return iir_scan_samples.of<E>();
  const bool tiles = p.filters > 1 || short_chunks;
  // Fewer channels than this leave most lanes of a vector idle.
  const bool wide = p.channels_last && p.channels >= 32 / static_cast<int64_t>(sizeof(Arithmetic<E>));
  if (p.filters > 1 && wide && !p.cascade && !short_chunks) return iir_scan_bank.of<E>();
  if (p.channels_last) return (tiles ? iir_scan_tiles : iir_scan_channels).of<E>();
  // A row at a time takes 2 to 3 times the cycles of a row among others in the lanes.
  constexpr int64_t lanes = 32 / sizeof(Arithmetic<E>);
  const int64_t rows = p.batch * p.channels, blocks = (rows + lanes - 1) / lanes;
  const bool few = rows <= lanes / 2 || 4 * blocks <= p.threads;
  const bool cuts = few && p.time >= kTimeSplit && p.chunk >= kTimeSplit;
  if (cuts && p.cascade) return iir_scan_cascade.of<E>();
  if (tiles) return iir_scan_tiles.of<E>();
  return (cuts ? iir_scan_time : iir_scan_rows).of<E>();
}

template <class E>
int64_t units(const IirScan<E>& p) {
  return functions<E>(p).units(p);
}

template <class E>
void forward(const IirScanForward<E>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  functions<E>(p).forward(p, begin, end);
}

template <class E>
void backward(const IirScanBackward<E>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  functions<E>(p).backward(p, begin, end);
}

template <class E>
constexpr IirScanFunctions<E> kFunctions = {units<E>, forward<E>, backward<E>};

}  // namespace

const IirScanKernels iir_scan_kernels = {kFunctions<float>, kFunctions<double>, kFunctions<BFloat16>, kFunctions<Half>};

}  // namespace fastkit::FASTKIT_ISA
