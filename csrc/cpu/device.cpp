// A CPU build's answers to what cuda/device.cu tells.
#include "fastkit/device.h"

namespace fastkit {

std::string cuda_version() { return ""; }

std::string cuda_driver_version() { return ""; }

}  // namespace fastkit
