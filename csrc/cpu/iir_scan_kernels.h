// The two layouts of iir_scan's CPU kernels, of the ISA that this file is being compiled for.
#pragma once

#include "fastkit/iir_scan.h"

namespace fastkit::FASTKIT_ISA {

extern const IirScanKernels iir_scan_rows;      // time has stride 1
extern const IirScanKernels iir_scan_channels;  // channels have stride 1

}  // namespace fastkit::FASTKIT_ISA
