// Packed bytes back into their places, for NEON, which has no expand: shuffles of eight bytes from a table of 256.
#pragma once

#include "simd/expand_neon.h"
#include "simd/quads_neon.h"

namespace {

struct ExpandBytesTable {
    alignas(64) uint8_t source[256][8];  // byte b takes value `number of set bits below b`; 0xff makes it 0

    constexpr ExpandBytesTable() : source() {
        for (int mask = 0; mask < 256; ++mask)
            for (int b = 0, n = 0; b < 8; ++b) {
                source[mask][b] = mask >> b & 1 ? uint8_t(n) : 0xff;
                n += mask >> b & 1;
            }
    }
};
constexpr ExpandBytesTable EXPAND_BYTES_TABLE;

// Byte b of the result is the next of `packed` if bit b of mask is set, else 0; of the mask 16 bits count. Reads at
// most 24 bytes.
inline IntVec expand(const int8_t *packed, uint64_t mask) {
    const auto eight = [](const int8_t *from, unsigned bits) {
        const uint8x16_t values = vcombine_u8(vld1_u8(reinterpret_cast<const uint8_t *>(from)), vdup_n_u8(0));
        return vqtbl1_u8(values, vld1_u8(EXPAND_BYTES_TABLE.source[bits]));
    };
    const unsigned low = mask & 0xff, high = mask >> 8 & 0xff;
    const uint8x8_t first = eight(packed, low), second = eight(packed + count_eight(low), high);
    return vreinterpretq_s32_u8(vcombine_u8(first, second));
}

// 16 bits are two looks at a table; more go through a vector register.
inline int64_t count_bits(uint64_t mask) {
    if (mask < 65536) return int64_t(count_eight(mask & 0xff) + count_eight(unsigned(mask >> 8)));
    return __builtin_popcountll(mask);
}

}  // namespace
