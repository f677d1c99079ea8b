// The forms quadsteps and widesteps (quadsteps/format.h) for the instruction set of the simd/*.h included before.
#pragma once

#include "few_quantized.inc.h"
#include "quadsteps/format.h"

namespace {

using namespace sparsify;

// sums[token][lane of the block] of one tile for N tokens, input by input.
template <int N>
[[maybe_unused]] void steps_one_by_one(const QuadstepsView &view, const int8_t *values, int64_t tile, const uint8_t *x,
                                       int64_t x_stride, int32_t *sums) {
    for (int n = 0; n < N; ++n, x += x_stride, sums += QUADSTEPS_BLOCK_ROWS) {
        int32_t *const lanes = sums + tile % QUADSTEPS_BLOCK_TILES * QUADSTEPS_LANES;
        memset(lanes, 0, QUADSTEPS_LANES * sizeof *lanes);
        for (int64_t step = view.tile_steps[tile]; step < view.tile_steps[tile + 1]; ++step) {
            const uint8_t *inputs = view.inputs + step * QUADSTEPS_BYTES, *window = x + view.starts[step];
            const int8_t *weights = values + step * QUADSTEPS_BYTES;
            for (int i = 0; i < QUADSTEPS_BYTES; ++i) {
                if (inputs[i] == QUADSTEPS_EMPTY) continue;
                const int32_t byte = BYTE_OFFSET ? int8_t(window[inputs[i]]) : window[inputs[i]];
                lanes[i / QUADSTEPS_TAKEN] += weights[i] * byte;
            }
        }
    }
}

#ifdef __AVX512VBMI__

// A step is loaded once for so many tokens, whose sums fill half of the registers.
constexpr int QUADSTEPS_MAX_TOKENS = 16, QUADSTEPS_FEW_TOKENS = 8;
// The tokens of a pass stay in the L1 cache: fewer than the most for many inputs.
constexpr int64_t QUADSTEPS_PASS_BYTES = 32 * 1024;

// sums[token][lane of the block] of one tile for N tokens. With few tokens steps take turns with several sums, as an
// addition waits for the one before.
template <int N, bool WIDE>
void quadsteps_tile(const QuadstepsView &view, const int8_t *values, int64_t tile, const uint8_t *x, int64_t x_stride,
                    int32_t *sums) {
    constexpr int TURNS = N <= 2 ? 4 : N <= 4 ? 2 : 1;
    IntVec acc[TURNS][N] = {};
    const auto take = [&](IntVec(&to)[N], int64_t step) __attribute__((always_inline)) {
        const IntVec inputs = _mm512_loadu_si512(view.inputs + step * QUADSTEPS_BYTES);
        const IntVec weights = _mm512_loadu_si512(values + step * QUADSTEPS_BYTES);
        const uint8_t *window = x + view.starts[step];
        [[maybe_unused]] const __mmask64 upper = _mm512_movepi8_mask(inputs);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            const auto part = [&](int i) { return _mm512_loadu_si512(window + 64 * i); };
            IntVec chosen;
            if constexpr (WIDE)
                chosen = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part(0), inputs, part(1)),
                                                _mm512_permutex2var_epi8(part(2), inputs, part(3)));
            else
                chosen = _mm512_permutexvar_epi8(inputs, part(0));
            to[n] = fma(weights, chosen, to[n]);
            window += x_stride;
        }
    };
    int64_t step = view.tile_steps[tile];
    const int64_t end = view.tile_steps[tile + 1];
    for (; step + TURNS <= end; step += TURNS)
#pragma GCC unroll 4
        for (int turn = 0; turn < TURNS; ++turn) take(acc[turn], step + turn);
    for (; step < end; ++step) take(acc[0], step);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        IntVec total = acc[0][n];
#pragma GCC unroll 4
        for (int turn = 1; turn < TURNS; ++turn) total = add(total, acc[turn][n]);
        store(sums + n * QUADSTEPS_BLOCK_ROWS + tile % QUADSTEPS_BLOCK_TILES * QUADSTEPS_LANES, total);
    }
}

#elif defined(SIMD_NEON)

// A window fills four registers, the weights and inputs of a step eight, the sums of a token four.
constexpr int QUADSTEPS_MAX_TOKENS = 4, QUADSTEPS_FEW_TOKENS = 4;
constexpr int64_t QUADSTEPS_PASS_BYTES = 32 * 1024;

