// The gather form (gather_format.h) with AVX-512: a window is two registers, a step is one permute and one FMA.
#pragma once

#include "gather/plain.inc.h"
#include "simd/expand_avx512.h"

namespace {

constexpr GatherTile GATHER_TILE = GATHER_WIDE;
constexpr int64_t GATHER_TILES = GATHER_BLOCK_ROWS / GATHER_TILE.lanes;  // of a block

// Where one tile is in its streams.
template <typename T>
struct GatherCursor {
    const T *values;
    const uint32_t *words;
    const uint16_t *taking;
    const uint8_t *moves;
    const float *x;  // start of the window, of the first token
    int64_t n_groups;

    GatherCursor(const GatherView &view, const T *all_values, int64_t tile, const float *x, int windows_per_group)
        : values(all_values + view.tile_values[tile]),
          words(view.words + size_t(view.tile_groups[tile]) * size_t(GATHER_TILE.lanes)),
          taking(reinterpret_cast<const uint16_t *>(view.taking) +
                 size_t(view.tile_groups[tile]) * size_t(GATHER_TILE.steps)),
          moves(view.moves + size_t(view.tile_groups[tile]) * size_t(windows_per_group)),
          x(x),
          n_groups(int64_t(view.tile_groups[tile + 1]) - view.tile_groups[tile]) {}
};

// Keeps g++ from turning a register that is used several times back into several loads from memory: without it the
// permutes take both halves of the window from the L1 cache in every step, at half the speed.
inline void keep_in_register(Vec &a) { asm("" : "+v"(a)); }

// How many groups ahead weights are fetched: 4096x4096 at 50%, in memory, 8 tokens: 4.8 ms without, 3.8 with 3, 3.0
// with 6.
constexpr int64_t GATHER_AHEAD = 6;

// Six steps of one tile.
template <int N, int STEPS_PER_WINDOW, bool PADDED, bool EXACT, typename T>
__attribute__((always_inline)) inline void gather_group(GatherCursor<T> &at, int64_t x_stride, Vec (&acc)[N]) {
    __m512i columns = _mm512_loadu_si512(at.words);
    if (N > 2) {  // with one or two tokens the processor keeps up by itself, and the prefetches cost 5%
        _mm_prefetch((const char *)(at.words + GATHER_AHEAD * GATHER_TILE.lanes), _MM_HINT_T0);
        constexpr size_t BYTES = GATHER_TILE.steps * (PADDED ? GATHER_TILE.lanes : 10) * sizeof(T);
#pragma GCC unroll 6
        for (size_t line = 0; line < BYTES; line += 64)
            _mm_prefetch((const char *)at.values + GATHER_AHEAD * BYTES + line, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int window = 0; window < GATHER_TILE.steps / STEPS_PER_WINDOW; ++window) {
        at.x += at.moves[window];
        Vec low[N], high[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            low[n] = load(at.x + n * x_stride);
            high[n] = load(at.x + n * x_stride + 16);
            keep_in_register(low[n]);
            keep_in_register(high[n]);
        }
#pragma GCC unroll 6
        for (int s = 0; s < STEPS_PER_WINDOW; ++s) {
            constexpr bool MASKED = EXACT || !PADDED;
            const uint16_t taking = MASKED ? at.taking[window * STEPS_PER_WINDOW + s] : 0;
            const Mask mask = _cvtu32_mask16(taking);
            Vec w = load(at.values);
            if (PADDED) {
                at.values += GATHER_TILE.lanes;
            } else {
                w = expand(w, mask);
                at.values += _mm_popcnt_u32(taking);
            }
            keep_in_register(w);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const Vec x = _mm512_permutex2var_ps(low[n], columns, high[n]);
                acc[n] = MASKED ? _mm512_mask3_fmadd_ps(w, x, acc[n], mask) : _mm512_fmadd_ps(w, x, acc[n]);
            }
            columns = _mm512_srli_epi32(columns, GATHER_TILE.column_bits);
        }
    }
    at.words += GATHER_TILE.lanes;
    at.taking += GATHER_TILE.steps;
    at.moves += GATHER_TILE.steps / STEPS_PER_WINDOW;
}

// total += part, part = 0
template <int N>
inline void gather_fold(Vec (&total)[N], Vec (&part)[N]) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        total[n] = add(total[n], part[n]);
        part[n] = zero();
    }
}

