// The bitmask form (bitmask/format.h) in plain C++: weight by weight.
#pragma once

#include "bitmask/format.h"
#include "few_tokens.inc.h"
#include "simd/scalar.h"

namespace {

struct Bitmask {
    using View = BitmaskView;
    static constexpr int64_t LEAST_IN = 0;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = true;

    static View view(const uint8_t *index) { return bitmask_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        constexpr int TILES_PER_BLOCK = BLOCK_ROWS / BITMASK_LANES;
        const int64_t in = view.header->in, n_tiles = view.header->n_tiles;
        const int64_t columns_per_sum = bitmask_columns_per_sum(view.header);
        for (int t = 0; t < TILES_PER_BLOCK && block * TILES_PER_BLOCK + t < n_tiles; ++t) {
            const int64_t tile = block * TILES_PER_BLOCK + t;
            const T *value = values + view.tile_values[tile];
            float total[BITMASK_LANES][N] = {};
            for (int64_t first = 0; first < in; first += columns_per_sum) {
                const int64_t end = first + columns_per_sum < in ? first + columns_per_sum : in;
                float part[BITMASK_LANES][N] = {};
                for (int64_t k = first; k < end; ++k)
                    for (unsigned mask = view.masks[tile * in + k]; mask; mask &= mask - 1) {
                        const float w = to_float(*value++);
                        for (int n = 0; n < N; ++n) part[__builtin_ctz(mask)][n] += w * x[n * x_stride + k];
                    }
                for (int l = 0; l < BITMASK_LANES; ++l)
                    for (int n = 0; n < N; ++n) total[l][n] += part[l][n];
            }
            for (int l = 0; l < BITMASK_LANES; ++l)
                for (int n = 0; n < N; ++n) sums[n * BLOCK_ROWS + t * BITMASK_LANES + l] = total[l][n];
        }
    }
};

}  // namespace
