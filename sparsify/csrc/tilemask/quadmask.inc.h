// The quadmask form (tilemask/format.h) for the instruction set of the simd/*.h included before: a tile is expanded
// once for several tokens.
#pragma once

#include "few_quantized.inc.h"
#include "tilemask/format.h"
#ifdef __AMX_INT8__
#include "tilemask/amx.inc.h"
#endif

namespace {

// A tile is so many vectors of rows.
constexpr int TILEMASK_PARTS = TILEMASK_TILE_ROWS / WIDTH;
constexpr int QUADMASK_SUMS = N_REGISTERS >= 32 ? 20 : 8;         // that leave room for weights and activations
constexpr int QUADMASK_FITTING = QUADMASK_SUMS / TILEMASK_PARTS;  // tokens whose sums of a tile fit
constexpr int QUADMASK_MAX_TOKENS = N_REGISTERS < 32 ? 4 : QUADMASK_FITTING < 8 ? QUADMASK_FITTING : 8;

// sums[token][row of the block], of TILES tiles from FIRST on, of a block of TOTAL, for N tokens.
template <int TOTAL, int FIRST, int TILES, int N>
void quadmask_tiles(const uint64_t *masks, const int8_t *values, int64_t n_quads, const uint8_t *x, int64_t x_stride,
                    int32_t *sums) {
    constexpr int PARTS = TILEMASK_PARTS;
    IntVec acc[TILES * PARTS][N] = {};
    for (int64_t quad = 0; quad < n_quads; ++quad, masks += TOTAL) {
        IntVec w[TILES * PARTS];
#pragma GCC unroll 4
        for (int t = 0; t < TOTAL; ++t) {
            if (t < FIRST || t >= FIRST + TILES) {
                values += count_bits(masks[t]);
                continue;
            }
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; ++part) {
                constexpr uint64_t BITS = ~uint64_t(0) >> (64 - 4 * WIDTH);
                const uint64_t mask = masks[t] >> (4 * WIDTH * part) & BITS;
                w[(t - FIRST) * PARTS + part] = expand(values, mask);
                values += count_bits(mask);
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            int32_t four;
            memcpy(&four, x + n * x_stride + 4 * quad, sizeof four);
            const IntVec activations = set1(four);
#pragma GCC unroll 16
            for (int i = 0; i < TILES * PARTS; ++i) acc[i][n] = fma(w[i], activations, acc[i][n]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILES * PARTS; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
            store(sums + n * TILEMASK_BLOCK_ROWS + FIRST * TILEMASK_TILE_ROWS + i * WIDTH, acc[i][n]);
}

// All tiles of a block of TOTAL, as many at once as the registers hold.
template <int TOTAL, int N, int FIRST = 0>
void quadmask_passes(const uint64_t *masks, const int8_t *values, int64_t n_quads, const uint8_t *x, int64_t x_stride,
                     int32_t *sums) {
    if constexpr (FIRST < TOTAL) {
        constexpr int FITTING = QUADMASK_SUMS / (TILEMASK_PARTS * N), LEFT = TOTAL - FIRST;
        constexpr int MOST = FITTING >= 4 ? 4 : FITTING >= 2 ? 2 : 1, TILES = LEFT < MOST ? LEFT : MOST;
        quadmask_tiles<TOTAL, FIRST, TILES, N>(masks, values, n_quads, x, x_stride, sums);
        quadmask_passes<TOTAL, N, FIRST + TILES>(masks, values, n_quads, x, x_stride, sums);
    }
}

// A block of n_tiles tiles for n_tokens <= N tokens.
template <int N>
void quadmask_block(int64_t n_tiles, int64_t n_tokens, const uint64_t *masks, const int8_t *values, int64_t n_quads,
                    const uint8_t *x, int64_t x_stride, int32_t *sums) {
    if constexpr (N > 1)
        if (n_tokens < N) return quadmask_block<N - 1>(n_tiles, n_tokens, masks, values, n_quads, x, x_stride, sums);
    switch (n_tiles) {
        case 1:
            return quadmask_passes<1, N>(masks, values, n_quads, x, x_stride, sums);
        case 2:
            return quadmask_passes<2, N>(masks, values, n_quads, x, x_stride, sums);
        case 3:
            return quadmask_passes<3, N>(masks, values, n_quads, x, x_stride, sums);
        default:
            return quadmask_passes<4, N>(masks, values, n_quads, x, x_stride, sums);
    }
}

#ifdef __AMX_INT8__
// From so many tokens on AMX is faster than a vector instruction for each token and tile: 768x768, one thread, 4 tokens
// 14 us against 17, 8 tokens 21.
constexpr int64_t QUADMASK_AMX_TOKENS = 6;
#endif

struct Quadmask {
    using View = TileMaskView<QUADMASK_GROUP>;

    static View view(const uint8_t *index) { return View(index); }
    static const int32_t *row_sums(const View &view, const int8_t *values) {
        return reinterpret_cast<const int32_t *>(values + tilemask_n_weights(view.header->nnz));
    }
    static double flops(const View &view) { return double(view.header->out) * double(view.header->in) / 8; }

    static int64_t n_tiles(const View &, int64_t, int64_t) { return 1; }
    static int64_t at_once(int64_t n_tokens, int64_t) {
#ifdef __AMX_INT8__
        if (n_tokens >= QUADMASK_AMX_TOKENS) return n_tokens;
#endif
        return n_tokens < QUADMASK_MAX_TOKENS ? n_tokens : QUADMASK_MAX_TOKENS;
    }

    static void block(const View &view, const int8_t *all_values, int64_t block, int64_t n_tokens, const uint8_t *rows,
                      int64_t row_bytes, int32_t *sums) {
        const int64_t n_tiles = tilemask_n_tiles(view.header->out, block);
        const int64_t n_quads = tilemask_n_groups(QUADMASK_GROUP, view.header->in);
        const uint64_t *masks = view.masks_of(block);
        const int8_t *values = all_values + view.block_values[block];
#ifdef __AMX_INT8__
        if (n_tokens >= QUADMASK_AMX_TOKENS)
            return multiply_block_amx(n_tiles, n_tokens, masks, values, n_quads, rows, row_bytes, sums);
#endif
        quadmask_block<QUADMASK_MAX_TOKENS>(n_tiles, n_tokens, masks, values, n_quads, rows, row_bytes, sums);
    }

    struct Sums {
        int64_t row;
        IntVec of(const int32_t *sums) const { return load(sums + row); }
    };
    static Sums sums_of(const View &, int64_t row, int) { return {row % BLOCK_ROWS}; }
};

}  // namespace
