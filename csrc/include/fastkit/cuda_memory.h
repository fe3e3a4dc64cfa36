// Memory for launchers. Apart from the kernel interfaces, which every ISA compiles and which bring in nothing of std.
#pragma once

#include <cstdint>
#include <functional>

namespace fastkit {

// Gives memory of the current GPU, which lives until the work that has been launched is done.
using CudaMemory = std::function<void*(int64_t bytes)>;

}  // namespace fastkit
