// iir_scan on the CPU: the entry of one ISA, which picks the kernels of the axis that has stride 1.
#include "cpu/iir_scan_kernels.h"
#include "cpu/simd.h"

namespace fastkit::FASTKIT_ISA {
namespace {

template <class T>
const IirScanFunctions<T>& functions(const IirScan<T>& p) {
  return (p.channels_last ? iir_scan_channels : iir_scan_rows).template of<T>();
}

template <class T>
int64_t units(const IirScan<T>& p) {
  return functions<T>(p).units(p);
}

template <class T>
void forward(const IirScanForward<T>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  functions<T>(p).forward(p, begin, end);
}

template <class T>
void backward(const IirScanBackward<T>& p, int64_t begin, int64_t end) {
  KernelScope scope;
  functions<T>(p).backward(p, begin, end);
}

}  // namespace

const IirScanKernels iir_scan_kernels = {{units<float>, forward<float>, backward<float>},
                                         {units<double>, forward<double>, backward<double>}};

}  // namespace fastkit::FASTKIT_ISA
