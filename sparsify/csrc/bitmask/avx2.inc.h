// The bitmask form (bitmask_format.h) with AVX2: sixteen rows are two registers.
#pragma once

#include "bitmask/format.h"
#include "few_tokens.inc.h"
#include "simd/expand_avx2.h"

namespace {

template <int N, bool EXACT, typename T>
void bitmask_tile(const BitmaskView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                  float *sums) {
    const int64_t in = view.header->in;
    const uint16_t *masks = view.masks + tile * in;
    const T *value = values + view.tile_values[tile];
    const int64_t columns_per_sum = bitmask_columns_per_sum(view.header);
    Vec total[N][2] = {};
    for (int64_t first = 0; first < in; first += columns_per_sum) {
        const int64_t end = first + columns_per_sum < in ? first + columns_per_sum : in;
        Vec part[N][2] = {};
        for (int64_t k = first; k < end; ++k) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const unsigned mask = masks[k] >> (8 * half) & 0xff;
                const Vec lanes = lanes_of(mask), w = expand(load(value), mask, lanes);
                value += _mm_popcnt_u32(mask);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    Vec a = broadcast(x + n * x_stride + k);
                    if (EXACT) a = _mm256_and_ps(a, lanes);
                    part[n][half] = fma(w, a, part[n][half]);
                }
            }
        }
        for (int n = 0; n < N; ++n)
            for (int half = 0; half < 2; ++half) total[n][half] = add(total[n][half], part[n][half]);
    }
    for (int n = 0; n < N; ++n)
        for (int half = 0; half < 2; ++half) store(sums + n * BLOCK_ROWS + 8 * half, total[n][half]);
}

struct Bitmask {
    using View = BitmaskView;
    static constexpr int64_t LEAST_IN = 0;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = false;

    static View view(const uint8_t *index) { return bitmask_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        constexpr int TILES_PER_BLOCK = BLOCK_ROWS / BITMASK_LANES;
        const int64_t first = block * TILES_PER_BLOCK, n_tiles = view.header->n_tiles;
        for (int t = 0; t < TILES_PER_BLOCK && first + t < n_tiles; ++t)
            bitmask_tile<N, EXACT>(view, values, first + t, x, x_stride, sums + t * BITMASK_LANES);
    }
};

}  // namespace
