// Activations on vectors, after one of the simd/*.h headers. Measured against float64 over all magnitudes: at most 4
// units in the last place for SiLU, 2 for hardswish; for GELU (erf) at most 1 unit of a, see
// tests/kernels/cpu/test_activation.py. NaN in, NaN out; infinities as in torch.
//
// Coefficients: weighted least squares, reweighted towards the smallest maximal relative error.
#pragma once

#include "sparsify.h"

namespace {

// e^a for a <= 0. a = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that n times the first is exact; the
// polynomial is good to 4e-9. Past the clamp the result is 0 anyway. max returns its second operand for NaN.
inline Vec exp_of_negative(Vec a) {
    const Vec x = max(set1(-104.0f), a);
    const Vec n = round_even(mul(x, set1(1.44269504f)));
    const Vec r = fnma(n, set1(1.42860677e-6f), fnma(n, set1(0.693145752f), x));
    Vec p = set1(0.0013950482f);
    p = fma(p, r, set1(0.008368888f));
    p = fma(p, r, set1(0.041666206f));
    p = fma(p, r, set1(0.16666518f));
    p = fma(p, r, set1(0.5f));
    p = fma(mul(p, r), r, r);
    return scale_by_power_of_two(add(p, set1(1.0f)), n);
}

// Phi(-x), Phi the normal distribution function, for x up to 5.5 in intervals of 47/64 around multiples of it: a row of
// coefficients has the eight of one power of the distance, highest first. Good to 9e-9.
constexpr float GELU_INTERVAL = 47.0f / 64, GELU_END = 7.5f * GELU_INTERVAL;
alignas(32) constexpr float GELU_TAIL[7][8] = {
    {0.0014359038f, 0.0029859645f, -0.0004815112f, -0.0010613668f, 5.4996162e-05f, 0.000148075f, 3.044237e-05f,
     2.5222073e-06f},
    {-0.010668047f, -0.00020931276f, 0.0058400156f, 0.00080990116f, -0.0011165586f, -0.00041471448f, -5.616103e-05f,
     -3.6172157e-06f},
    {0.00016675831f, -0.02292989f, -0.0070019355f, 0.0059938957f, 0.0036772038f, 0.00075575453f, 7.302461e-05f,
     3.6383792e-06f},
    {0.06647004f, 0.023396311f, -0.026156822f, -0.022632694f, -0.0067855925f, -0.0009798078f, -7.427969e-05f,
     -3.06632e-06f},
    {1.1426764e-06f, 0.11186338f, 0.09963062f, 0.0388096f, 0.007836323f, 0.0008650534f, 5.3463136e-05f, 1.8736769e-06f},
    {-0.3989423f, -0.30465004f, -0.13566718f, -0.035231307f, -0.0053353696f, -0.00047118706f, -2.4268715e-05f,
     -7.291077e-07f},
    {0.5f, 0.23136011f, 0.07095031f, 0.013792969f, 0.0016543511f, 0.00012038874f, 5.25876e-06f, 1.3690985e-07f},
};

// a Phi(a). 22 instructions, of which 7 look up coefficients: e^(-a^2 / 2) and a division took three times as long.
inline Vec gelu_erf(Vec a) {
    const Vec size = abs(a);
    const Vec at = fma(size, set1(1 / GELU_INTERVAL), set1(12582912.0f));  // 1.5 * 2^23: its last bits are a number
    const Vec from_middle = fnma(sub(at, set1(12582912.0f)), set1(GELU_INTERVAL), size);
    Vec tail = look_up(GELU_TAIL[0], at);
#pragma GCC unroll 6
    for (int i = 1; i < 7; ++i) tail = fma(tail, from_middle, look_up(GELU_TAIL[i], at));
    tail = select(less(size, set1(GELU_END)), tail, zero());
    return mul(a, select(less(a, zero()), tail, sub(set1(1.0f), tail)));
}

// a / (1 + e^-b): SiLU for b = a, and GELU's tanh approximation for b = 2 sqrt(2 / pi) (a + 0.044715 a^3).
// With e = e^-|b| the fraction is 1 / (1 + e) above 0 and e / (1 + e) below: its divisor is from 1 to 2.
inline Vec gate(Vec a, Vec b) {
    const Vec e = exp_of_negative(sub(zero(), abs(b))), one = set1(1.0f);
    return mul(mul(a, select(less(b, zero()), e, one)), reciprocal(add(one, e)));
}

inline Vec gelu_tanh(Vec a) {
    const Vec cubic = fma(mul(mul(a, a), a), set1(0.044715f), a);
    return gate(a, mul(cubic, set1(1.5957691216f)));
}

inline Vec relu6(Vec a) { return min(set1(6.0f), max(zero(), a)); }

inline Vec activate(Vec a, int activation) {
    switch (activation) {
        case SPARSIFY_RELU:
            return max(zero(), a);
        case SPARSIFY_GELU_ERF:
            return gelu_erf(a);
        case SPARSIFY_GELU_TANH:
            return gelu_tanh(a);
        case SPARSIFY_SILU:
            return gate(a, a);
        case SPARSIFY_HARDSWISH:
            return mul(mul(a, relu6(add(a, set1(3.0f)))), set1(1.0f / 6));
        case SPARSIFY_RELU6:
            return relu6(a);
        default:
            return a;
    }
}

}  // namespace