// The same: a shuffle looks its 16 bytes up in all four registers of the window.
template <int N, bool WIDE>
void quadsteps_tile(const QuadstepsView &view, const int8_t *values, int64_t tile, const uint8_t *x, int64_t x_stride,
                    int32_t *sums) {
    if constexpr (WIDE) return steps_one_by_one<N>(view, values, tile, x, x_stride, sums);
    IntVec acc[N][4] = {};
    const int64_t end = view.tile_steps[tile + 1];
    for (int64_t step = view.tile_steps[tile]; step < end; ++step) {
        const uint8_t *const inputs = view.inputs + step * QUADSTEPS_BYTES, *window = x + view.starts[step];
        const int8_t *const weights = values + step * QUADSTEPS_BYTES;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const uint8x16x4_t bytes = {
                {vld1q_u8(window), vld1q_u8(window + 16), vld1q_u8(window + 32), vld1q_u8(window + 48)}};
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const uint8x16_t chosen = vqtbl4q_u8(bytes, vld1q_u8(inputs + 16 * i));
                const IntVec four_rows = vreinterpretq_s32_s8(vld1q_s8(weights + 16 * i));
                acc[n][i] = fma(four_rows, vreinterpretq_s32_u8(chosen), acc[n][i]);
            }
            window += x_stride;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            store(sums + n * QUADSTEPS_BLOCK_ROWS + tile % QUADSTEPS_BLOCK_TILES * QUADSTEPS_LANES + 4 * i, acc[n][i]);
}

#else

constexpr int QUADSTEPS_MAX_TOKENS = 1, QUADSTEPS_FEW_TOKENS = 1;
constexpr int64_t QUADSTEPS_PASS_BYTES = 0;

template <int N, bool WIDE>
void quadsteps_tile(const QuadstepsView &view, const int8_t *values, int64_t tile, const uint8_t *x, int64_t x_stride,
                    int32_t *sums) {
    steps_one_by_one<N>(view, values, tile, x, x_stride, sums);
}

#endif

constexpr int64_t QUADSTEPS_CACHED_BYTES = 1024 * 1024;

template <int N, bool WIDE>
void quadsteps_block(const QuadstepsView &view, const int8_t *values, int64_t block, int64_t n_tokens, const uint8_t *x,
                     int64_t x_stride, int32_t *sums) {
    if constexpr (N > 1)
        if (n_tokens < N) return quadsteps_block<N - 1, WIDE>(view, values, block, n_tokens, x, x_stride, sums);
    const int64_t n_tiles = quadsteps_n_tiles(view.header->out), first = block * QUADSTEPS_BLOCK_TILES;
    for (int64_t tile = first; tile < first + QUADSTEPS_BLOCK_TILES && tile < n_tiles; ++tile)
        quadsteps_tile<N, WIDE>(view, values, tile, x, x_stride, sums);
}

template <bool WIDE>
struct Steps {
    using View = QuadstepsView;

    static View view(const uint8_t *index) { return quadsteps_view(index); }
    static const int32_t *row_sums(const View &view, const int8_t *values) {
        return reinterpret_cast<const int32_t *>(values + int64_t(view.header->n_steps) * QUADSTEPS_BYTES);
    }
    static double flops(const View &view) { return double(view.header->n_steps) * QUADSTEPS_BYTES / 4; }

    // A thread that reads all weights for some tokens finds them in its L2 cache, and shares no line of y with others.
    static int64_t n_tiles(const View &view, int64_t n_tokens, int64_t n_threads) {
        const bool cached = int64_t(view.header->n_steps) * 2 * QUADSTEPS_BYTES <= QUADSTEPS_CACHED_BYTES;
        return cached && n_tokens >= n_threads * QUADSTEPS_FEW_TOKENS ? n_threads : 1;
    }

    // Passes of equal size.
    static int64_t at_once(int64_t n_tokens, int64_t row_bytes) {
        const int64_t fitting = QUADSTEPS_PASS_BYTES / row_bytes;
        const int64_t most = fitting > QUADSTEPS_MAX_TOKENS   ? QUADSTEPS_MAX_TOKENS
                             : fitting > QUADSTEPS_FEW_TOKENS ? fitting
                                                              : QUADSTEPS_FEW_TOKENS;
        const int64_t n_passes = (n_tokens + most - 1) / most;
        return (n_tokens + n_passes - 1) / n_passes;
    }
    static void block(const View &view, const int8_t *values, int64_t block, int64_t n_tokens, const uint8_t *rows,
                      int64_t row_bytes, int32_t *sums) {
        quadsteps_block<QUADSTEPS_MAX_TOKENS, WIDE>(view, values, block, n_tokens, rows, row_bytes, sums);
    }

    struct Sums {
        Lanes lanes;
        IntVec of(const int32_t *sums) const { return pick(sums, lanes); }
    };
    static Sums sums_of(const View &view, int64_t row, int width) { return {load_lanes(view.lanes + row, width)}; }
};
using Quadsteps = Steps<false>;
using Widesteps = Steps<true>;

}  // namespace
