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
                                                        const float *tile, Vec (&acc)[PANEL_GROUP_ROWS][V]) {
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

// sums[row][v] (+)= one block of one group; `sums` is [4][V * WIDTH]. The block is summed on its own first: shorter
// chains of additions, smaller error.
template <int V, typename T>
__attribute__((always_inline)) inline void panel_cell(const uint8_t *counts, const uint8_t *&columns, const T *&values,
                                                      const float *tile, float *sums, bool first) {
    Vec acc[PANEL_GROUP_ROWS][V];
#define EACH(DO) DO(0, 0) DO(0, 1) DO(0, 2) DO(0, 3) DO(1, 0) DO(1, 1) DO(1, 2) DO(1, 3)                               \
                 DO(2, 0) DO(2, 1) DO(2, 2) DO(2, 3) DO(3, 0) DO(3, 1) DO(3, 2) DO(3, 3)
#define CLEAR(R, I) if constexpr (I < V) acc[R][I] = zero();
    EACH(CLEAR)
#define PATTERN(P) pattern_loop<V, P>(counts[P - 1], columns, values, tile, acc);
    PATTERN(1) PATTERN(2) PATTERN(3) PATTERN(4) PATTERN(5) PATTERN(6) PATTERN(7) PATTERN(8)
    PATTERN(9) PATTERN(10) PATTERN(11) PATTERN(12) PATTERN(13) PATTERN(14) PATTERN(15)
#undef PATTERN
    if (!first) {
#define ADD(R, I) if constexpr (I < V) acc[R][I] = add(acc[R][I], load(sums + (R * V + I) * WIDTH));
        EACH(ADD)
    }
#define STORE(R, I) if constexpr (I < V) store(sums + (R * V + I) * WIDTH, acc[R][I]);
    EACH(STORE)
#undef EACH
#undef CLEAR
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
    int64_t n_tiles, n_parts;  // tiles of tokens, parts of the rows: a task is one of each
    int64_t n_vecs;            // vectors of tokens, spread evenly over the tiles
    int64_t bundles_per_part;
};

template <int V, typename T>
int run_tile(const PanelPlan &plan, int64_t first_token, int64_t n_tokens, int64_t first_bundle, int64_t end_bundle) {
    const LinearCall &call = plan.call;
    const int64_t k_block = plan.header.k_block;
    const int64_t tile_floats = k_block * V * WIDTH;
    float *tile = static_cast<float *>(thread_scratch(
        size_t(tile_floats + (end_bundle - first_bundle) * PANEL_BUNDLE_ROWS * V * WIDTH) * sizeof(float)));
    if (!tile) return SPARSIFY_NO_MEMORY;
    float *sums = tile + tile_floats;
    const T *x = static_cast<const T *>(call.x) + first_token * call.x_stride;
    T *y = static_cast<T *>(call.y) + first_token * call.y_stride;
    const T *bias = static_cast<const T *>(call.bias);

    for (int64_t block = 0; block < plan.sections.n_blocks; ++block) {
        const int64_t first = block * k_block, width = call.in - first < k_block ? call.in - first : k_block;
        fill_tile<V>(x + first, call.x_stride, n_tokens, width, tile);
        int64_t number = block * plan.sections.n_bundles + first_bundle;
        PanelStart start;
        memcpy(&start, call.index + sizeof(PanelHeader) + size_t(number) * sizeof start, sizeof start);
        const T *values = static_cast<const T *>(call.values) + start.value;
        const uint8_t *columns = call.index + plan.sections.columns + start.column;
        const uint8_t *counts = call.index + plan.sections.counts + number * (PANEL_BUNDLE_GROUPS * 16);
        for (int64_t bundle = first_bundle; bundle < end_bundle; ++bundle) {
            float *bundle_sums = sums + (bundle - first_bundle) * PANEL_BUNDLE_ROWS * V * WIDTH;
            for (int group = 0; group < PANEL_BUNDLE_GROUPS; ++group, counts += 16)
                panel_cell<V>(counts, columns, values, tile, bundle_sums + group * PANEL_GROUP_ROWS * V * WIDTH,
                              block == 0);
            if (block == plan.sections.n_blocks - 1) {
                const int64_t row = bundle * PANEL_BUNDLE_ROWS;
                finish_bundle<V>(bundle_sums, bias ? bias + row : nullptr, y + row, call.y_stride, n_tokens,
                                 call.out - row, call.activation);
            }
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
    const int64_t first_bundle = part * plan.bundles_per_part;
    const int64_t end = first_bundle + plan.bundles_per_part;
    const int64_t end_bundle = end < plan.sections.n_bundles ? end : plan.sections.n_bundles;
    switch (end_vec - first_vec) {
        case 1: return run_tile<1, T>(plan, first_token, n_tokens, first_bundle, end_bundle);
        case 2: return run_tile<2, T>(plan, first_token, n_tokens, first_bundle, end_bundle);
        case 3: return run_tile<3, T>(plan, first_token, n_tokens, first_bundle, end_bundle);
        default: return run_tile<4, T>(plan, first_token, n_tokens, first_bundle, end_bundle);
    }
}

template <typename T>
int linear_panel(const LinearCall &call) {
    PanelPlan plan;
    plan.call = call;
    memcpy(&plan.header, call.index, sizeof plan.header);
    if (plan.header.out != call.out || plan.header.in != call.in) return SPARSIFY_BAD_INDEX;
    plan.sections = panel_sections(call.out, call.in, plan.header.k_block);
    plan.n_vecs = (call.tokens + WIDTH - 1) / WIDTH;
    plan.n_tiles = (plan.n_vecs + PANEL_MAX_VECS - 1) / PANEL_MAX_VECS;
    const int n_threads = worthwhile_threads(2.0 * double(plan.header.nnz) * double(call.tokens), call.n_threads);
    const int64_t wanted_parts = (4 * n_threads + plan.n_tiles - 1) / plan.n_tiles;
    plan.bundles_per_part = (plan.sections.n_bundles + wanted_parts - 1) / wanted_parts;
    if (n_threads == 1 || plan.bundles_per_part > 64) plan.bundles_per_part = 64;
    plan.n_parts = (plan.sections.n_bundles + plan.bundles_per_part - 1) / plan.bundles_per_part;
    return run_tasks(plan.n_tiles * plan.n_parts, n_threads, run_panel_task<T>, &plan);
}

}  // namespace
