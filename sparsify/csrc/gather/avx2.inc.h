// The gather form (gather_format.h) with AVX2: a window is four registers of 8 columns, and one of eight activations is
// found by a permute of each and three blends. Sixteen lanes are two registers.
#pragma once

#include "few_tokens.inc.h"
#include "gather/format.h"
#include "simd/expand_avx2.h"

namespace {

// x[column] of eight lanes; the low 5 bits of each lane of columns count, the others are ignored.
inline Vec look_up(const float *window, __m256i columns) {
    const Vec a = _mm256_permutevar8x32_ps(load(window), columns);
    const Vec b = _mm256_permutevar8x32_ps(load(window + 8), columns);
    const Vec c = _mm256_permutevar8x32_ps(load(window + 16), columns);
    const Vec d = _mm256_permutevar8x32_ps(load(window + 24), columns);
    const Vec bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(columns, 28));
    const Vec bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(columns, 27));
    return _mm256_blendv_ps(_mm256_blendv_ps(a, b, bit3), _mm256_blendv_ps(c, d, bit3), bit4);
}

template <int N, bool PADDED, bool EXACT, typename T>
void gather_tile(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride, float *sums) {
    const T *value = values + view.tile_values[tile];
    const int steps_per_window = int(view.header->steps_per_window);
    const uint8_t *move = view.moves + size_t(view.tile_groups[tile]) * size_t(GATHER_STEPS / steps_per_window);
    const int64_t groups_per_sum = gather_groups_per_sum(view.header);
    int64_t until_sum = groups_per_sum;
    Vec total[N][2] = {}, part[N][2] = {};
    for (size_t group = view.tile_groups[tile]; group < view.tile_groups[tile + 1]; ++group) {
        const uint32_t *words = view.words + group * GATHER_LANES;
        __m256i columns[2] = {_mm256_loadu_si256((const __m256i *)words),
                              _mm256_loadu_si256((const __m256i *)(words + 8))};
        for (int s = 0; s < GATHER_STEPS; ++s) {
            if (s == 0 || s == steps_per_window) x += *move++;
            const unsigned taking = view.lanes[group * GATHER_STEPS + size_t(s)];
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const unsigned mask = taking >> (8 * half) & 0xff;
                const Vec w = PADDED ? load(value) : expand(value, mask);
                value += PADDED ? 8 : _mm_popcnt_u32(mask);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    Vec a = look_up(x + n * x_stride, columns[half]);
                    if (EXACT) a = keep(a, lanes_of(mask));
                    part[n][half] = fma(w, a, part[n][half]);
                }
                columns[half] = _mm256_srli_epi32(columns[half], GATHER_COLUMN_BITS);
            }
        }
        if (--until_sum == 0 || group + 1 == view.tile_groups[tile + 1]) {
            until_sum = groups_per_sum;
            for (int n = 0; n < N; ++n)
                for (int half = 0; half < 2; ++half) {
                    total[n][half] = add(total[n][half], part[n][half]);
                    part[n][half] = zero();
                }
        }
    }
    const uint8_t *rows = view.rows + tile * GATHER_LANES;
    for (int n = 0; n < N; ++n) {
        alignas(32) float lanes[GATHER_LANES];
        store(lanes, total[n][0]);
        store(lanes + 8, total[n][1]);
        for (int l = 0; l < GATHER_LANES && rows[l] != GATHER_NO_ROW; ++l) sums[n * BLOCK_ROWS + rows[l]] = lanes[l];
    }
}

struct Gather {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = GATHER_WINDOW;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = false;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        const int64_t first = block * GATHER_BLOCK_TILES, n_tiles = view.header->n_tiles;
        for (int64_t tile = first; tile < first + GATHER_BLOCK_TILES && tile < n_tiles; ++tile) {
            if (view.header->padded)
                gather_tile<N, true, EXACT>(view, values, tile, x, x_stride, sums);
            else
                gather_tile<N, false, EXACT>(view, values, tile, x, x_stride, sums);
        }
    }
};

}  // namespace
