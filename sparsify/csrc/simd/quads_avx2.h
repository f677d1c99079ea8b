// Vectors of 8 int32 for AVX2, and sums of products of quads. Same names as simd/quads_avx512.h.
#pragma once

#include "quads/format.h"
#include "simd/avx2.h"

namespace {

using IntVec = __m256i;

constexpr int32_t BYTE_OFFSET = 0;  // a byte of activations is q less this

inline IntVec add(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
inline IntVec sub(IntVec a, IntVec b) { return _mm256_sub_epi32(a, b); }
inline IntVec mul(IntVec a, IntVec b) { return _mm256_mullo_epi32(a, b); }
inline IntVec set1(int32_t a) { return _mm256_set1_epi32(a); }
inline IntVec load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline IntVec load(const uint32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline void store(int32_t *p, IntVec a) { _mm256_storeu_si256((__m256i *)p, a); }
inline IntVec load_first(const int32_t *p, int n) { return _mm256_maskload_epi32(p, first_n(n)); }
inline Vec to_float(IntVec a) { return _mm256_cvtepi32_ps(a); }
inline Vec bits_as_float(IntVec a) { return _mm256_castsi256_ps(a); }
inline IntVec bits_as_int(Vec a) { return _mm256_castps_si256(a); }
inline Vec rounded(Vec a) {
    asm("" : "+x"(a));
    return a;
}

inline float lowest(Vec a) {
    __m128 least = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    least = _mm_min_ps(least, _mm_movehl_ps(least, least));
    return _mm_cvtss_f32(_mm_min_ss(least, _mm_shuffle_ps(least, least, 1)));
}
inline bool all_zero(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ)) == 0xff; }

inline void store_quantized(uint8_t *p, Vec a, IntVec zero_point) {
    const IntVec q = add(_mm256_cvtps_epi32(a), zero_point);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}

inline void store_quantized(uint8_t *p, Vec a, Vec b, Vec c, Vec d, IntVec zero_point) {
    store_quantized(p, a, zero_point);
    store_quantized(p + WIDTH, b, zero_point);
    store_quantized(p + 2 * WIDTH, c, zero_point);
    store_quantized(p + 3 * WIDTH, d, zero_point);
}

inline IntVec broadcast(const sparsify::QuadWeights *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

inline IntVec fma(IntVec weights, IntVec activations, IntVec c) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(c, activations, weights);
#else
    // In pairs of 16 bits, which cannot saturate: the even bytes, then the odd ones.
    const IntVec even = _mm256_and_si256(activations, _mm256_set1_epi32(0xff00ff));
    const IntVec odd = _mm256_srli_epi16(activations, 8);
    const IntVec even_weights = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
    const IntVec products = _mm256_madd_epi16(odd, _mm256_srai_epi16(weights, 8));
    return add(c, add(products, _mm256_madd_epi16(even, even_weights)));
#endif
}

inline IntVec low_and_high(IntVec a) {
    const IntVec high = _mm256_slli_epi32(_mm256_srai_epi32(a, 7), 16);
    return _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi32(127)), high);
}

inline IntVec add_pairs(IntVec a, IntVec b, IntVec c) { return add(c, _mm256_madd_epi16(a, b)); }

using Lanes = IntVec;
inline Lanes load_lanes(const uint8_t *p, int n) {
    uint8_t copy[8] = {};
    memcpy(copy, p, size_t(n < 8 ? n : 8));
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)copy));
}
inline IntVec pick(const int32_t *sums, Lanes lanes) { return _mm256_i32gather_epi32(sums, lanes, 4); }

}  // namespace
