// A CPU build's answer to what cuda/device.cu tells.
#include "fastkit/device.h"

namespace fastkit {

std::string cuda_version() { return ""; }

}  // namespace fastkit
