// The sell form (gather/format.h) on x86-64: a step is one gather instruction and one FMA for each token.
//
// Registers are of eight floats with AVX-512 as well: its gather of sixteen takes 1.2 to 1.8 times as long for a weight
// (512x4096, Emerald Rapids, 70 to 95%).
#pragma once

#include <immintrin.h>

#include "few_tokens.inc.h"
#include "gather/format.h"

namespace {

inline __m256 sell_load(const float *p) { return _mm256_loadu_ps(p); }
inline __m256 sell_load(const BFloat16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
inline __m256 sell_load(const Float16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline __m256 sell_load(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

// All bits of the lanes that take part in a step.
inline __m256 sell_lanes(unsigned taking) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(taking)), bits), bits));
}

// The processor's own prefetch stops at the end of each page: from memory 1.2 to 1.35x at 70 and 80%. Inlined by force:
// g++ takes a function that only prefetches for one without effect, and drops its calls.
__attribute__((always_inline)) inline void sell_prefetch(const void *p) {
    _mm_prefetch((const char *)p + 4096, _MM_HINT_T0);
}

// part[n] += one group. Moves past its values and windows.
template <int N, bool EXACT, typename T>
__attribute__((always_inline)) inline void sell_group(const GatherView &view, int64_t group, const T *&values,
                                                      const float *&x, int64_t x_stride, __m256 (&part)[N][2]) {
    const uint32_t *words = view.words + group * GATHER_SELL.lanes;
    const uint8_t *moves = view.moves + group * GATHER_SELL.steps, *taking = view.taking + group * GATHER_SELL.steps;
    __m256i columns = _mm256_loadu_si256((const __m256i *)words);
    sell_prefetch(words);
#pragma GCC unroll 4
    for (int s = 0; s < GATHER_SELL.steps; ++s) {
        x += moves[s];
        if (s * GATHER_SELL.lanes * int(sizeof(T)) % 64 == 0) sell_prefetch(values);
        const __m256 w = sell_load(values);
        values += GATHER_SELL.lanes;
        const __m256i at = _mm256_and_si256(columns, _mm256_set1_epi32(GATHER_SELL.window - 1));
        columns = _mm256_srli_epi32(columns, GATHER_SELL.column_bits);
        const __m256 mask = EXACT ? sell_lanes(taking[s]) : _mm256_castsi256_ps(_mm256_set1_epi32(-1));
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const float *row = x + n * x_stride;
            const __m256 a = _mm256_mask_i32gather_ps(_mm256_setzero_ps(), row, at, mask, sizeof(float));
            part[n][s % 2] = _mm256_fmadd_ps(w, a, part[n][s % 2]);
        }
    }
}

template <int N, bool EXACT, typename T>
void sell_tile(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride, float *sums) {
    const int64_t groups_per_sum = gather_groups_per_sum(view.header), end = view.tile_groups[tile + 1];
    values += view.tile_values[tile];
    __m256 total[N] = {};
    for (int64_t group = view.tile_groups[tile]; group < end;) {
        const int64_t end_sum = group + groups_per_sum < end ? group + groups_per_sum : end;
        __m256 part[N][2] = {};
        for (; group < end_sum; ++group) sell_group<N, EXACT>(view, group, values, x, x_stride, part);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) total[n] = _mm256_add_ps(total[n], _mm256_add_ps(part[n][0], part[n][1]));
    }
    for (int n = 0; n < N; ++n) {
        alignas(32) float lanes[GATHER_SELL.lanes];
        _mm256_store_ps(lanes, total[n]);
        gather_put(view, GATHER_SELL, tile, lanes, sums + n * BLOCK_ROWS);
    }
}

struct Sell {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = 0;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = false;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        constexpr int64_t TILES = GATHER_BLOCK_ROWS / GATHER_SELL.lanes;
        for (int64_t tile = block * TILES; tile < (block + 1) * TILES && tile < view.header->n_tiles; ++tile)
            sell_tile<N, EXACT>(view, values, tile, x, x_stride, sums);
    }
};

}  // namespace
