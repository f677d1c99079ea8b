// Vectors of 16 floats for AVX-512. Same names as simd/avx2.h and simd/portable.h: kernels are written once in *.inc.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "simd/halves.h"

namespace {

using sparsify::BFloat16;
using sparsify::Float16;

constexpr int WIDTH = 16, N_REGISTERS = 32;
using Vec = __m512;
using Mask = __mmask16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float a) { return _mm512_set1_ps(a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// 1 / a for a from 1 to 2, within an ulp: a division takes the divider 16 cycles. The approximation has 14 bits, a step
// of Newton's method twice as many.
inline Vec reciprocal(Vec a) {
    const Vec r = _mm512_rcp14_ps(a);
    return fma(r, fnma(a, r, set1(1.0f)), r);
}
// As the instruction: the second operand if either is NaN.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec copysign(Vec magnitude, Vec sign) {
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xca));
}
// a[0], a[2], ..., b[0], b[2], ...
inline Vec evens(Vec a, Vec b) {
    const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, from, b);
}
inline Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }  // a 2^n, n integral
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline Vec select(Mask m, Vec if_set, Vec otherwise) { return _mm512_mask_blend_ps(m, otherwise, if_set); }
// table[the last three bits of each lane of `at`]
inline Vec look_up(const float (&table)[8], Vec at) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(at), _mm512_broadcast_f32x8(_mm256_load_ps(table)));
}

// Floats of 16 bits are widened on load and rounded to nearest even on store, NaN stays (quiet) NaN.
inline Vec widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
inline __m256i narrow(Vec a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan(a), quiet), 16));
}

inline Mask first_n(int n) { return _cvtu32_mask16(n >= 16 ? 0xffffu : (1u << n) - 1); }

inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
inline Vec load(const Float16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline Vec load(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
inline Vec load_first(const float *p, int n) { return _mm512_maskz_loadu_ps(first_n(n), p); }
inline Vec load_first(const BFloat16 *p, int n) { return widen(_mm256_maskz_loadu_epi16(first_n(n), p)); }
inline Vec load_first(const Float16 *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n), p)); }
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store(BFloat16 *p, Vec a) { _mm256_storeu_si256((__m256i *)p, narrow(a)); }
inline void store(Float16 *p, Vec a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_first(float *p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_n(n), a); }
inline void store_first(BFloat16 *p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow(a)); }
inline void store_first(Float16 *p, Vec a, int n) {
    _mm256_mask_storeu_epi16(p, first_n(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec broadcast(const float *p) { return _mm512_set1_ps(*p); }
inline Vec broadcast(const BFloat16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16((short)*p), 16));
}
inline Vec broadcast(const Float16 *p) { return _mm512_cvtph_ps(_mm256_set1_epi16((short)*p)); }

// In each quarter of four vectors: to[i][j] = s[j][i].
inline void transpose_quarters(const Vec (&s)[4], Vec *to) {
    const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(s[0], s[1]));
    const __m512d ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(s[0], s[1]));
    const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(s[2], s[3]));
    const __m512d cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(s[2], s[3]));
    to[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0));
    to[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0));
    to[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1));
    to[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1));
}

// r[i][j] -> r[j][i]
inline void transpose(Vec (&r)[16]) {
    Vec s[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int j = i % 4, base = i / 4 * 8;  // pairs of rows 4 apart first, so that the last stage is in order
        s[2 * i] = _mm512_shuffle_f32x4(r[base + j], r[base + j + 4], 0x88);      // lanes 0 2 of both
        s[2 * i + 1] = _mm512_shuffle_f32x4(r[base + j], r[base + j + 4], 0xdd);  // lanes 1 3 of both
    }
    // s[2(4h + j) + odd]: rows 8h + j and 8h + j + 4
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int j = i % 4, odd = i / 4;  // columns 4 odd.., 8 + 4 odd..
        const Vec low = s[2 * j + odd], high = s[2 * (4 + j) + odd];
        t[2 * i] = _mm512_shuffle_f32x4(low, high, 0x88);      // column block `odd` of rows j, j + 4, j + 8, j + 12
        t[2 * i + 1] = _mm512_shuffle_f32x4(low, high, 0xdd);  // column block `odd + 2`
    }
#pragma GCC unroll 4
    for (int block = 0; block < 4; ++block) {
        const int odd = block % 2, upper = block / 2;
        const Vec rows[4] = {t[2 * (4 * odd + 0) + upper], t[2 * (4 * odd + 1) + upper], t[2 * (4 * odd + 2) + upper],
                             t[2 * (4 * odd + 3) + upper]};
        transpose_quarters(rows, r + 4 * block);
    }
}

}  // namespace
