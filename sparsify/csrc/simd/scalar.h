// Single values of each dtype, for kernels that go weight by weight.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline float to_float(float a) { return a; }
inline float to_float(int8_t a) { return a; }
inline float to_float(uint16_t a) {
    const uint32_t bits = uint32_t(a) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace
