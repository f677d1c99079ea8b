// Weights, inputs and the exact answers of the tests in C++.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "guarded.h"
#include "simd/halves.h"
#include "sparsify.h"

using sparsify::BFloat16;
using sparsify::Float16;

struct Random {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 33);
    }
    double uniform() { return next() / 2147483648.0; }        // [0, 1)
    float around_zero() { return float(2 * uniform() - 1); }  // about as large as a normal one
};

// The number of a dtype, and how far a result may be from what it was before it was rounded to the dtype: a share of
// it, and the half of the smallest step.
template <typename T>
constexpr int DTYPE = std::is_same_v<T, float>      ? SPARSIFY_F32
                      : std::is_same_v<T, BFloat16> ? SPARSIFY_BF16
                                                    : SPARSIFY_F16;
template <typename T>
constexpr double UNIT = std::is_same_v<T, float>      ? 0
                        : std::is_same_v<T, BFloat16> ? 1.0 / 256
                                                      : 1.0 / 2048;
template <typename T>
constexpr double SMALLEST = std::is_same_v<T, Float16> ? 1.0 / (1 << 25) : 1e-38;

inline float to_float(float a) { return a; }
inline float to_float(int8_t a) { return a; }
inline float to_float(BFloat16 a) {
    const uint32_t bits = uint32_t(a) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline float to_float(Float16 a) {
    const int exponent = int(a) >> 10 & 31, significand = int(a) & 1023;
    const double size = exponent == 31  ? (significand ? NAN : INFINITY)
                        : exponent == 0 ? ldexp(significand, -24)
                                        : ldexp(significand + 1024, exponent - 25);
    return float(int(a) & 0x8000 ? -size : size);
}
template <typename T>
T from_float(float a) {
    if constexpr (std::is_same_v<T, float>) return a;
    if constexpr (std::is_same_v<T, int8_t>) return int8_t(lrintf(a * 127));
    if constexpr (std::is_same_v<T, Float16>) {
        const double size = fabs(double(a));
        const int sign = std::signbit(a) ? 0x8000 : 0;
        if (!(size < 65520)) return T(sign | (size == size ? 0x7c00 : 0x7e00));
        const int exponent = size < ldexp(1, -14) ? -14 : ilogb(size);
        return T(sign | (((exponent + 14) << 10) + int(nearbyint(ldexp(size, 10 - exponent)))));
    }
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return T((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Csr {
    int64_t out, in;
    std::vector<int32_t> crow, col;
};

// Row 1 is empty where there are several.
inline Csr random_csr(int64_t out, int64_t in, double sparsity, Random &random) {
    Csr csr{out, in, {0}, {}};
    for (int64_t row = 0; row < out; ++row) {
        for (int64_t k = 0; k < in; ++k)
            if (random.uniform() >= sparsity && !(row == 1 && out > 2 && sparsity > 0)) csr.col.push_back(int32_t(k));
        csr.crow.push_back(int32_t(csr.col.size()));
    }
    return csr;
}

struct Form {
    const char *name;
    int number;
    int64_t (*index_bytes)(int64_t, int64_t, const int32_t *, const int32_t *);
    int64_t (*n_values)(int64_t, int64_t, const int32_t *, const int32_t *);
    int (*pack)(int64_t, int64_t, const int32_t *, const int32_t *, uint8_t *, int64_t *);
    int (*check)(int64_t, int64_t, const uint8_t *, int64_t, int64_t);
    bool quantizes;
};
#define FORM(NAME, NUMBER, QUANTIZES)                                                                     \
    Form {                                                                                                \
        #NAME, NUMBER, sparsify_##NAME##_index_bytes, sparsify_##NAME##_n_values, sparsify_##NAME##_pack, \
            sparsify_##NAME##_check, QUANTIZES                                                            \
    }
const Form FORMS[] = {
    FORM(panel, SPARSIFY_PANEL, false),        FORM(bitmask, SPARSIFY_BITMASK, false),
    FORM(gather, SPARSIFY_GATHER, false),      FORM(quads, SPARSIFY_QUADS, true),
    FORM(quadmask, SPARSIFY_QUADMASK, true),   FORM(quadsteps, SPARSIFY_QUADSTEPS, true),
    FORM(pairmask, SPARSIFY_PAIRMASK, false),  FORM(sell, SPARSIFY_SELL, false),
    FORM(widesteps, SPARSIFY_WIDESTEPS, true),
};
#undef FORM

template <typename W>
struct Packed {
    Guarded index, values;
    std::vector<W> of_csr;  // in the order of CSR
};

// For the kernels in use. Values are the same for the same seed.
template <typename W>
Packed<W> pack(const Form &form, const Csr &csr, uint64_t seed) {
    Random random{seed};
    std::vector<W> of_csr(csr.col.size());
    for (W &value : of_csr) value = from_float<W>(random.around_zero());
    if (sizeof(W) == 1 && !of_csr.empty()) of_csr[0] = W(-128);
    const auto size = form.index_bytes(csr.out, csr.in, csr.crow.data(), csr.col.data());
    const auto n_values = form.n_values(csr.out, csr.in, csr.crow.data(), csr.col.data());
    if (size < 0 || n_values < 0) abort();
    std::vector<int64_t> order(size_t(n_values), -1);
    Packed<W> packed{Guarded(size_t(size)), Guarded(size_t(n_values) * sizeof(W)), of_csr};
    memset(packed.index.data(), 0, size_t(size));
    if (form.pack(csr.out, csr.in, csr.crow.data(), csr.col.data(), packed.index.data(), order.data()) ||
        form.check(csr.out, csr.in, packed.index.data(), size, n_values))
        abort();
    W *const values = packed.values.template data<W>();
    for (size_t i = 0; i < order.size(); ++i) values[i] = order[i] < 0 ? W(0) : of_csr[size_t(order[i])];
    if (form.quantizes)
        for (int64_t row = 0; row < csr.out; ++row) {
            int32_t sum = 0;
            for (int32_t i = csr.crow[size_t(row)]; i < csr.crow[size_t(row) + 1]; ++i)
                sum += int32_t(to_float(of_csr[size_t(i)]));
            memcpy(packed.values.data() + packed.values.size() - 4 * size_t(csr.out - row), &sum, sizeof sum);
        }
    return packed;
}

constexpr double PI = 3.14159265358979323846;  // M_PI is not of every system

inline double activated(double a, int64_t activation) {
    switch (activation) {
        case SPARSIFY_RELU:
            return a > 0 ? a : 0;
        case SPARSIFY_GELU_ERF:
            return a * 0.5 * erfc(-a * sqrt(0.5));
        case SPARSIFY_GELU_TANH:
            return a * 0.5 * (1 + tanh(sqrt(2 / PI) * (a + 0.044715 * a * a * a)));
        case SPARSIFY_SILU:
            return a / (1 + exp(-a));
        case SPARSIFY_HARDSWISH:
            return a * fmin(fmax(a + 3, 0), 6) / 6;
        case SPARSIFY_RELU6:
            return fmin(fmax(a, 0), 6);
        default:
            return a;
    }
}

// How far a result of n products may be from the exact one. Each of n products and sums is rounded once, a scale and a
// bias too, in whatever order: (n + 3) u of the sum of magnitudes, u = 2^-24 (Higham 2002, (3.5)), twice to be above
// the terms of second order. No activation makes an error more than 1.5 times larger, and each is good to 4 units in
// the last place, or to one of its input, which is at most `magnitudes`; the result is rounded to its dtype, T.
template <typename T>
double allowed_error(double exact, double magnitudes, int64_t n) {
    constexpr double U = 1.0 / (1 << 24);
    return 2 * 1.5 * double(n + 4) * U * magnitudes + (8 * U + UNIT<T>)*fabs(exact) + SMALLEST<T>;
}
