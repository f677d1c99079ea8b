// Vectors of 4 int32 for NEON, and sums of products of quads. Same names as simd/quads_avx512.h.
//
// The dot product of most processors takes bytes with sign, four activations as four weights: activations are kept as
// q - 128, and the zero point is 128 less too. sum (q - 128) w - (zero - 128) sum w is the same number.
#pragma once

#include "quads/format.h"
#include "simd/neon.h"

namespace {

using IntVec = int32x4_t;

constexpr int32_t BYTE_OFFSET = 128;  // a byte of activations is q less this

inline IntVec add(IntVec a, IntVec b) { return vaddq_s32(a, b); }
inline IntVec sub(IntVec a, IntVec b) { return vsubq_s32(a, b); }
inline IntVec mul(IntVec a, IntVec b) { return vmulq_s32(a, b); }
inline IntVec set1(int32_t a) { return vdupq_n_s32(a); }
inline IntVec load(const int32_t *p) { return vld1q_s32(p); }
inline IntVec load(const uint32_t *p) { return vreinterpretq_s32_u32(vld1q_u32(p)); }
inline void store(int32_t *p, IntVec a) { vst1q_s32(p, a); }
inline IntVec load_first(const int32_t *p, int n) {
    int32_t copy[4] = {};
    memcpy(copy, p, size_t(n < 4 ? n : 4) * sizeof *p);
    return load(copy);
}
inline Vec to_float(IntVec a) { return vcvtq_f32_s32(a); }
inline Vec bits_as_float(IntVec a) { return vreinterpretq_f32_s32(a); }
inline IntVec bits_as_int(Vec a) { return vreinterpretq_s32_f32(a); }
// The compiler may not fuse this product with a sum that follows.
inline Vec rounded(Vec a) {
    asm("" : "+w"(a));
    return a;
}

inline float lowest(Vec a) { return vminvq_f32(a); }
inline bool all_zero(Vec a) { return vminvq_u32(vceqzq_f32(a)) != 0; }

// To the nearest and clamped to 0..255 after zero was added: 16 bits, still without the offset.
inline uint8x8_t quantized(Vec a, Vec b, IntVec zero_point) {
    const int16x4_t low = vqmovn_s32(vqaddq_s32(vcvtnq_s32_f32(a), zero_point));
    const int16x4_t high = vqmovn_s32(vqaddq_s32(vcvtnq_s32_f32(b), zero_point));
    return vqmovun_s16(vcombine_s16(low, high));
}

inline void store_quantized(uint8_t *p, Vec a, IntVec zero_point) {
    const uint32x2_t four = vreinterpret_u32_u8(veor_u8(quantized(a, a, zero_point), vdup_n_u8(BYTE_OFFSET)));
    const uint32_t bytes = vget_lane_u32(four, 0);
    memcpy(p, &bytes, sizeof bytes);
}

inline void store_quantized(uint8_t *p, Vec a, Vec b, Vec c, Vec d, IntVec zero_point) {
    const uint8x16_t all = vcombine_u8(quantized(a, b, zero_point), quantized(c, d, zero_point));
    vst1q_u8(p, veorq_u8(all, vdupq_n_u8(BYTE_OFFSET)));
}

inline IntVec broadcast(const sparsify::QuadWeights *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vdupq_n_s32(four);
}

// c + the sum of the four products of each lane.
inline IntVec fma(IntVec weights, IntVec activations, IntVec c) {
    const int8x16_t w = vreinterpretq_s8_s32(weights), x = vreinterpretq_s8_s32(activations);
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(c, x, w);
#else
    // Two products of -128 and -128 are more than 16 bits hold.
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(x, w));
    return vaddq_s32(c, vpaddq_s32(low, high));
#endif
}

// A product of 32 bits is one instruction here: sums of rows stay whole, and of the zero point the lower half counts.
inline IntVec low_and_high(IntVec a) { return a; }
inline IntVec add_pairs(IntVec a, IntVec b, IntVec c) { return vmlaq_s32(c, a, vshrq_n_s32(vshlq_n_s32(b, 16), 16)); }

using Lanes = IntVec;
inline Lanes load_lanes(const uint8_t *p, int n) {
    int32_t lanes[4] = {};
    for (int i = 0; i < n && i < 4; ++i) lanes[i] = p[i];
    return load(lanes);
}
inline IntVec pick(const int32_t *sums, Lanes lanes) {
    const int32_t four[4] = {sums[vgetq_lane_s32(lanes, 0)], sums[vgetq_lane_s32(lanes, 1)],
                             sums[vgetq_lane_s32(lanes, 2)], sums[vgetq_lane_s32(lanes, 3)]};
    return load(four);
}

}  // namespace
