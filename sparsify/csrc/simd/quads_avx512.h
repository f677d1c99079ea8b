// Vectors of 16 int32 for AVX-512, and sums of products of quads: four bytes without sign times four with sign. Same
// names as simd/quads_avx2.h and simd/quads_portable.h.
#pragma once

#include "quads/format.h"
#include "simd/avx512.h"

namespace {

using IntVec = __m512i;

constexpr int32_t BYTE_OFFSET = 0;  // a byte of activations is q less this

inline IntVec add(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
inline IntVec sub(IntVec a, IntVec b) { return _mm512_sub_epi32(a, b); }
inline IntVec mul(IntVec a, IntVec b) { return _mm512_mullo_epi32(a, b); }
inline IntVec set1(int32_t a) { return _mm512_set1_epi32(a); }
inline IntVec load(const int32_t *p) { return _mm512_loadu_si512(p); }
inline IntVec load(const uint32_t *p) { return _mm512_loadu_si512(p); }
inline void store(int32_t *p, IntVec a) { _mm512_storeu_si512(p, a); }
inline IntVec load_first(const int32_t *p, int n) { return _mm512_maskz_loadu_epi32(first_n(n), p); }
inline Vec to_float(IntVec a) { return _mm512_cvtepi32_ps(a); }
inline Vec bits_as_float(IntVec a) { return _mm512_castsi512_ps(a); }
inline IntVec bits_as_int(Vec a) { return _mm512_castps_si512(a); }
// The compiler may not fuse this product with a sum that follows.
inline Vec rounded(Vec a) {
    asm("" : "+v"(a));
    return a;
}

inline float lowest(Vec a) { return _mm512_reduce_min_ps(a); }
inline bool all_zero(Vec a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff; }

// 16 numbers, to the nearest and clamped to 0..255 after zero was added, as bytes.
inline void store_quantized(uint8_t *p, Vec a, IntVec zero_point) {
    const IntVec q = _mm512_max_epi32(add(_mm512_cvtps_epi32(a), zero_point), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)p, _mm512_cvtusepi32_epi8(q));
}

// 64 numbers, the same way.
inline void store_quantized(uint8_t *p, Vec a, Vec b, Vec c, Vec d, IntVec zero_point) {
    const IntVec zeros = _mm512_packs_epi32(zero_point, zero_point);
    const IntVec ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const IntVec cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    // In each quarter four numbers of a, of b, of c and of d.
    const IntVec q = _mm512_packus_epi16(_mm512_add_epi16(ab, zeros), _mm512_add_epi16(cd, zeros));
    const IntVec in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(in_order, q));
}

inline IntVec broadcast(const sparsify::QuadWeights *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

// c + the sum of the four products of each lane.
inline IntVec fma(IntVec weights, IntVec activations, IntVec c) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(c, activations, weights);
#else
    // In pairs of 16 bits, which cannot saturate: the even bytes, then the odd ones.
    const IntVec even = _mm512_and_si512(activations, _mm512_set1_epi32(0xff00ff));
    const IntVec odd = _mm512_srli_epi16(activations, 8);
    const IntVec even_weights = _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8);
    const IntVec products = _mm512_madd_epi16(odd, _mm512_srai_epi16(weights, 8));
    return add(c, add(products, _mm512_madd_epi16(even, even_weights)));
#endif
}

// a = low + 128 high: the lower and the upper 16 bits of each lane.
inline IntVec low_and_high(IntVec a) {
    const IntVec high = _mm512_slli_epi32(_mm512_srai_epi32(a, 7), 16);
    return _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(127)), high);
}

// c + the sum of the products of the two halves of each lane.
inline IntVec add_pairs(IntVec a, IntVec b, IntVec c) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(c, a, b);
#else
    return add(c, _mm512_madd_epi16(a, b));
#endif
}

// Which of 64 sums belong to up to WIDTH rows.
using Lanes = IntVec;
inline Lanes load_lanes(const uint8_t *p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_n(n), p)); }
// r[i] = sums[lanes[i]]
inline IntVec pick(const int32_t *sums, Lanes lanes) {
    const IntVec low = _mm512_permutex2var_epi32(load(sums), lanes, load(sums + 16));
    const IntVec high = _mm512_permutex2var_epi32(load(sums + 32), lanes, load(sums + 48));
    return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(lanes, set1(32)), low, high);
}

}  // namespace
