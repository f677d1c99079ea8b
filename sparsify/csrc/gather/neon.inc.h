// The gather form (gather/format.h) with NEON: a step is two shuffles of a window of eight inputs, and two FMAs, for
// each token.
#pragma once

#include "gather/plain.inc.h"
#include "simd/expand_neon.h"

namespace {

constexpr GatherTile GATHER_TILE = GATHER_NARROW;
// Chains of additions that do not wait for one another, of two vectors each; four tokens have registers for no more.
constexpr int GATHER_CHAINS = 2;

// part[n][chain] += one group. Moves past what it read; `at` is the start of the window.
template <int N, bool PADDED, bool EXACT, typename T>
__attribute__((always_inline)) inline void gather_group(const GatherView &view, int64_t group, const T *&values,
                                                        const float *x, int64_t x_stride, size_t &at,
                                                        Vec (&part)[N][GATHER_CHAINS][2]) {
    const uint32_t *words = view.words + group * GATHER_TILE.lanes;
    uint32x4_t columns[2] = {vld1q_u32(words), vld1q_u32(words + 4)};
    const uint8_t *moves = view.moves + group * GATHER_TILE.steps, *taking = view.taking + group * GATHER_TILE.steps;
#pragma GCC unroll 10
    for (int s = 0; s < GATHER_TILE.steps; ++s) {
        at += moves[s];
        constexpr bool MASKED = !PADDED || EXACT;
        Vec w[2];
        uint8x16_t shuffles[2];
        if constexpr (MASKED) {
            const Expanded all = expand_eight(values, taking[s]);  // with padding only the shuffles count
            shuffles[0] = all.shuffles[0], shuffles[1] = all.shuffles[1];
            w[0] = PADDED ? load(values) : all.w[0];
            w[1] = PADDED ? load(values + 4) : all.w[1];
            values += PADDED ? size_t(GATHER_TILE.lanes) : count_eight(taking[s]);
        } else {
            w[0] = load(values);
            w[1] = load(values + 4);
            values += GATHER_TILE.lanes;
        }
        uint8x16_t sources[2];  // the bytes of column c of the window: 4 c to 4 c + 3
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const uint32x4_t column = vandq_u32(columns[half], vdupq_n_u32(GATHER_TILE.window - 1));
            sources[half] = vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), column, vdupq_n_u32(0x04040404)));
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const uint8_t *from = reinterpret_cast<const uint8_t *>(x + n * x_stride + at);
            const uint8x16x2_t window = {{vld1q_u8(from), vld1q_u8(from + 16)}};
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                Vec a = vreinterpretq_f32_u8(vqtbl2q_u8(window, sources[half]));
                if constexpr (EXACT) a = keep(a, shuffles[half]);
                Vec &sum = part[n][s % GATHER_CHAINS][half];
                sum = fma(w[half], a, sum);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) columns[half] = vshrq_n_u32(columns[half], GATHER_TILE.column_bits);
    }
}

template <int N, bool PADDED, bool EXACT, typename T>
void gather_tile(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride, float *sums) {
    const int64_t groups_per_sum = gather_groups_per_sum(view.header), end = view.tile_groups[tile + 1];
    values += view.tile_values[tile];
    size_t at = 0;
    Vec total[N][2] = {};
    for (int64_t group = view.tile_groups[tile]; group < end;) {
        const int64_t end_sum = group + groups_per_sum < end ? group + groups_per_sum : end;
        Vec part[N][GATHER_CHAINS][2] = {};
        for (; group < end_sum; ++group) gather_group<N, PADDED, EXACT>(view, group, values, x, x_stride, at, part);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
                total[n][half] = add(total[n][half], add(part[n][0][half], part[n][1][half]));
    }
    for (int n = 0; n < N; ++n) {
        float lanes[GATHER_TILE.lanes];
        store(lanes, total[n][0]);
        store(lanes + 4, total[n][1]);
        gather_put(view, GATHER_TILE, tile, lanes, sums + n * BLOCK_ROWS);
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
        if (view.header->window != GATHER_TILE.window)
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
