// Rows of activations as bytes, for the forms that quantise them; sparsify.h has the definition. Include after a
// simd/quads_*.h.
#pragma once

#include <math.h>
#include <string.h>

#include "sparsify.h"

namespace {

// A quantised row: x is about step * (q - zero_point), and q = rint(x * factor) + zero_point, at most 255. A row that
// is all zeros, or nearly, has the factor and step 0. One with Inf or NaN has the factor 0 and the step NaN.
struct RowQuantization {
    float factor, step;
    int32_t zero_point;
};

template <typename T>
inline RowQuantization row_quantization(const T *x, int64_t n) {
    constexpr float LARGEST = 3.4028234663852886e38f;
    Vec lo[4], hi[4], bad[4];  // Inf x 0 and NaN x 0 are NaN, and stay
    for (int i = 0; i < 4; ++i) lo[i] = hi[i] = bad[i] = zero();
    const auto look_at = [&](Vec a, int i) {
        lo[i] = min(a, lo[i]);
        hi[i] = max(a, hi[i]);
        bad[i] = fma(a, zero(), bad[i]);
    };
    int64_t k = 0;
    for (; k + 4 * WIDTH <= n; k += 4 * WIDTH)
        for (int i = 0; i < 4; ++i) look_at(load(x + k + i * WIDTH), i);
    for (; k + WIDTH <= n; k += WIDTH) look_at(load(x + k), 0);
    if (k < n) look_at(load_first(x + k, int(n - k)), 1);
    bool finite = all_zero(add(add(bad[0], bad[1]), add(bad[2], bad[3])));
    const float low = lowest(min(min(lo[0], lo[1]), min(lo[2], lo[3])));
    const float high = -lowest(sub(zero(), max(max(hi[0], hi[1]), max(hi[2], hi[3]))));
    const float range = high - low, factor = 255.0f / range;
    finite &= range <= LARGEST;
    if (!finite) return {0, __builtin_nanf(""), 0};
    if (!(factor > 0 && factor <= LARGEST)) return {0, 0, 0};  // a range of -0 has a factor of -Inf
    const float at = rintf(-low * factor);
    return {factor, range / 255.0f, at < 255.0f ? int32_t(at) : 255};
}

// A row of n inputs as bytes, q - BYTE_OFFSET, up to the next multiple of WIDTH.
template <typename T>
inline void quantize_row(const T *x, int64_t n, uint8_t *to, float *step, int32_t *zero_point) {
    const RowQuantization row = row_quantization(x, n);
    *step = row.step;
    *zero_point = row.zero_point;
    if (row.factor == 0) {  // NaN has no nearest integer
        memset(to, -BYTE_OFFSET & 255, size_t((n + WIDTH - 1) / WIDTH * WIDTH));
        return;
    }
    const Vec factor = set1(row.factor);
    const IntVec zeros = set1(row.zero_point);
    int64_t k = 0;
    for (; k + 4 * WIDTH <= n; k += 4 * WIDTH) {
        const auto scaled = [&](int i) { return mul(load(x + k + i * WIDTH), factor); };
        store_quantized(to + k, scaled(0), scaled(1), scaled(2), scaled(3), zeros);
    }
    for (; k + WIDTH <= n; k += WIDTH) store_quantized(to + k, mul(load(x + k), factor), zeros);
    if (k < n) store_quantized(to + k, mul(load_first(x + k, int(n - k)), factor), zeros);
}

}  // namespace