template <int N>
inline void gather_store(const GatherView &view, int64_t tile, const Vec (&total)[N], float *sums) {
    for (int n = 0; n < N; ++n) {
        alignas(64) float lanes[GATHER_TILE.lanes];
        store(lanes, total[n]);
        gather_put(view, GATHER_TILE, tile, lanes, sums + n * BLOCK_ROWS);
    }
}

// TILES neighbours at once.
template <int TILES, int N, int STEPS_PER_WINDOW, bool PADDED, bool EXACT, typename T>
void gather_tiles(const GatherView &view, const T *values, int64_t tile, const float *x, int64_t x_stride,
                  float *sums) {
    constexpr int WINDOWS = GATHER_TILE.steps / STEPS_PER_WINDOW;
    const int64_t groups_per_sum = gather_groups_per_sum(view.header);
    GatherCursor<T> a(view, values, tile, x, WINDOWS), b(view, values, tile + TILES - 1, x, WINDOWS);
    if (TILES == 1) b.n_groups = 0;
    Vec total_a[N] = {}, total_b[N] = {};
    for (int64_t first = 0; first < a.n_groups || first < b.n_groups; first += groups_per_sum) {
        const int64_t end = first + groups_per_sum;
        const int64_t end_a = end < a.n_groups ? end : a.n_groups, end_b = end < b.n_groups ? end : b.n_groups;
        Vec part_a[N] = {}, part_b[N] = {};
        int64_t i = first;
        if constexpr (TILES == 2)
            for (; i < end_a && i < end_b; ++i) {
                gather_group<N, STEPS_PER_WINDOW, PADDED, EXACT>(a, x_stride, part_a);
                gather_group<N, STEPS_PER_WINDOW, PADDED, EXACT>(b, x_stride, part_b);
            }
        for (int64_t j = i; j < end_a; ++j) gather_group<N, STEPS_PER_WINDOW, PADDED, EXACT>(a, x_stride, part_a);
        gather_fold(total_a, part_a);
        if constexpr (TILES == 2) {
            for (int64_t j = i; j < end_b; ++j) gather_group<N, STEPS_PER_WINDOW, PADDED, EXACT>(b, x_stride, part_b);
            gather_fold(total_b, part_b);
        }
    }
    gather_store(view, tile, total_a, sums);
    if (TILES == 2) gather_store(view, tile + 1, total_b, sums);
}

template <int N, int STEPS_PER_WINDOW, bool PADDED, bool EXACT, typename T>
void gather_block(const GatherView &view, const T *values, int64_t block, const float *x, int64_t x_stride,
                  float *sums) {
    // One tile alone waits for its own FMAs: with one or two tokens, two at once.
    constexpr int TILES = N <= 2 ? 2 : 1;
    const int64_t n_tiles = view.header->n_tiles;
    const int64_t end = (block + 1) * GATHER_TILES < n_tiles ? (block + 1) * GATHER_TILES : n_tiles;
    int64_t tile = block * GATHER_TILES;
    for (; tile + TILES <= end; tile += TILES)
        gather_tiles<TILES, N, STEPS_PER_WINDOW, PADDED, EXACT>(view, values, tile, x, x_stride, sums);
    for (; tile < end; ++tile)
        gather_tiles<1, N, STEPS_PER_WINDOW, PADDED, EXACT>(view, values, tile, x, x_stride, sums);
}

struct Gather {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = GATHER_TILE.window;
    static constexpr int MAX_TOKENS = 8;  // 16 registers of windows, 8 of sums
    static constexpr bool SKIPS_MASKED = false;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        if (view.header->window != GATHER_TILE.window)
            return gather_block_plain<N>(view, values, block, x, x_stride, sums);
        const bool padded = view.header->padded, long_windows = view.header->steps_per_window == 6;
        if (long_windows)
            padded ? gather_block<N, 6, true, EXACT>(view, values, block, x, x_stride, sums)
                   : gather_block<N, 6, false, true>(view, values, block, x, x_stride, sums);
        else
            padded ? gather_block<N, 3, true, EXACT>(view, values, block, x, x_stride, sums)
                   : gather_block<N, 3, false, true>(view, values, block, x, x_stride, sums);
    }
};

}  // namespace
