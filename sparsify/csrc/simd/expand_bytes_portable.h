// Packed bytes back into their places, in plain C++.
#pragma once

#include "simd/quads_portable.h"

namespace {

// Byte b of the result is the next of `packed` if bit b of mask is set, else 0; of the mask 16 bits count.
inline IntVec expand(const int8_t *packed, uint64_t mask) {
    int8_t bytes[4 * WIDTH] = {};
    for (uint64_t left = mask & 0xffff; left; left &= left - 1) bytes[__builtin_ctzll(left)] = *packed++;
    IntVec spread;
    memcpy(&spread, bytes, sizeof spread);
    return spread;
}

inline int64_t count_bits(uint64_t mask) { return __builtin_popcountll(mask); }

}  // namespace
