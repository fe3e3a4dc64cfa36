// Errors in words, raised in Python as RuntimeError. What a user can get wrong is checked in Python, in the
// op's own terms; here only what memory safety needs, for callers of the raw op.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define FASTKIT_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)
