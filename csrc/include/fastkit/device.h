// What the library knows of CUDA, whether or not it was built with it.
#pragma once

#include <string>

namespace fastkit {

// "13.0", or empty in a CPU build.
std::string cuda_version();

}  // namespace fastkit
