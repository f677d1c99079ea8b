// linear for the quads form (quads/format.h), for the instruction set of the simd/quads_*.h and the quads/fill*.inc.h
// included before.
//
// Tasks are those of the panel form (panel/kernel.inc.h): a tile of tokens and a part of the rows. A thread quantises
// and packs a tile when it first meets it, all quads at once, and keeps it for the parts that follow.
#pragma once

#include "panel/cell.inc.h"
#include "quads/tile.inc.h"
#include "runtime/kernels.h"
#include "runtime/threads.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

// 4 rows x V sums, V activations and a weight have to fit the registers.
constexpr int QUADS_MAX_VECS = N_REGISTERS >= 32 ? 4 : 2;
// A tile of all quads stays in the L2 cache: narrower for very many inputs.
constexpr int64_t QUADS_TILE_BYTES = 1024 * 1024;
constexpr int64_t QUADS_PART_ROWS = 1024;

struct QuadsPlan {
    LinearCall call;
    const float *scale;
    const int32_t *row_sums;
    const uint8_t *inputs, *panel;
    PanelHeader header;  // of the panel of quads
    PanelSections sections;
    bool in_order;  // place i holds input i
    int64_t id;     // of this call, unlike any other
    int64_t n_vecs, n_tiles, n_parts;
    int64_t first_window, end_window, windows_per_part;
};

// What this thread has in its scratch memory.
thread_local int64_t quads_kept_call = 0, quads_kept_tile = 0;
thread_local TokenScales quads_kept_tokens;

inline bool in_order(const uint8_t *inputs, int64_t in) {
    int32_t differs = 0;
    for (int32_t i = 0; i < in; ++i) {
        int32_t input;
        memcpy(&input, inputs + 4 * size_t(i), sizeof input);
        differs |= input ^ i;
    }
    return !differs;
}

template <int V>
void add_quads(const QuadsPlan &plan, int64_t block, int64_t window, int64_t n_rows, const uint32_t *tile,
               int32_t *sums) {
    PanelStart start;
    memcpy(&start, plan.panel + sizeof(PanelHeader) + size_t(block * plan.sections.n_windows + window) * sizeof start,
           sizeof start);
    const QuadWeights *values = static_cast<const QuadWeights *>(plan.call.values) + start.value;
    const uint8_t *columns = plan.panel + plan.sections.columns + start.column;
    const int64_t first_cell = (block * plan.sections.padded_rows + window * plan.header.window_rows) / PANEL_CELL_ROWS;
    const uint8_t *cells = plan.panel + plan.sections.cells + size_t(first_cell) * sizeof(PanelCell);
    for (int64_t i = 0; i < n_rows / PANEL_CELL_ROWS; ++i) {
        PanelCell cell;
        memcpy(&cell, cells + size_t(i) * sizeof cell, sizeof cell);
        panel_cell<V>(cell, columns, values, tile, sums, block == 0);
    }
}

// Words of a tile: per block its quads, and a row of zeros, which padding refers to.
template <int V>
inline int64_t quads_tile_words(const QuadsPlan &plan) {
    return plan.sections.n_blocks * (plan.header.k_block + 1) * V * WIDTH;
}

// Words of the sums of n_windows windows, and what is read past the rows of a window that begin within it.
template <int V>
inline int64_t quads_sums_words(const QuadsPlan &plan, int64_t n_windows) {
    return (n_windows * plan.header.window_rows + WIDTH) * V * WIDTH;
}

// Fills a tile with n_tokens rows of x; `scratch` has fill_scratch_bytes.
template <int V, typename T>
void fill_quads_tile(const QuadsPlan &plan, const T *x, int64_t x_stride, int64_t n_tokens, uint8_t *scratch,
                     TokenScales &tokens, uint32_t *tile) {
    const int64_t k_block = plan.header.k_block;
    fill_quads<V>(x, x_stride, n_tokens, plan.call.in, plan.inputs, plan.in_order, k_block, scratch, tokens, tile);
    for (int64_t block = 0; block < plan.sections.n_blocks; ++block)
        memset(tile + (block * (k_block + 1) + k_block) * V * WIDTH, 0, V * WIDTH * sizeof *tile);
}

