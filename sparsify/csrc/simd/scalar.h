// Single values of each dtype, for kernels that go weight by weight.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simd/halves.h"

namespace {

inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float a) { return a; }
inline float to_float(int8_t a) { return a; }
inline float to_float(sparsify::BFloat16 a) { return float_of_bits(uint32_t(a) << 16); }
// Without a subnormal float32 on the way, which a thread may have set to be flushed to zero.
inline float to_float(sparsify::Float16 a) {
    const uint32_t bits = uint32_t(a), magnitude = bits & 0x7fff, exponent = magnitude >> 10;
    const float value = exponent == 0 ? float(magnitude) * 0x1p-24f
                                      : float_of_bits((magnitude << 13) + ((exponent == 31 ? 224u : 112u) << 23));
    return bits & 0x8000 ? -value : value;
}

// a to nearest, even if two are as near. NaN stays (quiet) NaN.
template <typename Half>
inline Half rounded_to(float a);
template <>
[[maybe_unused]] inline sparsify::BFloat16 rounded_to(float a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    const uint32_t rounded = a != a ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
    return sparsify::BFloat16(uint16_t(rounded >> 16));
}
template <>
[[maybe_unused]] inline sparsify::Float16 rounded_to(float a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000)  // NaN
        half = 0x7e00 | (magnitude >> 13 & 0x3ff);
    else if (magnitude >= 0x477ff000)  // 65520 and more: Inf
        half = 0x7c00;
    else if (magnitude < 0x38800000)  // less than the smallest normal number, 2^-14
        half = uint32_t(rintf(float_of_bits(magnitude) * 0x1p24f));
    else
        half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return sparsify::Float16(uint16_t(sign | half));
}

}  // namespace
