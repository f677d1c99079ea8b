// Vectors of 4 floats with the compiler's vector extension: SSE2, NEON or whatever the target has. Same names as
// simd/avx512.h. The compiler may or may not fuse a multiply and an add here; nothing depends on it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simd/scalar.h"

namespace {

using sparsify::BFloat16;
using sparsify::Float16;

constexpr int WIDTH = 4, N_REGISTERS = 16;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

inline Vec set1(float a) { return Vec{a, a, a, a}; }
inline Vec zero() { return set1(0.0f); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec reciprocal(Vec a) { return set1(1.0f) / a; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
inline Vec select(Mask m, Vec if_set, Vec otherwise) { return (Vec)((m & (Mask)if_set) | (~m & (Mask)otherwise)); }
// table[the last three bits of each lane of `at`]
inline Vec look_up(const float (&table)[8], Vec at) {
    const Bits number = (Bits)at & 7u;
    return Vec{table[number[0]], table[number[1]], table[number[2]], table[number[3]]};
}
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec evens(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
inline Vec abs(Vec a) { return (Vec)((Bits)a & 0x7fffffffu); }
inline Vec copysign(Vec magnitude, Vec sign) {
    return (Vec)(((Bits)sign & 0x80000000u) | ((Bits)magnitude & 0x7fffffffu));
}
inline Vec round_even(Vec a) { return Vec{rintf(a[0]), rintf(a[1]), rintf(a[2]), rintf(a[3])}; }
inline Vec scale_by_power_of_two(Vec a, Vec n) {
    return Vec{ldexpf(a[0], (int)n[0]), ldexpf(a[1], (int)n[1]), ldexpf(a[2], (int)n[2]), ldexpf(a[3], (int)n[3])};
}
inline Mask less(Vec a, Vec b) { return a < b; }
inline Mask is_nan(Vec a) { return a != a; }

inline Vec load(const float *p) {
    Vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
inline Vec load(const BFloat16 *p) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    Halves a;
    memcpy(&a, p, sizeof a);
    return (Vec)(__builtin_convertvector(a, Bits) << 16);
}
inline Vec load(const Float16 *p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline Vec load(const int8_t *p) { return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
template <typename T>
inline Vec load_first(const T *p, int n) {
    T copy[4] = {};
    memcpy(copy, p, size_t(n < 4 ? n : 4) * sizeof *p);
    return load(copy);
}
inline void store(float *p, Vec a) { memcpy(p, &a, sizeof a); }
template <typename Half>
inline void store(Half *p, Vec a) {
    for (int i = 0; i < 4; ++i) p[i] = rounded_to<Half>(a[i]);
}
template <typename T>
inline void store_first(T *p, Vec a, int n) {
    T copy[4];
    store(copy, a);
    memcpy(p, copy, size_t(n < 4 ? n : 4) * sizeof *p);
}
inline Vec broadcast(const float *p) { return set1(*p); }
template <typename Half>
inline Vec broadcast(const Half *p) {
    return set1(to_float(*p));
}

inline void transpose(Vec (&r)[4]) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < i; ++j) {
            const float a = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = a;
        }
}

}  // namespace
