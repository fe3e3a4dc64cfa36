# Cross-compiles for ARM's 64-bit processors, the oldest of them, with Debian's compiler. CMAKE_SYSROOT is given by who
# calls, where the C library of the target is not among the compiler's own files.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CXX_FLAGS_INIT -march=armv8-a)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
