// Packed values back into their lanes, for AVX2, which has no expand: a permutation from a table of 256.
#pragma once

#include "simd/avx2.h"

namespace {

struct ExpandTable {
    uint8_t source[256][8];  // lane l takes value `number of set bits below l`

    constexpr ExpandTable() : source() {
        for (int mask = 0; mask < 256; ++mask)
            for (int l = 0, n = 0; l < 8; ++l) {
                source[mask][l] = uint8_t(n < 8 ? n : 0);
                n += mask >> l & 1;
            }
    }
};
constexpr ExpandTable EXPAND_TABLE;

// All bits of lane l where bit l of mask is set.
inline Vec lanes_of(unsigned mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bit), bit));
}

// Lane l of the result is the next value of `packed` if bit l of mask is set, else 0. lanes: lanes_of(mask).
inline Vec expand(Vec packed, unsigned mask, Vec lanes) {
    const __m256i source = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)EXPAND_TABLE.source[mask]));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(packed, source), lanes);
}

}  // namespace
