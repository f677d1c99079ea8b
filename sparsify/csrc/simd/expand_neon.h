// Packed values back into their lanes, for NEON, which has no expand: a table of 256 byte shuffles for each dtype puts
// eight values into two vectors.
#pragma once

#include "simd/neon.h"

namespace {

// Row `mask`: which bytes of the packed values, of BYTES each, make 8 lanes. The value comes into the upper bytes of
// its lane, as bfloat16 lies in a float32. A byte of 0xff becomes zero: all of a lane that takes no value, whose top
// byte says so (lanes_of).
template <int BYTES>
struct ExpandTable {
    alignas(64) uint8_t rows[256][32];

    constexpr ExpandTable() : rows() {
        for (int mask = 0; mask < 256; ++mask)
            for (int l = 0, n = 0; l < 8; ++l) {
                const bool takes = mask >> l & 1;
                for (int b = 0; b < 4; ++b) {
                    const int source = BYTES * n + b - (4 - BYTES);
                    rows[mask][4 * l + b] = uint8_t(takes && b >= 4 - BYTES ? source : 0xff);
                }
                n += takes;
            }
    }
};
template <int BYTES>
constexpr ExpandTable<BYTES> EXPAND_TABLE;

struct CountTable {
    uint8_t counts[256];

    constexpr CountTable() : counts() {
        for (int mask = 0; mask < 256; ++mask)
            for (int l = 0; l < 8; ++l) counts[mask] = uint8_t(counts[mask] + (mask >> l & 1));
    }
};
constexpr CountTable COUNT_TABLE;

// Bits of eight: without a vector instruction, and there is no other.
inline size_t count_eight(unsigned mask) { return COUNT_TABLE.counts[mask]; }

// Eight lanes: their weights, and their shuffles.
struct Expanded {
    Vec w[2];
    uint8x16_t shuffles[2];
};

// Zero in every lane of a that `shuffle` gives no value.
inline Vec keep(Vec a, uint8x16_t shuffle) {
    const uint32x4_t takes = vcgezq_s32(vreinterpretq_s32_u8(shuffle));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), takes));
}

inline uint8x16_t shuffle_of(const uint8_t (&row)[32], int half) { return vld1q_u8(row + 16 * half); }

inline Expanded expand_floats(uint8x16x2_t values, unsigned mask) {
    Expanded all;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        all.shuffles[half] = shuffle_of(EXPAND_TABLE<4>.rows[mask], half);
        all.w[half] = vreinterpretq_f32_u8(vqtbl2q_u8(values, all.shuffles[half]));
    }
    return all;
}

// Lane l is the next packed value if bit l of mask is set, else 0. Reads eight values.
inline Expanded expand_eight(const float *packed, unsigned mask) {
    return expand_floats({{vreinterpretq_u8_f32(load(packed)), vreinterpretq_u8_f32(load(packed + 4))}}, mask);
}
inline Expanded expand_eight(const BFloat16 *packed, unsigned mask) {
    const uint8x16_t values = vld1q_u8(reinterpret_cast<const uint8_t *>(packed));
    Expanded all;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        all.shuffles[half] = shuffle_of(EXPAND_TABLE<2>.rows[mask], half);
        all.w[half] = vreinterpretq_f32_u8(vqtbl1q_u8(values, all.shuffles[half]));
    }
    return all;
}
inline Expanded expand_eight(const Float16 *packed, unsigned mask) {  // widened first: a shift less for four lanes
    float16x8_t eight;
    memcpy(&eight, packed, sizeof eight);
    const Vec low = vcvt_f32_f16(vget_low_f16(eight)), high = vcvt_high_f32_f16(eight);
    return expand_floats({{vreinterpretq_u8_f32(low), vreinterpretq_u8_f32(high)}}, mask);
}
// A byte at the top of a lane is 2^24 times its value: the conversion to float32 divides again, exactly.
inline Expanded expand_eight(const int8_t *packed, unsigned mask) {
    const uint8x16_t values = vcombine_u8(vld1_u8(reinterpret_cast<const uint8_t *>(packed)), vdup_n_u8(0));
    Expanded all;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        all.shuffles[half] = shuffle_of(EXPAND_TABLE<1>.rows[mask], half);
        all.w[half] = vcvtq_n_f32_s32(vreinterpretq_s32_u8(vqtbl1q_u8(values, all.shuffles[half])), 24);
    }
    return all;
}

}  // namespace
