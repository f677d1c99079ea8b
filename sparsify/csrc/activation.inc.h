// Activations on vectors, after one of the simd/*.h headers. Measured against float64 over all magnitudes: at most 4
// units in the last place for SiLU and GELU (erf), see tests/kernels/cpu/test_activation.py. NaN in, NaN out;
// infinities as in torch.
//
// Coefficients: weighted least squares, reweighted towards the smallest maximal relative error.
#pragma once

#include "sparsify.h"

namespace {

// e^a. a = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that n times the first is exact; the polynomial is
// good to 4e-9. Past the clamp the result is 0 or infinity anyway. min and max return their second operand for NaN.
inline Vec exp(Vec a) {
    const Vec x = min(set1(89.0f), max(set1(-104.0f), a));
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

// a Phi(a), Phi the normal distribution function. For the lower tail Phi(-|a|) = e^(-a^2 / 2) R(|a|), where R is a
// polynomial in 1 / (1 + 0.3 |a|), good to 4e-9 up to 15: nothing cancels. The rounding error of a^2 would cost
// e^(-a^2 / 2) up to 50 units in the last place; therefore a^2 = near^2 + (|a| - near)(|a| + near), near with 12 bits
// and an exact square, the rest so small that three terms of its exponential series do.
inline Vec gelu_erf(Vec a) {
    const Vec size = min(set1(15.0f), abs(a));  // Phi(-15) is 0 in float32
    const Vec near = mul(round_even(mul(size, set1(256.0f))), set1(1.0f / 256));
    const Vec rest = mul(mul(sub(size, near), add(size, near)), set1(-0.5f));
    const Vec series = fma(fma(set1(1.0f / 6), rest, set1(0.5f)), mul(rest, rest), rest);
    const Vec main = exp(mul(mul(near, near), set1(-0.5f)));
    const Vec t = div(set1(1.0f), fma(set1(0.3f), size, set1(1.0f)));
    Vec p = set1(-0.02017316408455372f);
    p = fma(p, t, set1(0.10979649424552917f));
    p = fma(p, t, set1(-0.22143591940402985f));
    p = fma(p, t, set1(0.1817609816789627f));
    p = fma(p, t, set1(-0.06999044120311737f));
    p = fma(p, t, set1(0.09026723355054855f));
    p = fma(p, t, set1(0.08085491508245468f));
    p = fma(p, t, set1(0.10955371707677841f));
    p = fma(p, t, set1(0.11969077587127686f));
    p = fma(p, t, set1(0.11967487633228302f));
    p = fma(p, t, set1(5.06625724483456e-07f));
    const Vec tail = mul(p, fma(main, series, main));
    return mul(a, select(less(a, zero()), tail, sub(set1(1.0f), tail)));
}

// a / (1 + e^-b): SiLU for b = a, and GELU's tanh approximation for b = 2 sqrt(2 / pi) (a + 0.044715 a^3).
inline Vec gate(Vec a, Vec b) { return div(a, add(set1(1.0f), exp(sub(zero(), b)))); }

inline Vec gelu_tanh(Vec a) {
    const Vec cubic = fma(mul(mul(a, a), a), set1(0.044715f), a);
    return gate(a, mul(cubic, set1(1.5957691216f)));
}

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
        default:
            return a;
    }
}

}  // namespace
