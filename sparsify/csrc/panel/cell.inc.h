// The innermost loops of the panel form: one cell (panel/format.h) times one tile of activations, 4 rows x V vectors of
// sums in registers. The types of weights, activations and sums come with functions of the same names (simd/*.h).
// Everything is written with constant indices: g++ keeps arrays in memory that a loop indexes.
#pragma once

#include "panel/format.h"

namespace {

using namespace sparsify;

// acc[row][v] += w * x[v] for the rows of PATTERN and one column. Moves past the values it read.
template <int V, int PATTERN, typename W, typename X, typename Sums>
__attribute__((always_inline)) inline void add_column(uint64_t column, const W *&values, const X *tile,
                                                      Sums (&acc)[PANEL_CELL_ROWS][V]) {
    const X *x = tile + (column & 255) * (V * WIDTH);
#define ROW(R)                                                                   \
    if (PATTERN >> R & 1) {                                                      \
        const auto w = broadcast(values++);                                      \
        acc[R][0] = fma(w, load(x), acc[R][0]);                                  \
        if constexpr (V > 1) acc[R][1] = fma(w, load(x + 1 * WIDTH), acc[R][1]); \
        if constexpr (V > 2) acc[R][2] = fma(w, load(x + 2 * WIDTH), acc[R][2]); \
        if constexpr (V > 3) acc[R][3] = fma(w, load(x + 3 * WIDTH), acc[R][3]); \
    }
    ROW(0) ROW(1) ROW(2) ROW(3)
#undef ROW
}

// N columns as one number, first column lowest: loads are what a kernel is short of.
template <int N>
__attribute__((always_inline)) inline uint64_t read_columns(const uint8_t *columns) {
    static_assert(N == 1 || N == 4 || N == 6, "the patterns of a run");
    if constexpr (N == 1) return *columns;
    uint32_t four;
    memcpy(&four, columns, sizeof four);
    return N == 4 ? four : four | uint64_t(columns[4]) << 32 | uint64_t(columns[5]) << 40;
}

// One run: n columns of each of its patterns. Moves past what it read.
template <int V, int... PATTERNS, typename W, typename X, typename Sums>
__attribute__((always_inline)) inline void add_run(int n, const uint8_t *&columns, const W *&values, const X *tile,
                                                   Sums (&acc)[PANEL_CELL_ROWS][V]) {
    for (; n > 0; --n) {
        const uint64_t read = read_columns<sizeof...(PATTERNS)>(columns);
        columns += sizeof...(PATTERNS);
        int i = 0;
        (add_column<V, PATTERNS>(read >> (8 * i++), values, tile, acc), ...);
    }
}

// sums[row][v] (+)= one cell, for its 4 rows of [V * WIDTH]. The block is summed on its own first: shorter chains of
// additions, smaller error.
template <int V, typename W, typename X, typename S>
__attribute__((always_inline)) inline void panel_cell(PanelCell cell, const uint8_t *&columns, const W *&values,
                                                      const X *tile, S *sums, bool first) {
    using Sums = decltype(load(sums));
    Sums acc[PANEL_CELL_ROWS][V];
#define EACH_VEC(DO, R)           \
    DO(R, 0)                      \
    if constexpr (V > 1) DO(R, 1) \
    if constexpr (V > 2) DO(R, 2) \
    if constexpr (V > 3) DO(R, 3)
#define EACH(DO) EACH_VEC(DO, 0) EACH_VEC(DO, 1) EACH_VEC(DO, 2) EACH_VEC(DO, 3)
#define CLEAR(R, I) acc[R][I] = Sums{};
    EACH(CLEAR)
#define FOUR(RUN) RUN[0], RUN[1], RUN[2], RUN[3]
    add_run<V, PANEL_QUADS[0]>(cell.n_quad, columns, values, tile, acc);
    add_run<V, FOUR(PANEL_TRIPLES)>(cell.n_triple, columns, values, tile, acc);
    add_run<V, FOUR(PANEL_PAIRS), PANEL_PAIRS[4], PANEL_PAIRS[5]>(cell.n_pair, columns, values, tile, acc);
    add_run<V, FOUR(PANEL_SINGLES)>(cell.n_single, columns, values, tile, acc);
#undef FOUR
    const auto sums_of = [&](int r) { return sums + size_t(cell.rows[r]) * (V * WIDTH); };
    S *const to[PANEL_CELL_ROWS] = {sums_of(0), sums_of(1), sums_of(2), sums_of(3)};
    if (!first) {
#define ADD(R, I) acc[R][I] = add(acc[R][I], load(to[R] + I * WIDTH));
        EACH(ADD)
    }
#define STORE(R, I) store(to[R] + I * WIDTH, acc[R][I]);
    EACH(STORE)
#undef EACH_VEC
#undef EACH
#undef CLEAR
#undef ADD
#undef STORE
}

}  // namespace
