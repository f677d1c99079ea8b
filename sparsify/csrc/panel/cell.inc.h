// The innermost loops of the panel form: one cell (panel/format.h) times one tile of activations, sums in registers.
// g++ keeps an array in memory unless every index is constant: loops over them are unrolled.
//
// The 4 rows of a cell are multiplied together where the registers hold all their sums, else pairs of rows or single
// rows one after the other, over the same columns and values. A row's weights are added in the same order in either
// case, so that a token's result does not depend on the width of its tile. The types of weights, activations and sums
// come with functions of the same names (simd/*.h).
#pragma once

#include "panel/format.h"

namespace {

using namespace sparsify;

// 4 rows x V sums, V activations and a weight have to fit the registers.
constexpr int PANEL_FOUR_ROW_VECS = N_REGISTERS >= 32 ? 4 : 2;
// Vectors of tokens in the widest tile, if one row's sums leave half of the registers: 64 tokens, of which a block of
// 128 columns takes 32 KB; 32 with vectors of 4, as wider ones would be twice the code for as many loads. Past
// PANEL_FOUR_ROW_VECS fewer rows are multiplied together, in the end one: 8 vectors take 9 loads for 8 multiply-adds
// and share a broadcast and an address. AVX2, 128 tokens: 1.06x over tiles of 2 vectors at 50%, 1.15 to 1.2x from 70 to
// 95%.
constexpr int PANEL_TILE_VECS = WIDTH > 8 ? 64 / WIDTH : 8, PANEL_ROW_VECS = N_REGISTERS / 2;
constexpr int PANEL_MAX_VECS = PANEL_TILE_VECS < PANEL_ROW_VECS ? PANEL_TILE_VECS : PANEL_ROW_VECS;

// The share of kept weights from which columns are packed by pattern. A pattern saves loads where its rows are
// multiplied together; one row after the other, it only makes loops shorter. AVX2, 64 to 4096 tokens, without
// patterns: 1.02 to 1.15x at any sparsity; 16 tokens .94 to .98 at 50 and 80%, 1.2x at 90%. AVX-512: .87 to .95 at 50%,
// .94 to 1.05 at 80%, 1.0 to 1.1 at 90%, 1.01 to 1.19 at 95%.
constexpr double PANEL_PATTERN_DENSITY = WIDTH == 8 ? 2 : 0.15;

constexpr int PANEL_ALL_ROWS = 15;  // rows of a cell as bits

#define UNROLL _Pragma("GCC unroll 16")

// acc[row][v] += w * x[v] for those of ROWS that are in PATTERN, and one column. Moves past the values of PATTERN.
template <int V, int ROWS, int PATTERN, typename W, typename X, typename Sums>
__attribute__((always_inline)) inline void add_column(uint64_t column, const W *&values, const X *tile,
                                                      Sums (&acc)[PANEL_CELL_ROWS][V]) {
    const X *x = tile + (column & 255) * (V * WIDTH);
    asm("" : "+r"(x));  // one register: a multiply-add that adds two of them up takes two slots on Intel, up to 1.1x
#define ROW(R)                                                                                 \
    if constexpr (PATTERN >> R & ROWS >> R & 1) {                                              \
        const auto w = broadcast(values);                                                      \
        UNROLL for (int v = 0; v < V; ++v) acc[R][v] = fma(w, load(x + v * WIDTH), acc[R][v]); \
    }                                                                                          \
    values += PATTERN >> R & 1;
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

// n columns of each of PATTERNS. Moves past what it read.
template <int V, int ROWS, int... PATTERNS, typename W, typename X, typename Sums>
__attribute__((always_inline)) inline void add_columns(const uint8_t *&columns, const W *&values, const X *tile,
                                                       Sums (&acc)[PANEL_CELL_ROWS][V]) {
    int i = 0;
    if constexpr (ROWS == PANEL_ALL_ROWS) {
        const uint64_t read = read_columns<sizeof...(PATTERNS)>(columns);
        (add_column<V, ROWS, PATTERNS>(read >> (8 * i++), values, tile, acc), ...);
    } else {  // some of them, each by its own load: V multiply-adds hide it
        (add_column<V, ROWS, PATTERNS>(columns[i++], values, tile, acc), ...);
    }
    columns += sizeof...(PATTERNS);
}

// One run: n columns of each of its patterns. Moves past what it read.
template <int V, int ROWS, int... PATTERNS, typename W, typename X, typename Sums>
__attribute__((always_inline)) inline void add_run(int n, const uint8_t *&columns, const W *&values, const X *tile,
                                                   Sums (&acc)[PANEL_CELL_ROWS][V]) {
    // A row has three weights among the columns of triples and of pairs, and one among the others': few between two
    // looks at the loop's end.
    constexpr bool ONE_EACH = sizeof...(PATTERNS) == 1 || (((PATTERNS & -PATTERNS) == PATTERNS) && ...);
    constexpr int STEP = !ONE_EACH || ROWS == PANEL_ALL_ROWS ? 1 : (ROWS & -ROWS) == ROWS ? 4 : 2;
    if constexpr (STEP > 1)
        for (; n >= STEP; n -= STEP) {
            UNROLL for (int i = 0; i < STEP; ++i) add_columns<V, ROWS, PATTERNS...>(columns, values, tile, acc);
        }
    for (; n > 0; --n) add_columns<V, ROWS, PATTERNS...>(columns, values, tile, acc);
}

// Sums of integers are the same in any order.
template <typename S>
constexpr bool ANY_ORDER = false;
template <>
constexpr bool ANY_ORDER<int32_t> = true;

// The same with two sums a row, in turn: one vector of tokens alone would wait for its own additions.
template <int V, int ROWS, int... PATTERNS, typename W, typename X, typename Sums>
__attribute__((always_inline)) inline void add_run_in_two(int n, const uint8_t *&columns, const W *&values,
                                                          const X *tile, Sums (&a)[PANEL_CELL_ROWS][V],
                                                          Sums (&b)[PANEL_CELL_ROWS][V]) {
    for (; n > 1; n -= 2) {
        add_columns<V, ROWS, PATTERNS...>(columns, values, tile, a);
        add_columns<V, ROWS, PATTERNS...>(columns, values, tile, b);
    }
    if (n > 0) add_columns<V, ROWS, PATTERNS...>(columns, values, tile, a);
}

// sums[row][v] (+)= a cell's weights, for those of its 4 rows that are in ROWS, of [V * WIDTH] each. The block is
// summed on its own first: shorter chains of additions, smaller error. Moves past the cell.
template <int V, int ROWS, typename W, typename X, typename S>
__attribute__((always_inline)) inline void add_rows(PanelCell cell, const uint8_t *&columns, const W *&values,
                                                    const X *tile, S *sums, bool first) {
    using Sums = decltype(load(sums));
    Sums acc[PANEL_CELL_ROWS][V];
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3)
#define CLEAR(R) UNROLL for (int v = 0; v < V; ++v) acc[R][v] = Sums{};
    EACH_ROW(CLEAR)
#define FOUR(RUN) RUN[0], RUN[1], RUN[2], RUN[3]
    bool done = false;
    if constexpr (V == 1 && ROWS == PANEL_ALL_ROWS && ANY_ORDER<S>)
        if (cell.n_quad + cell.n_triple > 0) {
            done = true;
            Sums more[PANEL_CELL_ROWS][V];
            UNROLL for (int i = 0; i < PANEL_CELL_ROWS; ++i) more[i][0] = Sums{};
            add_run_in_two<V, ROWS, PANEL_QUADS[0]>(cell.n_quad, columns, values, tile, acc, more);
            add_run_in_two<V, ROWS, FOUR(PANEL_TRIPLES)>(cell.n_triple, columns, values, tile, acc, more);
            add_run_in_two<V, ROWS, FOUR(PANEL_PAIRS), PANEL_PAIRS[4], PANEL_PAIRS[5]>(cell.n_pair, columns, values,
                                                                                       tile, acc, more);
            add_run_in_two<V, ROWS, FOUR(PANEL_SINGLES)>(cell.n_single, columns, values, tile, acc, more);
            UNROLL for (int i = 0; i < PANEL_CELL_ROWS; ++i) acc[i][0] = add(acc[i][0], more[i][0]);
        }
    if (!done) {
        // Cells of few weights have nothing but singles: a row alone has no time for three empty loops.
        if (ROWS == PANEL_ALL_ROWS || cell.n_quad + cell.n_triple + cell.n_pair > 0) {
            add_run<V, ROWS, PANEL_QUADS[0]>(cell.n_quad, columns, values, tile, acc);
            add_run<V, ROWS, FOUR(PANEL_TRIPLES)>(cell.n_triple, columns, values, tile, acc);
            add_run<V, ROWS, FOUR(PANEL_PAIRS), PANEL_PAIRS[4], PANEL_PAIRS[5]>(cell.n_pair, columns, values, tile,
                                                                                acc);
        }
        add_run<V, ROWS, FOUR(PANEL_SINGLES)>(cell.n_single, columns, values, tile, acc);
    }
#undef FOUR
    const auto sums_of = [&](int r) { return sums + size_t(cell.rows[r]) * (V * WIDTH); };
    S *const to[PANEL_CELL_ROWS] = {sums_of(0), sums_of(1), sums_of(2), sums_of(3)};
    if (!first) {
#define ADD(R) \
    if constexpr (ROWS >> R & 1) UNROLL for (int v = 0; v < V; ++v) acc[R][v] = add(acc[R][v], load(to[R] + v * WIDTH));
        EACH_ROW(ADD)
    }
#define STORE(R) \
    if constexpr (ROWS >> R & 1) UNROLL for (int v = 0; v < V; ++v) store(to[R] + v * WIDTH, acc[R][v]);
    EACH_ROW(STORE)
#undef EACH_ROW
#undef CLEAR
#undef ADD
#undef STORE
}

// The rows of each of PARTS after those of the one before, over the same columns and values.
template <int V, int... PARTS, typename W, typename X, typename S>
__attribute__((always_inline)) inline void add_rows_in_turn(PanelCell cell, const uint8_t *&columns, const W *&values,
                                                            const X *tile, S *sums, bool first) {
    const uint8_t *const first_column = columns;
    const W *const first_value = values;
    ((columns = first_column, values = first_value, add_rows<V, PARTS>(cell, columns, values, tile, sums, first)), ...);
}

// sums[row][v] (+)= one cell. Moves past the cell.
template <int V, typename W, typename X, typename S>
__attribute__((always_inline)) inline void panel_cell(PanelCell cell, const uint8_t *&columns, const W *&values,
                                                      const X *tile, S *sums, bool first) {
    if constexpr (V <= PANEL_FOUR_ROW_VECS) {
        add_rows<V, PANEL_ALL_ROWS>(cell, columns, values, tile, sums, first);
    } else if constexpr (2 * V + 4 <= N_REGISTERS) {  // 7 vectors, AVX2: one row after the other 1.03 to 1.13x
        add_rows_in_turn<V, 3, 12>(cell, columns, values, tile, sums, first);
    } else {
        add_rows_in_turn<V, 1, 2, 4, 8>(cell, columns, values, tile, sums, first);
    }
}

#undef UNROLL

}  // namespace
