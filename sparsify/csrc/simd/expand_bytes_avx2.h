// Packed bytes back into their places, for AVX2, which has no expand: shuffles of eight bytes from a table of 256.
#pragma once

#include "simd/quads_avx2.h"

namespace {

struct ExpandBytesTable {
    alignas(8) uint8_t source[256][8];  // byte b takes value `number of set bits below b`; with its top bit set it is 0

    constexpr ExpandBytesTable() : source() {
        for (int mask = 0; mask < 256; ++mask)
            for (int b = 0, n = 0; b < 8; ++b) {
                source[mask][b] = mask >> b & 1 ? uint8_t(n) : 0x80;
                n += mask >> b & 1;
            }
    }
};
constexpr ExpandBytesTable EXPAND_BYTES_TABLE;

// Byte b of the result is the next of `packed` if bit b of mask is set, else 0; of the mask 32 bits count. Reads at
// most 32 bytes, and moves no further.
inline IntVec expand(const int8_t *packed, uint64_t mask) {
    const auto eight = [&](int i) {
        const unsigned bits = mask >> (8 * i) & 0xff;
        const __m128i source = _mm_loadl_epi64((const __m128i *)EXPAND_BYTES_TABLE.source[bits]);
        const __m128i spread = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)packed), source);
        packed += _mm_popcnt_u32(bits);
        return spread;
    };
    const __m128i a = eight(0), b = eight(1), c = eight(2), d = eight(3);
    return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

inline int64_t count_bits(uint64_t mask) { return _mm_popcnt_u64(mask); }

}  // namespace