// Of a filled tile the outputs of some windows, into rows of y.
template <int V, typename T>
void multiply_quads_tile(const QuadsPlan &plan, const uint32_t *tile, const TokenScales &tokens, int64_t n_tokens,
                         int64_t first_window, int64_t end_window, int32_t *sums, T *y, int64_t y_stride) {
    const LinearCall &call = plan.call;
    const int64_t k_block = plan.header.k_block, window_rows = plan.header.window_rows;
    const int64_t n_blocks = plan.sections.n_blocks;
    // Of one block, the sums of a window are done before those of the next, and stay in the L1 cache.
    const int64_t window_words = n_blocks == 1 ? 0 : window_rows * V * WIDTH;
    const T *bias = static_cast<const T *>(call.bias);
    for (int64_t block = 0; block < n_blocks; ++block) {
        const uint32_t *block_tile = tile + block * (k_block + 1) * V * WIDTH;
        for (int64_t window = first_window; window < end_window; ++window) {
            const int64_t row = window * window_rows, rows_left = plan.sections.padded_rows - row;
            int32_t *window_sums = sums + (window - first_window) * window_words;
            add_quads<V>(plan, block, window, rows_left < window_rows ? rows_left : window_rows, block_tile,
                         window_sums);
            if (block < n_blocks - 1) continue;
            const Rows rows = part_of_call(call, row, window_rows);
            empty_quads<V>(window_sums + rows.skipped * V * WIDTH, tokens, plan.row_sums + rows.first,
                           plan.scale + rows.first, bias ? bias + rows.first : nullptr, y + rows.first - call.first_row,
                           y_stride, n_tokens, rows.n, call.activation, call.in);
        }
    }
}

template <int V, typename T>
int run_quads_tile(const QuadsPlan &plan, int64_t tile_number, int64_t first_vec, int64_t first_window,
                   int64_t end_window) {
    const LinearCall &call = plan.call;
    const int64_t first_token = first_vec * WIDTH, left = call.tokens - first_token;
    const int64_t n_tokens = left < V * WIDTH ? left : V * WIDTH;
    const int64_t tile_words = quads_tile_words<V>(plan), sums_words = quads_sums_words<V>(plan, plan.windows_per_part);
    const size_t bytes = size_t(tile_words + sums_words) * 4 + size_t(fill_scratch_bytes<V>(call.in));
    uint32_t *const tile = static_cast<uint32_t *>(thread_scratch(bytes));
    if (!tile) return SPARSIFY_NO_MEMORY;
    int32_t *const sums = reinterpret_cast<int32_t *>(tile + tile_words);
    if (quads_kept_call != plan.id || quads_kept_tile != tile_number) {
        const T *x = static_cast<const T *>(call.x) + first_token * call.x_stride;
        fill_quads_tile<V>(plan, x, call.x_stride, n_tokens, reinterpret_cast<uint8_t *>(sums + sums_words),
                           quads_kept_tokens, tile);
        quads_kept_call = plan.id;
        quads_kept_tile = tile_number;
    }
    T *y = static_cast<T *>(call.y) + first_token * call.y_stride;
    multiply_quads_tile<V>(plan, tile, quads_kept_tokens, n_tokens, first_window, end_window, sums, y, call.y_stride);
    return SPARSIFY_OK;
}

template <typename T>
int run_quads_task(const void *context, int64_t number) {
    const QuadsPlan &plan = *static_cast<const QuadsPlan *>(context);
    const int64_t tile = number / plan.n_parts;
    const int64_t first_vec = tile * plan.n_vecs / plan.n_tiles, end_vec = (tile + 1) * plan.n_vecs / plan.n_tiles;
    const int64_t first_window = plan.first_window + number % plan.n_parts * plan.windows_per_part;
    const int64_t end = first_window + plan.windows_per_part,
                  end_window = end < plan.end_window ? end : plan.end_window;
    constexpr int MOST = QUADS_MAX_VECS;
    switch (end_vec - first_vec) {
        case 1:
            return run_quads_tile<1, T>(plan, tile, first_vec, first_window, end_window);
        case 2:
            return run_quads_tile<2, T>(plan, tile, first_vec, first_window, end_window);
        case 3:
            return run_quads_tile<(MOST < 3 ? 1 : 3), T>(plan, tile, first_vec, first_window, end_window);
        default:
            return run_quads_tile<(MOST < 4 ? 1 : 4), T>(plan, tile, first_vec, first_window, end_window);
    }
}

