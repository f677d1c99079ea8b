// The gather and sell forms (gather/format.h) weight by weight: any tile, on every processor.
#pragma once

#include "few_tokens.inc.h"
#include "gather/format.h"
#include "simd/scalar.h"

namespace {

template <int N, typename T>
void gather_tile_plain(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                       float *sums) {
    const GatherTile &size = gather_tile_of(view.header);
    const int64_t steps_per_window = view.header->steps_per_window, end = view.tile_groups[tile + 1];
    const int64_t groups_per_sum = gather_groups_per_sum(view.header);
    const T *value = values + view.tile_values[tile];
    const uint8_t *move = view.moves + view.tile_groups[tile] * (size.steps / steps_per_window);
    float total[GATHER_MAX_LANES][N] = {};
    for (int64_t first = view.tile_groups[tile]; first < end; first += groups_per_sum) {
        float part[GATHER_MAX_LANES][N] = {};
        for (int64_t group = first; group < first + groups_per_sum && group < end; ++group)
            for (int s = 0; s < size.steps; ++s) {
                if (s % steps_per_window == 0) x += *move++;
                const T *of_step = value;
                for (unsigned taking = gather_taking(view, size, group, s); taking; taking &= taking - 1) {
                    const int l = __builtin_ctz(taking);
                    const uint32_t column = view.words[group * size.lanes + l] >> (size.column_bits * s);
                    const float w = to_float(view.header->padded ? of_step[l] : *value++);
                    for (int n = 0; n < N; ++n) part[l][n] += w * x[n * x_stride + column % unsigned(size.window)];
                }
                if (view.header->padded) value += size.lanes;
            }
        for (int l = 0; l < size.lanes; ++l)
            for (int n = 0; n < N; ++n) total[l][n] += part[l][n];
    }
    const uint8_t *rows = view.rows + tile * size.lanes;
    for (int l = 0; l < size.lanes && rows[l] != GATHER_NO_ROW; ++l)
        for (int n = 0; n < N; ++n) sums[n * BLOCK_ROWS + rows[l]] = total[l][n];
}

template <int N, typename T>
void gather_block_plain(const GatherView &view, const T *values, int64_t block, const float *x, int64_t x_stride,
                        float *sums) {
    const int64_t per_block = GATHER_BLOCK_ROWS / gather_tile_of(view.header).lanes, n_tiles = view.header->n_tiles;
    for (int64_t tile = block * per_block; tile < (block + 1) * per_block && tile < n_tiles; ++tile)
        gather_tile_plain<N>(view, values, tile, x, x_stride, sums);
}

struct GatherPlain {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = 0;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = true;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        gather_block_plain<N>(view, values, block, x, x_stride, sums);
    }
};

}  // namespace
