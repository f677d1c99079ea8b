// Vectors of 4 floats for NEON, of any aarch64 processor. Same names as simd/avx512.h.
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "simd/halves.h"

#define SIMD_NEON 1  // kernels that have loops of their own for it; the portable ones are compiled for aarch64 as well

namespace {

using sparsify::BFloat16;
using sparsify::Float16;

constexpr int WIDTH = 4, N_REGISTERS = 32;
using Vec = float32x4_t;
using Mask = uint32x4_t;

inline Vec zero() { return vdupq_n_f32(0); }
inline Vec set1(float a) { return vdupq_n_f32(a); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec reciprocal(Vec a) { return vdivq_f32(set1(1.0f), a); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
inline Mask less(Vec a, Vec b) { return vcltq_f32(a, b); }
inline Mask is_nan(Vec a) { return vmvnq_u32(vceqq_f32(a, a)); }
inline Vec select(Mask m, Vec if_set, Vec otherwise) { return vbslq_f32(m, if_set, otherwise); }
// table[the last three bits of each lane of `at`]
inline Vec look_up(const float (&table)[8], Vec at) {
    const uint32x4_t number = vandq_u32(vreinterpretq_u32_f32(at), vdupq_n_u32(7));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), number, 0x04040404);
    const uint8x16x2_t entries = {{vreinterpretq_u8_f32(vld1q_f32(table)), vreinterpretq_u8_f32(vld1q_f32(table + 4))}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(entries, vreinterpretq_u8_u32(bytes)));
}
// The second operand if either is NaN or both are zeros, which fmin and fmax are not.
inline Vec min(Vec a, Vec b) { return select(less(a, b), a, b); }
inline Vec max(Vec a, Vec b) { return select(less(b, a), a, b); }
inline Vec round_even(Vec a) { return vrndnq_f32(a); }
inline Vec evens(Vec a, Vec b) { return vuzp1q_f32(a, b); }  // a[0], a[2], b[0], b[2]
inline Vec abs(Vec a) { return vabsq_f32(a); }
inline Vec copysign(Vec magnitude, Vec sign) { return select(vdupq_n_u32(0x80000000u), sign, magnitude); }
inline Vec power_of_two(int32x4_t n) {  // -126 <= n <= 127
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline Vec scale_by_power_of_two(Vec a, Vec n) {  // in two halves: n may reach below the smallest normal exponent
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return mul(mul(a, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}

inline Vec widen(uint16x4_t a) { return vreinterpretq_f32_u32(vshll_n_u16(a, 16)); }
inline uint16x4_t narrow(Vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vaddhn_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
    const uint16x4_t quiet = vshrn_n_u32(vorrq_u32(bits, vdupq_n_u32(0x400000)), 16);
    return vbsl_u16(vmovn_u32(is_nan(a)), quiet, rounded);
}

inline Vec load(const float *p) { return vld1q_f32(p); }
// By memcpy: a load by intrinsic would take what p points to for a uint16_t.
template <typename T>
inline uint16x4_t four_halves(const T *p) {
    uint16x4_t four;
    memcpy(&four, p, sizeof four);
    return four;
}
inline Vec load(const BFloat16 *p) { return widen(four_halves(p)); }
inline Vec load(const Float16 *p) { return vcvt_f32_f16(vreinterpret_f16_u16(four_halves(p))); }
inline Vec load(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
template <typename T>
inline Vec load_first(const T *p, int n) {
    T copy[4] = {};
    memcpy(copy, p, size_t(n < 4 ? n : 4) * sizeof *p);
    return load(copy);
}
inline void store(float *p, Vec a) { vst1q_f32(p, a); }
inline void store(BFloat16 *p, Vec a) {
    const uint16x4_t four = narrow(a);
    memcpy(p, &four, sizeof four);
}
inline void store(Float16 *p, Vec a) {
    const float16x4_t four = vcvt_f16_f32(a);
    memcpy(p, &four, sizeof four);
}
template <typename T>
inline void store_first(T *p, Vec a, int n) {
    T copy[4];
    store(copy, a);
    memcpy(p, copy, size_t(n < 4 ? n : 4) * sizeof *p);
}
inline Vec broadcast(const float *p) { return vld1q_dup_f32(p); }
inline Vec broadcast(const BFloat16 *p) { return widen(vdup_n_u16(uint16_t(*p))); }
inline Vec broadcast(const Float16 *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(uint16_t(*p)))); }

// r[i][j] -> r[j][i]
inline void transpose(Vec (&r)[4]) {
    const auto pairs = [](Vec a) { return vreinterpretq_f64_f32(a); };
    const auto floats = [](float64x2_t a) { return vreinterpretq_f32_f64(a); };
    const float64x2_t a = pairs(vtrn1q_f32(r[0], r[1])), b = pairs(vtrn2q_f32(r[0], r[1]));
    const float64x2_t c = pairs(vtrn1q_f32(r[2], r[3])), d = pairs(vtrn2q_f32(r[2], r[3]));
    r[0] = floats(vtrn1q_f64(a, c));
    r[1] = floats(vtrn1q_f64(b, d));
    r[2] = floats(vtrn2q_f64(a, c));
    r[3] = floats(vtrn2q_f64(b, d));
}

}  // namespace
