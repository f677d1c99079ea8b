// Vectors of 8 floats for AVX2 with FMA and F16C. Same names as simd/avx512.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "simd/halves.h"

namespace {

using sparsify::BFloat16;
using sparsify::Float16;

constexpr int WIDTH = 8, N_REGISTERS = 16;
using Vec = __m256;
using Mask = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float a) { return _mm256_set1_ps(a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec reciprocal(Vec a) { return _mm256_div_ps(set1(1.0f), a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a[0], a[2], ..., b[0], b[2], ...
inline Vec evens(Vec a, Vec b) {
    const __m256d halves = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(halves, 0xd8));
}
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec copysign(Vec magnitude, Vec sign) {
    const Vec bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_and_ps(bit, sign), _mm256_andnot_ps(bit, magnitude));
}
inline Vec power_of_two(__m256i n) {  // -126 <= n <= 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vec scale_by_power_of_two(Vec a, Vec n) {  // in two halves: n may reach below the smallest normal exponent
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask is_nan(Vec a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
inline Vec select(Mask m, Vec if_set, Vec otherwise) { return _mm256_blendv_ps(otherwise, if_set, m); }
// table[the last three bits of each lane of `at`]
inline Vec look_up(const float (&table)[8], Vec at) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), _mm256_castps_si256(at));
}

inline Vec widen(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
// A sum that is NaN has its payload from a bfloat16 operand, or none: the low half is 0, and rounding leaves it NaN.
inline __m128i narrow(Vec a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i high_halves = _mm256_setr_epi64x(0x0f0e0b0a07060302, -1, 0x0f0e0b0a07060302, -1);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(rounded, high_halves), 0x08);
    return _mm256_castsi256_si128(packed);
}

inline __m256i first_n(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16 *p) { return widen(_mm_loadu_si128((const __m128i *)p)); }
inline Vec load(const Float16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline Vec load(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
// to[i] = from[i] for 16 values: 3 shuffles, where two loads that widen take 4 instructions.
inline void widen_two(const BFloat16 *from, float *to) {
    const __m256i a = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)from), 0xd8);
    _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), a)));
    _mm256_storeu_ps(to + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), a)));
}
inline Vec load_first(const float *p, int n) { return _mm256_maskload_ps(p, first_n(n)); }
template <typename T>
inline Vec load_first(const T *p, int n) {
    T copy[8] = {};
    memcpy(copy, p, size_t(n < 8 ? n : 8) * sizeof *p);
    return load(copy);
}
inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store(BFloat16 *p, Vec a) { _mm_storeu_si128((__m128i *)p, narrow(a)); }
inline void store(Float16 *p, Vec a) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_first(float *p, Vec a, int n) { _mm256_maskstore_ps(p, first_n(n), a); }
template <typename T>
inline void store_first(T *p, Vec a, int n) {
    T copy[8];
    store(copy, a);
    memcpy(p, copy, size_t(n < 8 ? n : 8) * sizeof *p);
}
inline Vec broadcast(const float *p) { return _mm256_broadcast_ss(p); }
inline Vec broadcast(const BFloat16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16((short)*p), 16));
}
inline Vec broadcast(const Float16 *p) { return _mm256_cvtph_ps(_mm_set1_epi16((short)*p)); }

// r[i][j] -> r[j][i] where r[i + 4] holds the upper halves of rows i and i + 4, r[i] the lower ones.
inline void transpose_halves(Vec (&r)[8]) {
    Vec s[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        r[4 * i + 0] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xee);
    }
}

// r[i][j] -> r[j][i]
inline void transpose(Vec (&r)[8]) {
    Vec s[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        s[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        s[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = s[i];
    transpose_halves(r);
}

// r[j][i] = p[i * stride + j]. The halves of vectors change places while they are loaded: 16 shuffles and not 24.
inline void load_transposed(const float *p, int64_t stride, Vec (&r)[8]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const float *low = p + i * stride, *high = p + (i + 4) * stride;
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
    }
    transpose_halves(r);
}

}  // namespace
