// Packed bytes back into their places.
#pragma once

#include "simd/quads_avx512.h"

namespace {

// Byte b of the result is the next of `packed` if bit b of mask is set, else 0. Reads 64 bytes. Merged into a register
// that was cleared, as in simd/expand_avx512.h.
inline IntVec expand(const int8_t *packed, uint64_t mask) {
    IntVec spread;
    const IntVec from = _mm512_loadu_si512(packed);
    asm("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}" : "=&v"(spread) : "v"(from), "Yk"(_cvtu64_mask64(mask)));
    return spread;
}

// Number i of the result is the next of `packed` if bit i of mask is set, else 0. Reads 64 bytes.
inline IntVec expand(const BFloat16 *packed, uint32_t mask) {
    IntVec spread;
    const IntVec from = _mm512_loadu_si512(packed);
    asm("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}" : "=&v"(spread) : "v"(from), "Yk"(_cvtu32_mask32(mask)));
    return spread;
}

inline int64_t count_bits(uint64_t mask) { return _mm_popcnt_u64(mask); }

}  // namespace
