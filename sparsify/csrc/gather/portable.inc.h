// The gather form (gather_format.h) in plain C++: weight by weight.
#pragma once

#include "bitmask/portable.inc.h"
#include "few_tokens.inc.h"
#include "gather/format.h"

namespace {

template <int N, typename T>
void gather_tile(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride, float *sums) {
    const bool padded = view.header->padded;
    const int steps_per_window = int(view.header->steps_per_window);
    const size_t groups_per_sum = size_t(gather_groups_per_sum(view.header));
    const size_t n_groups = view.tile_groups[tile + 1];
    const T *value = values + view.tile_values[tile];
    const uint8_t *move = view.moves + size_t(view.tile_groups[tile]) * size_t(GATHER_STEPS / steps_per_window);
    float total[GATHER_LANES][N] = {};
    for (size_t first = view.tile_groups[tile]; first < n_groups; first += groups_per_sum) {
        float part[GATHER_LANES][N] = {};
        for (size_t group = first; group < first + groups_per_sum && group < n_groups; ++group)
            for (int s = 0; s < GATHER_STEPS; ++s) {
                if (s % steps_per_window == 0) x += *move++;
                const T *of_step = value;
                for (unsigned taking = view.lanes[group * GATHER_STEPS + size_t(s)]; taking; taking &= taking - 1) {
                    const int l = __builtin_ctz(taking);
                    const uint32_t word = view.words[group * GATHER_LANES + size_t(l)];
                    const uint32_t column = word >> (GATHER_COLUMN_BITS * s) & (GATHER_WINDOW - 1);
                    const float w = to_float(padded ? of_step[l] : *value++);
                    for (int n = 0; n < N; ++n) part[l][n] += w * x[n * x_stride + column];
                }
                if (padded) value += GATHER_LANES;
            }
        for (int l = 0; l < GATHER_LANES; ++l)
            for (int n = 0; n < N; ++n) total[l][n] += part[l][n];
    }
    const uint8_t *rows = view.rows + tile * GATHER_LANES;
    for (int l = 0; l < GATHER_LANES && rows[l] != GATHER_NO_ROW; ++l)
        for (int n = 0; n < N; ++n) sums[n * BLOCK_ROWS + rows[l]] = total[l][n];
}

struct Gather {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = GATHER_WINDOW;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = true;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        const int64_t first = block * GATHER_BLOCK_TILES, n_tiles = view.header->n_tiles;
        for (int64_t tile = first; tile < first + GATHER_BLOCK_TILES && tile < n_tiles; ++tile)
            gather_tile<N>(view, values, tile, x, x_stride, sums);
    }
};

}  // namespace
