// The innermost loops of the panel form: one cell (panel.h) times one tile of activations, 4 rows x V vectors of sums
// in registers. Everything is written with constant indices: g++ keeps arrays in memory that a loop indexes.
#pragma once

#include "common.h"
#include "panel.h"

namespace {

using namespace sparsify;

// One run: acc[row][v] += w * x[v] for the rows of PATTERN and the next n columns. Moves past what it read.
template <int V, int PATTERN, typename T>
__attribute__((always_inline)) inline void pattern_loop(int n, const uint8_t *&columns, const T *&values,
                                                        const float *tile, Vec (&acc)[PANEL_CELL_ROWS][V]) {
    for (; n > 0; --n) {
        const float *x = tile + size_t(*columns++) * (V * WIDTH);
#define ROW(R)                                                                                                         \
    if (PATTERN >> R & 1) {                                                                                            \
        const Vec w = broadcast(values++);                                                                             \
        acc[R][0] = fma(w, load(x), acc[R][0]);                                                                        \
        if constexpr (V > 1) acc[R][1] = fma(w, load(x + 1 * WIDTH), acc[R][1]);                                       \
        if constexpr (V > 2) acc[R][2] = fma(w, load(x + 2 * WIDTH), acc[R][2]);                                       \
        if constexpr (V > 3) acc[R][3] = fma(w, load(x + 3 * WIDTH), acc[R][3]);                                       \
    }
        ROW(0) ROW(1) ROW(2) ROW(3)
#undef ROW
    }
}

// sums[row][v] (+)= one cell, for its 4 rows of [V * WIDTH]. The block is summed on its own first: shorter chains of
// additions, smaller error.
template <int V, typename T>
__attribute__((always_inline)) inline void panel_cell(PanelCell cell, const uint8_t *&columns, const T *&values,
                                                      const float *tile, float *sums, bool first) {
    Vec acc[PANEL_CELL_ROWS][V];
#define EACH_VEC(DO, R)                                                                                                \
    DO(R, 0)                                                                                                           \
    if constexpr (V > 1) DO(R, 1)                                                                                      \
    if constexpr (V > 2) DO(R, 2)                                                                                      \
    if constexpr (V > 3) DO(R, 3)
#define EACH(DO) EACH_VEC(DO, 0) EACH_VEC(DO, 1) EACH_VEC(DO, 2) EACH_VEC(DO, 3)
#define CLEAR(R, I) acc[R][I] = zero();
    EACH(CLEAR)
    pattern_loop<V, 15>(cell.n_quad, columns, values, tile, acc);
    pattern_loop<V, PANEL_TRIPLES[0]>(cell.n_triple, columns, values, tile, acc);
    pattern_loop<V, PANEL_TRIPLES[1]>(cell.n_triple, columns, values, tile, acc);
    pattern_loop<V, PANEL_TRIPLES[2]>(cell.n_triple, columns, values, tile, acc);
    pattern_loop<V, PANEL_TRIPLES[3]>(cell.n_triple, columns, values, tile, acc);
    pattern_loop<V, PANEL_PAIRS[0]>(cell.n_pair, columns, values, tile, acc);
    pattern_loop<V, PANEL_PAIRS[1]>(cell.n_pair, columns, values, tile, acc);
    pattern_loop<V, PANEL_PAIRS[2]>(cell.n_pair, columns, values, tile, acc);
    pattern_loop<V, PANEL_PAIRS[3]>(cell.n_pair, columns, values, tile, acc);
    pattern_loop<V, PANEL_PAIRS[4]>(cell.n_pair, columns, values, tile, acc);
    pattern_loop<V, PANEL_PAIRS[5]>(cell.n_pair, columns, values, tile, acc);
    for (int n = cell.n_single; n > 0; --n) {
        uint32_t four;  // columns in one load: what is short here are loads
        memcpy(&four, columns, sizeof four);
#define SINGLE(R)                                                                                                      \
    {                                                                                                                  \
        const float *x = tile + size_t(four >> 8 * R & 255) * (V * WIDTH);                                             \
        const Vec w = broadcast(values + R);                                                                           \
        EACH_VEC(MULTIPLY, R)                                                                                          \
    }
#define MULTIPLY(R, I) acc[R][I] = fma(w, load(x + I * WIDTH), acc[R][I]);
        SINGLE(0) SINGLE(1) SINGLE(2) SINGLE(3)
        columns += PANEL_CELL_ROWS;
        values += PANEL_CELL_ROWS;
    }
    float *to[PANEL_CELL_ROWS];
#define ADDRESS(R) to[R] = sums + size_t(cell.rows[R]) * (V * WIDTH);
    ADDRESS(0) ADDRESS(1) ADDRESS(2) ADDRESS(3)
    if (!first) {
#define ADD(R, I) acc[R][I] = add(acc[R][I], load(to[R] + I * WIDTH));
        EACH(ADD)
    }
#define STORE(R, I) store(to[R] + I * WIDTH, acc[R][I]);
    EACH(STORE)
#undef EACH_VEC
#undef EACH
#undef CLEAR
#undef SINGLE
#undef MULTIPLY
#undef ADDRESS
#undef ADD
#undef STORE
}

}  // namespace
