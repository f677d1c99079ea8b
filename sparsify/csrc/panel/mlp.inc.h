// Two linear layers of the panel form (panel/format.h) with an activation between, as one kernel: a tile of tokens goes
// through both, and what is between never leaves the caches. Layers of few features gain most: much of their time goes
// into transposing, writing and reading the activations between.
//
// A task is a tile. A chunk of the first layer's rows is summed and activated at a time, which makes rows of the second
// layer's tile; the blocks of columns that are then whole are added to the second layer's sums, for all of its rows.
// Every sum is of the same numbers in the same order as in two calls, so that the outputs are the same bits.
#pragma once

#include "panel/kernel.inc.h"

namespace {

using namespace sparsify;

// Of the first layer at once: sums and activations of so many rows stay in the L2 cache.
constexpr int64_t MLP_CHUNK_ROWS = 512;

struct MlpPlan {
    PanelPlan first, second;
    Spread tiles;
    int64_t chunk_windows;
    bool far;         // x and y lie beyond the L2 cache
    int64_t n_slots;  // blocks of the second layer's columns that are kept: block b lies in slot b % n_slots
};

// What a thread has of a tile.
struct MlpTile {
    int64_t first_token, n_tokens;
    float *x, *sums, *between, *y_sums;
};

// a as two calls would pass it on: rounded to T.
template <typename T>
inline Vec rounded(Vec a) {
    if constexpr (sizeof(T) == sizeof(float)) return a;
    T passed[WIDTH];
    store(passed, a);
    return load(passed);
}

// The activated sums of one window of the first layer, into the slots.
template <int V, typename T>
void activate_window(const MlpPlan &plan, const MlpTile &tile, int64_t row, const float *sums) {
    const LinearCall &call = plan.first.call;
    const T *bias = static_cast<const T *>(call.bias);
    const int64_t k_block = plan.second.header.k_block, left = call.out - row;
    const int64_t n_rows = left < plan.first.header.window_rows ? left : plan.first.header.window_rows;
    for (int64_t i = 0; i < n_rows; ++i) {
        const int64_t slot = (row + i) / k_block % plan.n_slots, place = (row + i) % k_block;
        float *to = tile.between + (slot * (k_block + 1) + place) * V * WIDTH;
        const Vec b = bias ? broadcast(bias + row + i) : zero();
        for (int v = 0; v < V; ++v) {
            const Vec sum = load(sums + (i * V + v) * WIDTH);
            const Vec a = plan.first.scale ? fma(sum, broadcast(plan.first.scale + row + i), b) : add(sum, b);
            store(to + v * WIDTH, rounded<T>(activate(a, int(call.activation))));
        }
    }
}

// Windows of the first layer, for all of its columns.
template <int V, typename T, typename W>
void add_chunk(const MlpPlan &plan, const MlpTile &tile, int64_t first_window, int64_t end_window) {
    const PanelPlan &layer = plan.first;
    const int64_t window_rows = layer.header.window_rows, n_blocks = layer.sections.n_blocks;
    // Of one block, the sums of a window are done before those of the next, and stay in the L1 cache.
    const int64_t window_floats = n_blocks == 1 ? 0 : window_rows * V * WIDTH;
    for (int64_t block = 0; block < n_blocks; ++block)
        for (int64_t window = first_window; window < end_window; ++window) {
            const int64_t row = window * window_rows, left = layer.sections.padded_rows - row;
            float *sums = tile.sums + (window - first_window) * window_floats;
            add_window<V, W>(layer, block, window, left < window_rows ? left : window_rows,
                             tile.x + block * (layer.header.k_block + 1) * V * WIDTH, sums);
            if (block == n_blocks - 1) activate_window<V, T>(plan, tile, row, sums);
        }
}

// Has memory on its way that is needed soon (panel/kernel.inc.h): while the last block's windows are added, y where
// each of them is written, and x of the next tile.
template <typename T>
__attribute__((always_inline)) inline void prefetch_for_ending(const MlpPlan &plan, const MlpTile &tile, int64_t window,
                                                               const T *y) {
    const LinearCall &first = plan.first.call;
    const int64_t n = plan.second.sections.n_windows, window_rows = plan.second.header.window_rows;
    const int64_t next = tile.first_token + tile.n_tokens, left = first.tokens - next;
    const int64_t n_tokens = left < tile.n_tokens ? left : tile.n_tokens;
    const int64_t from = n_tokens * window / n, end = n_tokens * (window + 1) / n;
    const T *x = static_cast<const T *>(first.x) + (next + from) * first.x_stride;
    prefetch_rows(x, first.x_stride, end - from, first.in);
    prefetch_rows(y + window * window_rows, plan.second.call.y_stride, tile.n_tokens, window_rows);
}

// One block of the second layer's columns, for all of its rows.
template <int V, typename T, typename W>
void add_block(const MlpPlan &plan, const MlpTile &tile, int64_t block) {
    const PanelPlan &layer = plan.second;
    const LinearCall &call = layer.call;
    const int64_t window_rows = layer.header.window_rows;
    const float *between = tile.between + block % plan.n_slots * (layer.header.k_block + 1) * V * WIDTH;
    const Ending<T> ending = {layer.scale, static_cast<const T *>(call.bias), nullptr, int(call.activation)};
    T *const y = static_cast<T *>(call.y) + tile.first_token * call.y_stride;
    for (int64_t window = 0; window < layer.sections.n_windows; ++window) {
        const int64_t row = window * window_rows, left = layer.sections.padded_rows - row;
        float *sums = tile.y_sums + row * V * WIDTH;
        if (plan.far && block == layer.sections.n_blocks - 1) prefetch_for_ending(plan, tile, window, y);
        add_window<V, W>(layer, block, window, left < window_rows ? left : window_rows, between, sums);
        if (block < layer.sections.n_blocks - 1) continue;
        const Rows rows = part_of_call(call, row, window_rows);
        empty_tile<V>(sums, ending.from(rows.first, 0), y + rows.first, call.y_stride, tile.n_tokens, rows.n);
    }
}

template <int V, typename T, typename W>
int run_mlp_tile(const MlpPlan &plan, int64_t first_token, int64_t n_tokens) {
    const PanelPlan &first = plan.first, &second = plan.second;
    const int64_t k_block = first.header.k_block, slot_floats = (second.header.k_block + 1) * V * WIDTH;
    const int64_t x_floats = first.sections.n_blocks * (k_block + 1) * V * WIDTH;
    // And what is read past the rows of a window that begin within it.
    const int64_t sums_floats = (plan.chunk_windows * first.header.window_rows + WIDTH) * V * WIDTH;
    const int64_t y_floats = (second.sections.n_windows * second.header.window_rows + WIDTH) * V * WIDTH;
    const int64_t floats = x_floats + sums_floats + plan.n_slots * slot_floats + y_floats;
    float *const memory = static_cast<float *>(thread_scratch(size_t(floats) * sizeof(float)));
    if (!memory) return SPARSIFY_NO_MEMORY;
    float *const sums = memory + x_floats, *const between = sums + sums_floats;
    const MlpTile tile = {first_token, n_tokens, memory, sums, between, between + plan.n_slots * slot_floats};

    const T *x = static_cast<const T *>(first.call.x) + first_token * first.call.x_stride;
    const size_t row_bytes = V * WIDTH * sizeof(float);
    for (int64_t block = 0; block < first.sections.n_blocks; ++block) {
        const int64_t column = block * k_block, left = first.call.in - column;
        float *to = tile.x + block * (k_block + 1) * V * WIDTH;
        fill_tile<V>(x + column, first.call.x_stride, n_tokens, left < k_block ? left : k_block, to);
        memset(to + k_block * V * WIDTH, 0, row_bytes);  // what padding refers to
    }
    for (int64_t slot = 0; slot < plan.n_slots; ++slot)
        memset(tile.between + (slot + 1) * slot_floats - V * WIDTH, 0, row_bytes);

    int64_t block = 0;
    for (int64_t window = 0; window < first.sections.n_windows; window += plan.chunk_windows) {
        const int64_t end = window + plan.chunk_windows, n_windows = first.sections.n_windows;
        add_chunk<V, T, W>(plan, tile, window, end < n_windows ? end : n_windows);
        const int64_t done = end < n_windows ? end * first.header.window_rows : second.call.in;
        for (; block < second.sections.n_blocks && (block + 1) * second.header.k_block <= done; ++block)
            add_block<V, T, W>(plan, tile, block);
    }
    for (; block < second.sections.n_blocks; ++block) add_block<V, T, W>(plan, tile, block);
    return SPARSIFY_OK;
}

// A tile of n_vecs vectors, at most MOST.
template <int MOST, typename T, typename W>
int run_mlp_tile(const MlpPlan &plan, int64_t first_token, int64_t n_tokens, int64_t n_vecs) {
    if constexpr (MOST > 1)
        if (n_vecs < MOST) return run_mlp_tile<MOST - 1, T, W>(plan, first_token, n_tokens, n_vecs);
    return run_mlp_tile<MOST, T, W>(plan, first_token, n_tokens);
}

template <typename T, typename W>
int run_mlp_task(const void *context, int64_t tile) {
    const MlpPlan &plan = *static_cast<const MlpPlan *>(context);
    const int64_t first_vec = plan.tiles.first_vec(tile), end_vec = plan.tiles.first_vec(tile + 1);
    const int64_t left = plan.first.call.tokens - first_vec * WIDTH, tokens = (end_vec - first_vec) * WIDTH;
    return run_mlp_tile<PANEL_MAX_VECS, T, W>(plan, first_vec * WIDTH, left < tokens ? left : tokens,
                                              end_vec - first_vec);
}

template <typename T, typename W>
int run_mlp(const MlpCall &call) {
    MlpPlan plan;
    if (!open_panel(plan.first, call.first, call.first_scale) ||
        !open_panel(plan.second, call.second, call.second_scale))
        return SPARSIFY_BAD_INDEX;
    const PanelHeader &first = plan.first.header, &second = plan.second.header;
    plan.chunk_windows = MLP_CHUNK_ROWS / first.window_rows;
    // Of a block that is not whole, most of its columns may be left from the chunk before.
    plan.n_slots = (plan.chunk_windows * first.window_rows + 2 * second.k_block - 2) / second.k_block + 1;
    if (plan.n_slots > plan.second.sections.n_blocks) plan.n_slots = plan.second.sections.n_blocks;
    plan.far = call.first.tokens * (call.first.in + call.second.out) * int64_t(sizeof(T)) > PANEL_FAR_BYTES;
    const int64_t n_vecs = (call.first.tokens + WIDTH - 1) / WIDTH;
    const int64_t longest = first.k_block > second.k_block ? first.k_block : second.k_block;
    const int n_threads =
        worthwhile_threads(2.0 * double(first.nnz + second.nnz) * double(n_vecs * WIDTH), int(call.first.n_threads));
    plan.tiles =
        n_vecs < n_threads ? spread_evenly(n_vecs, n_vecs) : spread_widely(n_vecs, widest_tile(longest), n_threads);
    return run_tasks(plan.tiles.n_tiles, n_threads, run_mlp_task<T, W>, &plan);
}

template <typename T>
int mlp_panel(const MlpCall &call) {
    if (!call.first_scale != !call.second_scale) return SPARSIFY_BAD_ARGUMENT;
    return call.first_scale ? run_mlp<T, int8_t>(call) : run_mlp<T, T>(call);
}

}  // namespace
