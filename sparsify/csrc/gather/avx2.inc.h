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

// TILES neighbours at once: while one waits for memory, the other has work.
template <int TILES, int N, bool PADDED, bool EXACT, typename T>
void gather_tiles(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                  float *sums) {
    const int64_t groups_per_sum = gather_groups_per_sum(view.header);
    int64_t group[TILES], end[TILES];
    const T *next[TILES];
    size_t at[TILES] = {};
    Vec total[TILES][N] = {};
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
        group[t] = view.tile_groups[tile + t];
        end[t] = view.tile_groups[tile + t + 1];
        next[t] = values + view.tile_values[tile + t];
    }
    for (bool left = true; left;) {
        Vec part[TILES][N][GATHER_CHAINS] = {};
        int64_t n[TILES], both = groups_per_sum;
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) {
            n[t] = end[t] - group[t] < groups_per_sum ? end[t] - group[t] : groups_per_sum;
            both = n[t] < both ? n[t] : both;
        }
        for (int64_t i = 0; i < both; ++i) {
#pragma GCC unroll 2
            for (int t = 0; t < TILES; ++t)
                gather_group<N, PADDED, EXACT>(view, group[t]++, next[t], x, x_stride, at[t], part[t]);
        }
        left = false;
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) {
            for (int64_t i = both; i < n[t]; ++i)
                gather_group<N, PADDED, EXACT>(view, group[t]++, next[t], x, x_stride, at[t], part[t]);
#pragma GCC unroll 4
            for (int k = 0; k < N; ++k)
                total[t][k] = add(total[t][k], add(add(part[t][k][0], part[t][k][1]), part[t][k][2]));
            left |= group[t] < end[t];
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < TILES; ++t) {
        for (int k = 0; k < N; ++k) {
            alignas(32) float lanes[GATHER_TILE.lanes];
            store(lanes, total[t][k]);
            gather_put(view, GATHER_TILE, tile + t, lanes, sums + k * BLOCK_ROWS);
        }
    }
}

template <int TILES, int N, bool EXACT, typename T>
void gather_neighbours(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                       float *sums) {
    if (view.header->padded)
        gather_tiles<TILES, N, true, EXACT>(view, values, tile, x, x_stride, sums);
    else
        gather_tiles<TILES, N, false, EXACT>(view, values, tile, x, x_stride, sums);
}

// Whether two tiles at once are faster with one token: with weights from memory 1.17x at 50 to 80% and 1.08x at 90%,
// and 0.94x at 95%, where a step has 2.9 values (4096x4096, Emerald Rapids, two threads).
inline bool gather_pairs(const GatherView &view) {
    return 2 * view.header->nnz >= 7 * int64_t(view.header->n_groups) * GATHER_TILE.steps;
}

struct Gather {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = GATHER_TILE.window;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = false;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        if (view.header->window != GATHER_TILE.window)
            return gather_block_plain<N>(view, values, block, x, x_stride, sums);
        constexpr int64_t TILES = GATHER_BLOCK_ROWS / GATHER_TILE.lanes;
        const int64_t end = (block + 1) * TILES < view.header->n_tiles ? (block + 1) * TILES : view.header->n_tiles;
        int64_t tile = block * TILES;
        if constexpr (N == 1)
            for (; gather_pairs(view) && tile + 2 <= end; tile += 2)
                gather_neighbours<2, N, EXACT>(view, values, tile, x, x_stride, sums);
        for (; tile < end; ++tile) gather_neighbours<1, N, EXACT>(view, values, tile, x, x_stride, sums);
    }
};

}  // namespace
