// The kernels of the panel form (panel.h), for the instruction set of the simd_*.h included before.
//
// One task is a tile of tokens and a range of bundles. The activations of the tile are transposed to
// [in_features][tokens], so that a weight meets V vectors of tokens; each (block, group) accumulates 4 rows x V vectors in
// registers, and every 16 rows are transposed back on the way out.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"
#include "panel.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

constexpr int PANEL_MAX_VECS = 4;

// acc[row][v] += w * x[v] for the rows of PATTERN, columns `columns[0..n)`; moves past what it read. Written with
// constant indices only, otherwise g++ keeps the accumulators in memory.
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
#define SINGLE(R)                                                                                                      \
    {                                                                                                                  \
        const float *x = tile + size_t(columns[R]) * (V * WIDTH);                                                      \
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

// tile[k][tokens] = x[tokens][k] for k < n, V * WIDTH tokens of which n_tokens exist; the others are 0.
template <int V, typename T>
void fill_tile(const T *x, int64_t x_stride, int64_t n_tokens, int64_t n, float *tile) {
    for (int v = 0; v < V; ++v) {
        const T *rows = x + v * WIDTH * x_stride;
        const int64_t here = n_tokens - v * WIDTH;
        for (int64_t k = 0; k < n; k += WIDTH) {
            const int width = n - k < WIDTH ? int(n - k) : WIDTH;
            Vec r[WIDTH];
            if (here >= WIDTH && width == WIDTH) {
#pragma GCC unroll 16
                for (int t = 0; t < WIDTH; ++t) r[t] = load(rows + t * x_stride + k);
            } else {
                for (int t = 0; t < WIDTH; ++t)
                    r[t] = t < here ? load_first(rows + t * x_stride + k, width) : zero();
            }
            transpose(r);
            float *to = tile + k * (V * WIDTH) + v * WIDTH;
            if (width == WIDTH) {
#pragma GCC unroll 16
                for (int i = 0; i < WIDTH; ++i) store(to + i * (V * WIDTH), r[i]);
            } else {
                for (int i = 0; i < width; ++i) store(to + i * (V * WIDTH), r[i]);
            }
        }
    }
}

// y[tokens][rows] = activation(sums[row][tokens] + bias), one bundle of rows of which n_rows exist.
template <int V, typename T>
void finish_bundle(const float *sums, const T *bias, T *y, int64_t y_stride, int64_t n_tokens, int64_t n_rows,
                   int activation) {
    for (int part = 0; part < PANEL_BUNDLE_ROWS / WIDTH; ++part) {
        const int64_t rows_here = n_rows - part * WIDTH;
        if (rows_here <= 0) return;
        const int width = rows_here < WIDTH ? int(rows_here) : WIDTH;
        const Vec b = bias ? load_first(bias + part * WIDTH, width) : zero();
        for (int v = 0; v < V; ++v) {
            Vec r[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i) r[i] = load(sums + ((part * WIDTH + i) * V + v) * WIDTH);
            transpose(r);
            const int64_t here = n_tokens - v * WIDTH;
            T *to = y + v * WIDTH * y_stride + part * WIDTH;
            if (here >= WIDTH && width == WIDTH && activation == SPARSIFY_NONE) {
#pragma GCC unroll 16
                for (int t = 0; t < WIDTH; ++t) store(to + t * y_stride, add(r[t], b));
            } else {
                for (int t = 0; t < WIDTH && t < here; ++t)
                    store_first(to + t * y_stride, activate(add(r[t], b), activation), width);
            }
        }
    }
}

struct PanelPlan {
    LinearCall call;
    PanelHeader header;
    PanelSections sections;
    int64_t n_vecs;            // vectors of tokens, spread evenly over the tiles
    int64_t n_tiles, n_parts;  // tiles of tokens, parts of the rows: a task is one of each
    int64_t windows_per_part;
};

template <int V, typename T>
int run_tile(const PanelPlan &plan, int64_t first_token, int64_t n_tokens, int64_t first_window, int64_t end_window) {
    const LinearCall &call = plan.call;
    const int64_t k_block = plan.header.k_block, window_rows = plan.header.window_rows;
    const int64_t tile_floats = (k_block + 1) * V * WIDTH;
    float *tile = static_cast<float *>(thread_scratch(
        size_t(tile_floats + (end_window - first_window) * window_rows * V * WIDTH) * sizeof(float)));
    if (!tile) return SPARSIFY_NO_MEMORY;
    float *const sums = tile + tile_floats;
    memset(tile + k_block * V * WIDTH, 0, V * WIDTH * sizeof(float));  // what padding columns refer to
    const T *x = static_cast<const T *>(call.x) + first_token * call.x_stride;
    T *y = static_cast<T *>(call.y) + first_token * call.y_stride;
    const T *bias = static_cast<const T *>(call.bias);

    for (int64_t block = 0; block < plan.sections.n_blocks; ++block) {
        const int64_t first = block * k_block, width = call.in - first < k_block ? call.in - first : k_block;
        fill_tile<V>(x + first, call.x_stride, n_tokens, width, tile);
        PanelStart start;
        memcpy(&start, call.index + sizeof(PanelHeader) + size_t(block * plan.sections.n_windows + first_window) * sizeof start, sizeof start);
        const T *values = static_cast<const T *>(call.values) + start.value;
        const uint8_t *columns = call.index + plan.sections.columns + start.column;
        const uint8_t *cells = call.index + plan.sections.cells + (block * plan.sections.padded_rows + first_window * window_rows) / PANEL_CELL_ROWS * sizeof(PanelCell);
        for (int64_t window = first_window; window < end_window; ++window) {
            const int64_t row = window * window_rows, left = plan.sections.padded_rows - row;
            const int64_t n_rows = left < window_rows ? left : window_rows;
            float *window_sums = sums + (window - first_window) * window_rows * V * WIDTH;
            for (int64_t i = 0; i < n_rows / PANEL_CELL_ROWS; ++i, cells += sizeof(PanelCell)) {
                PanelCell cell;
                memcpy(&cell, cells, sizeof cell);
                panel_cell<V>(cell, columns, values, tile, window_sums, block == 0);
            }
            if (block < plan.sections.n_blocks - 1) continue;
            for (int64_t r = 0; r < n_rows; r += PANEL_BUNDLE_ROWS)
                finish_bundle<V>(window_sums + r * V * WIDTH, bias ? bias + row + r : nullptr, y + row + r,
                                 call.y_stride, n_tokens, call.out - row - r, call.activation);
        }
    }
    return SPARSIFY_OK;
}

template <typename T>
int run_panel_task(const void *context, int64_t task) {
    const PanelPlan &plan = *static_cast<const PanelPlan *>(context);
    const int64_t tile = task % plan.n_tiles, part = task / plan.n_tiles;
    const int64_t first_vec = tile * plan.n_vecs / plan.n_tiles, end_vec = (tile + 1) * plan.n_vecs / plan.n_tiles;
    const int64_t first_token = first_vec * WIDTH;
    const int64_t n_tokens = (end_vec * WIDTH < plan.call.tokens ? end_vec * WIDTH : plan.call.tokens) - first_token;
    const int64_t first = part * plan.windows_per_part, end = first + plan.windows_per_part;
    const int64_t last = end < plan.sections.n_windows ? end : plan.sections.n_windows;
    switch (end_vec - first_vec) {
        case 1: return run_tile<1, T>(plan, first_token, n_tokens, first, last);
        case 2: return run_tile<2, T>(plan, first_token, n_tokens, first, last);
        case 3: return run_tile<3, T>(plan, first_token, n_tokens, first, last);
        default: return run_tile<4, T>(plan, first_token, n_tokens, first, last);
    }
}

template <typename T>
int linear_panel(const LinearCall &call) {
    PanelPlan plan;
    plan.call = call;
    memcpy(&plan.header, call.index, sizeof plan.header);
    if (plan.header.out != call.out || plan.header.in != call.in) return SPARSIFY_BAD_INDEX;
    plan.sections = panel_sections(call.out, call.in, plan.header.k_block, plan.header.window_rows);
    plan.n_vecs = (call.tokens + WIDTH - 1) / WIDTH;
    plan.n_tiles = (plan.n_vecs + PANEL_MAX_VECS - 1) / PANEL_MAX_VECS;
    const int n_threads = worthwhile_threads(2.0 * double(plan.header.nnz) * double(call.tokens), call.n_threads);
    const int64_t wanted_parts = (4 * n_threads + plan.n_tiles - 1) / plan.n_tiles;
    plan.windows_per_part = (plan.sections.n_windows + wanted_parts - 1) / wanted_parts;
    if (n_threads == 1 || plan.windows_per_part > 8) plan.windows_per_part = 8;
    plan.n_parts = (plan.sections.n_windows + plan.windows_per_part - 1) / plan.windows_per_part;
    return run_tasks(plan.n_tiles * plan.n_parts, n_threads, run_panel_task<T>, &plan);
}

}  // namespace
