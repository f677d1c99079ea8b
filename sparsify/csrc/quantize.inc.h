// Rows of activations as bytes, for the forms that quantise them; sparsify.h has the definition. Include after a
// simd/quads_*.h.
#pragma once

#include <math.h>

#include "sparsify.h"

namespace {

inline float lowest(Vec a) {
    float lanes[WIDTH];
    store(lanes, a);
    float least = lanes[0];
    for (int i = 1; i < WIDTH; ++i) least = lanes[i] < least ? lanes[i] : least;
    return least;
}

// A row of n inputs as bytes, up to the next multiple of WIDTH. *step is NaN if the row has Inf or NaN.
template <typename T>
inline void quantize_row(const T *x, int64_t n, uint8_t *to, float *step, int32_t *zero_point) {
    Vec lo = zero(), minus_hi = zero(), bad = zero();  // Inf x 0 and NaN x 0 are NaN, and stay
    const auto look_at = [&](Vec a) {
        lo = min(a, lo);
        minus_hi = min(sub(zero(), a), minus_hi);
        bad = fma(a, zero(), bad);
    };
    int64_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) look_at(load(x + k));
    if (k < n) look_at(load_first(x + k, int(n - k)));
    float lanes[WIDTH];
    store(lanes, bad);
    bool finite = true;
    for (const float lane : lanes) finite &= lane == 0;
    const float low = lowest(lo), range = -lowest(minus_hi) - low;
    finite &= range <= 3.4028234663852886e38f;
    float inverse = 255.0f / range;
    *step = finite ? range / 255.0f : __builtin_nanf("");
    *zero_point = 0;
    if (!finite || !(inverse <= 3.4028234663852886e38f)) {  // all zeros, or so near that 255 / range is infinite
        inverse = 0;
        if (finite) *step = 0;
    } else {
        const float at = rintf(-low * inverse);
        *zero_point = at < 255.0f ? int32_t(at) : 255;
    }
    const Vec factor = set1(inverse);
    const IntVec zeros = set1(*zero_point);
    if (inverse == 0) {  // also for NaN, which has no nearest integer
        memset(to, 0, size_t((n + WIDTH - 1) / WIDTH * WIDTH));
        return;
    }
    for (k = 0; k + WIDTH <= n; k += WIDTH) store_quantized(to + k, mul(load(x + k), factor), zeros);
    if (k < n) store_quantized(to + k, mul(load_first(x + k, int(n - k)), factor), zeros);
}

}  // namespace
