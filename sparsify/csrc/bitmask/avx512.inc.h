// The bitmask form (bitmask/format.h) with AVX-512: an expand per column and 16 rows, an FMA per token.
#pragma once

#include "bitmask/format.h"
#include "few_tokens.inc.h"
#include "simd/expand_avx512.h"

namespace {

// TILES neighbours at once: as many independent streams of values and chains of additions.
template <int TILES, int N, typename T>
void bitmask_tiles(const BitmaskView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                   float *sums) {
    const int64_t in = view.header->in;
    const uint16_t *masks = view.masks + tile * in;
    const int64_t columns_per_sum = bitmask_columns_per_sum(view.header);
    const T *next[TILES];
#pragma GCC unroll 4
    for (int t = 0; t < TILES; ++t) next[t] = values + view.tile_values[tile + t];
    Vec total[TILES][N] = {};
    for (int64_t first = 0; first < in; first += columns_per_sum) {
        const int64_t end = first + columns_per_sum < in ? first + columns_per_sum : in;
        Vec part[TILES][N] = {};
        for (int64_t k = first; k < end; ++k) {
#pragma GCC unroll 4
            for (int t = 0; t < TILES; ++t) {
                const uint16_t kept = masks[t * in + k];
                const Mask mask = _cvtu32_mask16(kept);
                const Vec w = expand(load(next[t]), mask);
                next[t] += _mm_popcnt_u32(kept);
                // Masked, although the other weights are zero: it costs nothing, and keeps 0 x Inf = NaN away.
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n)
                    part[t][n] = _mm512_mask3_fmadd_ps(w, _mm512_set1_ps(x[n * x_stride + k]), part[t][n], mask);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[t][n] = add(total[t][n], part[t][n]);
    }
    for (int t = 0; t < TILES; ++t)
        for (int n = 0; n < N; ++n) store(sums + n * BLOCK_ROWS + t * BITMASK_LANES, total[t][n]);
}

struct Bitmask {
    using View = BitmaskView;
    static constexpr int64_t LEAST_IN = 0;
    static constexpr int MAX_TOKENS = 8;
    static constexpr bool SKIPS_MASKED = true;

    static View view(const uint8_t *index) { return bitmask_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        constexpr int TILES_PER_BLOCK = BLOCK_ROWS / BITMASK_LANES;
        constexpr int TILES = N <= 4 ? 4 : 2;  // at most 16 accumulators
        const int64_t first = block * TILES_PER_BLOCK, left = view.header->n_tiles - first;
        const int n_tiles = left < TILES_PER_BLOCK ? int(left) : TILES_PER_BLOCK;
        int t = 0;
        for (; t + TILES <= n_tiles; t += TILES)
            bitmask_tiles<TILES, N>(view, values, first + t, x, x_stride, sums + t * BITMASK_LANES);
        for (; t < n_tiles; ++t) bitmask_tiles<1, N>(view, values, first + t, x, x_stride, sums + t * BITMASK_LANES);
    }
};

}  // namespace
