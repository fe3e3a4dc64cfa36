// What the library knows of CUDA, whether or not it was built with it.
#pragma once

#include <string>

namespace fastkit {

// Of the CUDA runtime linked in: "13.0", or empty in a CPU build.
std::string cuda_version();

// Of the newest CUDA that this machine's driver runs: "13.0", or empty without a driver and in a CPU build.
std::string cuda_driver_version();

}  // namespace fastkit
