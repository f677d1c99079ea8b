// A block of the form quadmask or pairmask times many tokens with AMX: 16 groups of a tile, expanded, are the rows of
// one register of weights, 16 tokens one of activations, and an instruction multiplies them. A row of a register is 64
// bytes: 64 inputs of int8 or 32 of bfloat16.
#pragma once

#include "tilemask/format.h"

namespace {

using namespace sparsify;

constexpr int64_t AMX_ROWS = 16, AMX_ROW_BYTES = 64;
constexpr int64_t AMX_REGISTER_BYTES = AMX_ROWS * AMX_ROW_BYTES;
constexpr int64_t AMX_CHUNK = 16;  // expanded registers of each tile at a time: 64 KB for four
constexpr int64_t AMX_SUMS_STRIDE = TILEMASK_BLOCK_ROWS * 4;

// The shapes of the registers: all of them full. What was there before, perhaps of another library, comes back.
struct AmxShapes {
    struct alignas(64) Config {
        uint8_t palette, start_row, unused[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Config before;

    AmxShapes() {
        Config full = {};
        full.palette = 1;
        for (int i = 0; i < 8; ++i) {
            full.row_bytes[i] = AMX_ROW_BYTES;
            full.rows[i] = AMX_ROWS;
        }
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" : : "m"(full));
    }
    ~AmxShapes() { asm volatile("ldtilecfg %0" : : "m"(before)); }
    AmxShapes(const AmxShapes &) = delete;
    AmxShapes &operator=(const AmxShapes &) = delete;
};

// The compiler does not know that registers are loaded from and stored to memory.
inline void amx_fence() { asm volatile("" : : : "memory"); }

// The intrinsics take the numbers of registers literally. Weights of one byte are int8, of two bfloat16.
#define AMX_DOT(TO, X, WEIGHTS)             \
    do {                                    \
        if constexpr (sizeof(W) == 1)       \
            _tile_dpbusd(TO, X, WEIGHTS);   \
        else                                \
            _tile_dpbf16ps(TO, X, WEIGHTS); \
    } while (0)

// Expands n_groups groups of TOTAL tiles: to[tile][group], with room for CHUNK registers of each tile. Moves past what
// it read.
template <int TOTAL, int64_t CHUNK, typename Mask, typename W>
void amx_expand(const Mask *&masks, const W *&values, int64_t n_groups, uint8_t *to) {
    for (int64_t group = 0; group < n_groups; ++group, masks += TOTAL)
#pragma GCC unroll 4
        for (int t = 0; t < TOTAL; ++t) {
            _mm512_store_si512(to + t * CHUNK * AMX_REGISTER_BYTES + group * AMX_ROW_BYTES, expand(values, masks[t]));
            values += count_bits(masks[t]);
        }
}

// sums of TOTAL tiles for 16 tokens, which stay in registers, while 16 groups after the other are expanded: twice as
// fast as what follows for as few tokens. x and sums are in bytes.
template <int TOTAL, typename Mask, typename W>
void amx_few_tokens(const Mask *masks, const W *values, int64_t n_groups, const uint8_t *x, int64_t x_stride,
                    uint8_t *sums) {
    alignas(64) uint8_t weights[2][TOTAL * AMX_REGISTER_BYTES];
    _tile_zero(0);
    if constexpr (TOTAL > 1) _tile_zero(1);
    if constexpr (TOTAL > 2) _tile_zero(2);
    if constexpr (TOTAL > 3) _tile_zero(3);
    for (int64_t group = 0; group < n_groups; group += AMX_ROWS, x += AMX_ROW_BYTES) {
        uint8_t *const to = weights[group / AMX_ROWS % 2];
        const int64_t here = n_groups - group < AMX_ROWS ? n_groups - group : AMX_ROWS;
        if (here < AMX_ROWS) memset(to, 0, TOTAL * AMX_REGISTER_BYTES);
        amx_expand<TOTAL, 1>(masks, values, here, to);
        amx_fence();
        _tile_loadd(4, x, x_stride);
        _tile_loadd(6, to, AMX_ROW_BYTES);
        AMX_DOT(0, 4, 6);
        if constexpr (TOTAL > 1) {
            _tile_loadd(7, to + AMX_REGISTER_BYTES, AMX_ROW_BYTES);
            AMX_DOT(1, 4, 7);
        }
        if constexpr (TOTAL > 2) {
            _tile_loadd(6, to + 2 * AMX_REGISTER_BYTES, AMX_ROW_BYTES);
            AMX_DOT(2, 4, 6);
        }
        if constexpr (TOTAL > 3) {
            _tile_loadd(7, to + 3 * AMX_REGISTER_BYTES, AMX_ROW_BYTES);
            AMX_DOT(3, 4, 7);
        }
    }
    _tile_stored(0, sums, AMX_SUMS_STRIDE);
    if constexpr (TOTAL > 1) _tile_stored(1, sums + 64, AMX_SUMS_STRIDE);
    if constexpr (TOTAL > 2) _tile_stored(2, sums + 128, AMX_SUMS_STRIDE);
    if constexpr (TOTAL > 3) _tile_stored(3, sums + 192, AMX_SUMS_STRIDE);
    amx_fence();
}

// sums (+)= 16 TOKENS tokens times TILES tiles, over n registers of inputs.
template <int TOKENS, int TILES, typename W>
void amx_multiply(const uint8_t *x, int64_t x_stride, const uint8_t *weights, int64_t n, uint8_t *sums, bool first) {
    uint8_t *const lower = sums + AMX_ROWS * AMX_SUMS_STRIDE;
    const uint8_t *const more_x = x + AMX_ROWS * x_stride;
    const uint8_t *const more_weights = weights + AMX_CHUNK * AMX_REGISTER_BYTES;
    amx_fence();
    if (first) {
        _tile_zero(0);
        if constexpr (TILES > 1) _tile_zero(1);
        if constexpr (TOKENS > 1) _tile_zero(2);
        if constexpr (TOKENS > 1 && TILES > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, AMX_SUMS_STRIDE);
        if constexpr (TILES > 1) _tile_loadd(1, sums + 64, AMX_SUMS_STRIDE);
        if constexpr (TOKENS > 1) _tile_loadd(2, lower, AMX_SUMS_STRIDE);
        if constexpr (TOKENS > 1 && TILES > 1) _tile_loadd(3, lower + 64, AMX_SUMS_STRIDE);
    }
    for (int64_t i = 0; i < n; ++i) {
        _tile_loadd(4, x + i * AMX_ROW_BYTES, x_stride);
        _tile_loadd(6, weights + i * AMX_REGISTER_BYTES, AMX_ROW_BYTES);
        AMX_DOT(0, 4, 6);
        if constexpr (TILES > 1) {
            _tile_loadd(7, more_weights + i * AMX_REGISTER_BYTES, AMX_ROW_BYTES);
            AMX_DOT(1, 4, 7);
        }
        if constexpr (TOKENS > 1) {
            _tile_loadd(5, more_x + i * AMX_ROW_BYTES, x_stride);
            AMX_DOT(2, 5, 6);
            if constexpr (TILES > 1) AMX_DOT(3, 5, 7);
        }
    }
    _tile_stored(0, sums, AMX_SUMS_STRIDE);
    if constexpr (TILES > 1) _tile_stored(1, sums + 64, AMX_SUMS_STRIDE);
    if constexpr (TOKENS > 1) _tile_stored(2, lower, AMX_SUMS_STRIDE);
    if constexpr (TOKENS > 1 && TILES > 1) _tile_stored(3, lower + 64, AMX_SUMS_STRIDE);
    amx_fence();
}

#undef AMX_DOT

template <int TOTAL, typename Mask, typename W>
void multiply_tiles_amx(int64_t n_tokens, const Mask *masks, const W *values, int64_t n_groups, const uint8_t *x,
                        int64_t x_stride, uint8_t *sums) {
    if (n_tokens <= AMX_ROWS) return amx_few_tokens<TOTAL>(masks, values, n_groups, x, x_stride, sums);
    constexpr int64_t GROUPS = AMX_CHUNK * AMX_ROWS;
    alignas(64) uint8_t weights[TOTAL * AMX_CHUNK * AMX_REGISTER_BYTES];
    for (int64_t group = 0; group < n_groups || group == 0; group += GROUPS, x += AMX_CHUNK * AMX_ROW_BYTES) {
        const int64_t here = n_groups - group < GROUPS ? n_groups - group : GROUPS,
                      n = (here + AMX_ROWS - 1) / AMX_ROWS;
        amx_expand<TOTAL, AMX_CHUNK>(masks, values, here, weights);
        for (int t = 0; t < TOTAL; ++t)
            memset(weights + (t * AMX_CHUNK * AMX_ROWS + here) * AMX_ROW_BYTES, 0,
                   size_t((n * AMX_ROWS - here) * AMX_ROW_BYTES));
        for (int tile = 0; tile < TOTAL; tile += 2)
            for (int64_t token = 0; token < n_tokens; token += 2 * AMX_ROWS) {
                const bool two_tiles = tile + 1 < TOTAL, many = n_tokens - token > AMX_ROWS;
                const auto multiply = two_tiles ? (many ? amx_multiply<2, 2, W> : amx_multiply<1, 2, W>)
                                                : (many ? amx_multiply<2, 1, W> : amx_multiply<1, 1, W>);
                multiply(x + token * x_stride, x_stride, weights + tile * AMX_CHUNK * AMX_REGISTER_BYTES, n,
                         sums + token * AMX_SUMS_STRIDE + tile * 64, group == 0);
            }
    }
}

// sums[token][row of the block], int32 or float32; x and sums have whole registers of tokens, 16 each. Rows of x are
// x_stride bytes apart and zero from the last input to the end of a register.
template <typename Mask, typename W>
void multiply_block_amx(int64_t n_tiles, int64_t n_tokens, const Mask *masks, const W *values, int64_t n_groups,
                        const uint8_t *x, int64_t x_stride, void *to) {
    const AmxShapes shapes;
    uint8_t *const sums = static_cast<uint8_t *>(to);
    switch (n_tiles) {
        case 1:
            return multiply_tiles_amx<1>(n_tokens, masks, values, n_groups, x, x_stride, sums);
        case 2:
            return multiply_tiles_amx<2>(n_tokens, masks, values, n_groups, x, x_stride, sums);
        case 3:
            return multiply_tiles_amx<3>(n_tokens, masks, values, n_groups, x, x_stride, sums);
        default:
            return multiply_tiles_amx<4>(n_tokens, masks, values, n_groups, x, x_stride, sums);
    }
}

}  // namespace
