// Vectors of 4 int32 with the compiler's vector extension, and sums of products of quads. Same names as
// simd/quads_avx512.h.
#pragma once

#include "quads/format.h"
#include "simd/portable.h"

namespace {

using IntVec = Mask;

constexpr int32_t BYTE_OFFSET = 0;  // a byte of activations is q less this

inline IntVec add(IntVec a, IntVec b) { return a + b; }
inline IntVec sub(IntVec a, IntVec b) { return a - b; }
inline IntVec mul(IntVec a, IntVec b) { return a * b; }
inline IntVec set1(int32_t a) { return IntVec{a, a, a, a}; }
inline IntVec load(const int32_t *p) {
    IntVec a;
    memcpy(&a, p, sizeof a);
    return a;
}
inline IntVec load(const uint32_t *p) {
    IntVec a;
    memcpy(&a, p, sizeof a);
    return a;
}
inline void store(int32_t *p, IntVec a) { memcpy(p, &a, sizeof a); }
inline IntVec load_first(const int32_t *p, int n) {
    int32_t copy[4] = {};
    memcpy(copy, p, size_t(n < 4 ? n : 4) * sizeof *p);
    return load(copy);
}
inline Vec to_float(IntVec a) { return Vec{float(a[0]), float(a[1]), float(a[2]), float(a[3])}; }
inline Vec bits_as_float(IntVec a) { return (Vec)a; }
inline IntVec bits_as_int(Vec a) { return (IntVec)a; }
inline Vec rounded(Vec a) {
    asm("" : "+m"(a));
    return a;
}

inline float lowest(Vec a) {
    float least = a[0];
    for (int i = 1; i < 4; ++i) least = a[i] < least ? a[i] : least;
    return least;
}
inline bool all_zero(Vec a) { return a[0] == 0 && a[1] == 0 && a[2] == 0 && a[3] == 0; }

inline void store_quantized(uint8_t *p, Vec a, IntVec zero_point) {
    for (int i = 0; i < 4; ++i) {
        const float nearest = rintf(a[i]);  // beyond the range of int for what is not finite
        const int32_t q = (nearest > -1e6f && nearest < 1e6f ? int32_t(nearest) : -1000) + zero_point[i];
        p[i] = uint8_t(q < 0 ? 0 : q > 255 ? 255 : q);
    }
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
    return set1(four);
}

inline IntVec fma(IntVec weights, IntVec activations, IntVec c) {
    const Bits w = (Bits)weights, x = (Bits)activations;
    c += ((IntVec)(w << 24) >> 24) * (IntVec)(x & 255u);
    c += ((IntVec)(w << 16) >> 24) * (IntVec)(x >> 8 & 255u);
    c += ((IntVec)(w << 8) >> 24) * (IntVec)(x >> 16 & 255u);
    c += ((IntVec)w >> 24) * (IntVec)(x >> 24);
    return c;
}

inline IntVec low_and_high(IntVec a) { return (IntVec)((Bits)(a >> 7) << 16) | (a & 127); }

inline IntVec add_pairs(IntVec a, IntVec b, IntVec c) {
    const IntVec low = ((IntVec)((Bits)a << 16) >> 16) * ((IntVec)((Bits)b << 16) >> 16);
    return c + low + (a >> 16) * (b >> 16);
}

using Lanes = IntVec;
inline Lanes load_lanes(const uint8_t *p, int n) {
    Lanes lanes = {};
    for (int i = 0; i < n && i < 4; ++i) lanes[i] = p[i];
    return lanes;
}
inline IntVec pick(const int32_t *sums, Lanes lanes) {
    return IntVec{sums[lanes[0]], sums[lanes[1]], sums[lanes[2]], sums[lanes[3]]};
}

}  // namespace
