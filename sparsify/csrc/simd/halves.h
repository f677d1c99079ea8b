// The floats of 16 bits that kernels are made for. As types of their own, so that a load or a store widens or rounds
// by the type of its pointer; all arithmetic is in float32.
#pragma once

#include <stdint.h>

namespace sparsify {

enum class BFloat16 : uint16_t {};  // the upper half of a float32
enum class Float16 : uint16_t {};   // IEEE 754 binary16: 5 bits of exponent, 10 of significand

}  // namespace sparsify
