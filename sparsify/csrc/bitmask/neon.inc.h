// The bitmask form (bitmask/format.h) with NEON: sixteen rows are four registers, expanded two by two.
#pragma once

#include "bitmask/format.h"
#include "few_tokens.inc.h"
#include "simd/expand_neon.h"

namespace {

// TILES neighbours at once: as many independent streams of values and chains of additions.
template <int TILES, int N, bool EXACT, typename T>
void bitmask_tiles(const BitmaskView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                   float *sums) {
    const int64_t in = view.header->in;
    const uint16_t *masks = view.masks + tile * in;
    const int64_t columns_per_sum = bitmask_columns_per_sum(view.header);
    const T *next[TILES];
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) next[t] = values + view.tile_values[tile + t];
    Vec total[TILES][N][4] = {};
    for (int64_t first = 0; first < in; first += columns_per_sum) {
        const int64_t end = first + columns_per_sum < in ? first + columns_per_sum : in;
        Vec part[TILES][N][4] = {};
        for (int64_t k = first; k < end; ++k) {
            Vec a[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) a[n] = broadcast(x + n * x_stride + k);
#pragma GCC unroll 2
            for (int t = 0; t < TILES; ++t) {
                const unsigned mask = masks[t * in + k];
#pragma GCC unroll 2
                for (int eight = 0; eight < 2; ++eight) {
                    const unsigned kept = eight ? mask >> 8 : mask & 0xff;
                    const Expanded all = expand_eight(next[t], kept);
                    next[t] += count_eight(kept);
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
                        for (int n = 0; n < N; ++n) {
                            Vec &sum = part[t][n][2 * eight + half];
                            sum = fma(all.w[half], EXACT ? keep(a[n], all.shuffles[half]) : a[n], sum);
                        }
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) total[t][n][i] = add(total[t][n][i], part[t][n][i]);
    }
    for (int t = 0; t < TILES; ++t)
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < 4; ++i) store(sums + n * BLOCK_ROWS + t * BITMASK_LANES + 4 * i, total[t][n][i]);
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
        constexpr int TILES = N <= 2 ? 2 : 1;  // at most 16 accumulators
        const int64_t first = block * TILES_PER_BLOCK, left = view.header->n_tiles - first;
        const int n_tiles = left < TILES_PER_BLOCK ? int(left) : TILES_PER_BLOCK;
        int t = 0;
        for (; t + TILES <= n_tiles; t += TILES)
            bitmask_tiles<TILES, N, EXACT>(view, values, first + t, x, x_stride, sums + t * BITMASK_LANES);
        for (; t < n_tiles; ++t)
            bitmask_tiles<1, N, EXACT>(view, values, first + t, x, x_stride, sums + t * BITMASK_LANES);
    }
};

}  // namespace