// Reads what a plan has of a call's weight. Returns a status.
inline int open_quads(QuadsPlan &plan, const LinearCall &call, const float *scale) {
    if (call.in > SPARSIFY_MOST_QUANTIZED_IN) return SPARSIFY_BAD_ARGUMENT;
    plan.call = call;
    plan.scale = scale;
    QuadsHeader header;
    memcpy(&header, call.index, sizeof header);
    if (header.out != call.out || header.in != call.in) return SPARSIFY_BAD_INDEX;
    const QuadsSections sections = quads_sections(call.in, header.n_panel_values);
    plan.inputs = call.index + sections.inputs;
    plan.panel = call.index + sections.panel;
    plan.row_sums =
        reinterpret_cast<const int32_t *>(static_cast<const QuadWeights *>(call.values) + header.n_panel_values);
    memcpy(&plan.header, plan.panel, sizeof plan.header);
    plan.sections = panel_sections(call.out, quads_of(call.in), plan.header.k_block, plan.header.window_rows);
    plan.in_order = in_order(plan.inputs, call.in);
    plan.id = next_call_id();
    return SPARSIFY_OK;
}

// The most vectors of a tile that stays in the L2 cache.
inline int64_t widest_quads_tile(const QuadsPlan &plan) {
    const int64_t fitting = QUADS_TILE_BYTES / (quads_tile_words<1>(plan) * 4);
    return fitting < 1 ? 1 : fitting < QUADS_MAX_VECS ? fitting : QUADS_MAX_VECS;
}

template <typename T>
int linear_quads(const Int8Call &int8_call) {
    const LinearCall &call = int8_call.linear;
    QuadsPlan plan;
    if (const int status = open_quads(plan, call, int8_call.scale)) return status;
    plan.first_window = call.first_row / plan.header.window_rows;
    plan.end_window = (call.end_row + plan.header.window_rows - 1) / plan.header.window_rows;
    const int64_t n_windows = plan.end_window - plan.first_window;
    plan.n_vecs = (call.tokens + WIDTH - 1) / WIDTH;
    const int64_t most_vecs = widest_quads_tile(plan);
    plan.n_tiles = (plan.n_vecs + most_vecs - 1) / most_vecs;
    const double share = double(call.end_row - call.first_row) / double(call.out);
    const double work = double(plan.header.nnz) * share * double(plan.n_vecs * WIDTH);
    const int n_threads = worthwhile_threads(2.0 * work, call.n_threads);
    // Smaller tiles before idle threads. A few tasks for each thread, so that a delayed one does not hold up all.
    const int64_t needed_tiles = (n_threads + n_windows - 1) / n_windows;
    if (plan.n_tiles < needed_tiles) plan.n_tiles = needed_tiles < plan.n_vecs ? needed_tiles : plan.n_vecs;
    const int64_t wanted_tasks = n_threads == 1 ? 1 : 4 * n_threads;
    const int64_t wanted_parts = (wanted_tasks + plan.n_tiles - 1) / plan.n_tiles;
    plan.windows_per_part = (n_windows + wanted_parts - 1) / wanted_parts;
    const int64_t most_windows = QUADS_PART_ROWS / plan.header.window_rows;
    if (plan.windows_per_part > most_windows) plan.windows_per_part = most_windows;
    plan.n_parts = (n_windows + plan.windows_per_part - 1) / plan.windows_per_part;
    return run_tasks(plan.n_tiles * plan.n_parts, n_threads, run_quads_task<T>, &plan);
}

}  // namespace
