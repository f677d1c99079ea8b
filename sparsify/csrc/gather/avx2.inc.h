// The gather form (gather/format.h) with AVX2: a step is one permute and one FMA for each token.
#pragma once

#include "gather/plain.inc.h"
#include "simd/expand_avx2.h"

namespace {

constexpr GatherTile GATHER_TILE = GATHER_NARROW;
// Chains of additions that do not wait for one another; four tokens have registers for no more.
constexpr int GATHER_CHAINS = 3;

// part[n][chain] += one group. Moves past what it read; `at` is the start of the window.
template <int N, bool PADDED, bool EXACT, typename T>
__attribute__((always_inline)) inline void gather_group(const GatherView &view, int64_t group, const T *&values,
                                                        const float *x, int64_t x_stride, size_t &at,
                                                        Vec (&part)[N][GATHER_CHAINS]) {
    __m256i columns = _mm256_loadu_si256((const __m256i *)(view.words + group * GATHER_TILE.lanes));
    const uint8_t *moves = view.moves + group * GATHER_TILE.steps, *taking = view.taking + group * GATHER_TILE.steps;
    prefetch_values(view.words + group * GATHER_TILE.lanes);
    constexpr int N_VALUES = GATHER_TILE.steps * (PADDED ? GATHER_TILE.lanes : 5), LINE = 64 / sizeof(T);
#pragma GCC unroll 6
    for (int i = 0; i < N_VALUES; i += LINE) prefetch_values(values + i);
#pragma GCC unroll 10
    for (int s = 0; s < GATHER_TILE.steps; ++s) {
        at += moves[s];
        const unsigned mask = PADDED && !EXACT ? 0 : taking[s];
        const Vec w = PADDED ? load(values) : expand(values, mask);
        values += PADDED ? GATHER_TILE.lanes : _mm_popcnt_u32(mask);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            Vec a = _mm256_permutevar8x32_ps(load(x + n * x_stride + at), columns);  // the low three bits count
            if (EXACT) a = keep(a, lanes_of(mask));
            part[n][s % GATHER_CHAINS] = fma(w, a, part[n][s % GATHER_CHAINS]);
        }
        columns = _mm256_srli_epi32(columns, GATHER_TILE.column_bits);
    }
}

template <int N, bool PADDED, bool EXACT, typename T>
void gather_tile(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride, float *sums) {
    const int64_t groups_per_sum = gather_groups_per_sum(view.header), end = view.tile_groups[tile + 1];
    values += view.tile_values[tile];
    size_t at = 0;
    Vec total[N] = {};
    for (int64_t group = view.tile_groups[tile]; group < end;) {
        const int64_t end_sum = group + groups_per_sum < end ? group + groups_per_sum : end;
        Vec part[N][GATHER_CHAINS] = {};
        for (; group < end_sum; ++group) gather_group<N, PADDED, EXACT>(view, group, values, x, x_stride, at, part);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) total[n] = add(total[n], add(add(part[n][0], part[n][1]), part[n][2]));
    }
    const uint8_t *rows = view.rows + tile * GATHER_TILE.lanes;
    for (int n = 0; n < N; ++n) {
        alignas(32) float lanes[GATHER_TILE.lanes];
        store(lanes, total[n]);
        for (int l = 0; l < GATHER_TILE.lanes && rows[l] != GATHER_NO_ROW; ++l)
            sums[n * BLOCK_ROWS + rows[l]] = lanes[l];
    }
}

struct Gather {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = GATHER_TILE.window;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = false;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        if (view.header->lanes != uint32_t(GATHER_TILE.lanes))
            return gather_block_plain<N>(view, values, block, x, x_stride, sums);
        constexpr int64_t TILES = GATHER_BLOCK_ROWS / GATHER_TILE.lanes;
        for (int64_t tile = block * TILES; tile < (block + 1) * TILES && tile < view.header->n_tiles; ++tile) {
            if (view.header->padded)
                gather_tile<N, true, EXACT>(view, values, tile, x, x_stride, sums);
            else
                gather_tile<N, false, EXACT>(view, values, tile, x, x_stride, sums);
        }
    }
};

}  // namespace
