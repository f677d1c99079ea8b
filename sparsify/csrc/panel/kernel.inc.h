// linear and pointwise for the panel form (panel/format.h), for the instruction set of the simd/*.h included before.
//
// A task is a tile of tokens and a part of the rows. A thread fills a tile when it first meets it and keeps it for the
// parts that follow (run_tasks hands neighbouring tasks to one thread). Per block of columns, all cells of the part
// add to sums[row][token]; after the last block the sums are written to y. linear, whose x and y are rows of tokens,
// transposes on the way in and out; pointwise, whose x and y are planes of features as the sums are, does not.
#pragma once

#include "panel/cell.inc.h"
#include "panel/format.h"
#include "panel/spread.inc.h"
#include "panel/tile.inc.h"
#include "runtime/kernels.h"
#include "runtime/threads.h"
#include "simd/scalar.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

// A block of a tile fits the L1 cache: the fewer weights, the longer are blocks (choose_layout) and the narrower tiles.
// At 95% half as wide a tile as the registers would hold is 1.1x faster with 128 tokens.
constexpr int64_t PANEL_BLOCK_BYTES = 32 * 1024;
// A tile that is kept whole, and the sums of a part, each take a share of the L2 cache. 32 tokens of 4096 features are
// kept: filled anew for each part, 1024x4096 at 95% takes 1.6x the time.
constexpr int64_t PANEL_KEPT_TILE_BYTES = 640 * 1024;
constexpr int64_t PANEL_PART_ROWS = 1024;
// x and y of more bytes than this come from beyond the L2 cache.
constexpr int64_t PANEL_FAR_BYTES = 1024 * 1024;

struct PanelPlan {
    LinearCall call;  // of one image; linear has one
    int64_t x_image_stride, y_image_stride;
    const float *scale;    // of the rows, where values are int8 or a convolution has a scale
    const void *residual;  // where y has it
    PanelHeader header;
    PanelSections sections;
    int64_t id;       // of this call, unlike any other
    Spread tiles;     // of an image
    int64_t n_parts;  // a task is a tile and a part, the parts of a tile following each other
    int64_t first_window, end_window, windows_per_part;
    bool far;  // x and y lie beyond the L2 cache
};

struct PanelTask {
    int64_t tile, image, first_token, n_tokens, first_window, end_window;
};

// What this thread has in its scratch memory.
thread_local int64_t panel_kept_call = 0, panel_kept_tile = 0;

// Inlined by force: g++ takes a function that only prefetches for one without effect, and drops its calls.
template <typename T>
__attribute__((always_inline)) inline void prefetch_rows(const T *rows, int64_t stride, int64_t n_rows, int64_t width) {
    for (int64_t row = 0; row < n_rows; ++row)
        for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows + row * stride + i, 0, 2);
}

// Has memory on its way to the L2 cache that is needed when this window has been added: many rows at once are too much
// for the processor to foresee. Each window takes its share of the tile's next block, or of the next tile's first, and
// what of y it writes itself. 384x1536 at 90% with 4096 tokens takes 0.91 of the time.
template <typename T>
__attribute__((always_inline)) inline void prefetch_for_window(const PanelPlan &plan, const PanelTask &task,
                                                               int64_t block, int64_t window, bool filled, const T *x,
                                                               const T *y) {
    const LinearCall &call = plan.call;
    const int64_t k_block = plan.header.k_block, window_rows = plan.header.window_rows;
    const int64_t n = task.end_window - task.first_window, i = window - task.first_window;
    const bool last = block == plan.sections.n_blocks - 1;
    int64_t n_tokens = last || filled ? 0 : task.n_tokens, column = (block + 1) * k_block;
    if (last && task.end_window == plan.end_window) {
        const int64_t left = call.tokens - task.first_token - task.n_tokens;
        n_tokens = left < task.n_tokens ? left : task.n_tokens;
        column = 0;
        x += task.n_tokens * call.x_stride;
    }
    const int64_t from = n_tokens * i / n, end = n_tokens * (i + 1) / n;
    prefetch_rows(x + from * call.x_stride + column, call.x_stride, end - from, k_block);
    if (last) prefetch_rows(y + window * window_rows - call.first_row, call.y_stride, task.n_tokens, window_rows);
}

// to[i] = from[i] in float32 for two vectors; a simd header may have a faster one.
template <typename W>
__attribute__((always_inline)) inline void widen_two(const W *from, float *to) {
    store(to, load(from));
    store(to + WIDTH, load(from + WIDTH));
}

// to[i] = values[i] in float32 for i < n, and perhaps for some more: there is room, and `left` values may be read.
template <typename W>
void widen_values(const W *values, int64_t n, int64_t left, float *to) {
    int64_t i = 0;
    for (; i < n && i + 2 * WIDTH <= left; i += 2 * WIDTH) widen_two(values + i, to + i);
    for (; i < n && i + WIDTH <= left; i += WIDTH) store(to + i, load(values + i));
    for (; i < n; ++i) to[i] = to_float(values[i]);
}

// One block of columns of one window into its sums.
template <int V, typename W>
void add_window(const PanelPlan &plan, int64_t block, int64_t window, int64_t n_rows, const float *tile, float *sums) {
    const LinearCall &call = plan.call;
    PanelStart start;
    memcpy(&start, call.index + sizeof(PanelHeader) + size_t(block * plan.sections.n_windows + window) * sizeof start,
           sizeof start);
    const W *values = static_cast<const W *>(call.values) + start.value;
    const uint8_t *columns = call.index + plan.sections.columns + start.column;
    const int64_t first_cell = (block * plan.sections.padded_rows + window * plan.header.window_rows) / PANEL_CELL_ROWS;
    const uint8_t *cells = call.index + plan.sections.cells + size_t(first_cell) * sizeof(PanelCell);
    [[maybe_unused]] int64_t left = plan.header.n_values - start.value;
    for (int64_t i = 0; i < n_rows / PANEL_CELL_ROWS; ++i) {
        PanelCell cell;
        memcpy(&cell, cells + size_t(i) * sizeof cell, sizeof cell);
        if constexpr (sizeof(W) == sizeof(float)) {
            panel_cell<V>(cell, columns, values, tile, sums, block == 0);
        } else {  // widened together: a widening broadcast for each weight takes up to 1.4x the time, AVX-512
            const int64_t n = 4 * cell.n_quad + 12 * (cell.n_triple + cell.n_pair) + 4 * cell.n_single;
            alignas(64) float wide[PANEL_MAX_CELL_VALUES + 2 * WIDTH];
            widen_values(values, n, left, wide);
            const float *from = wide;
            panel_cell<V>(cell, columns, from, tile, sums, block == 0);
            values += n;
            left -= n;
        }
    }
}

template <int V, bool PLANES, typename T, typename W>
int run_panel_task(const PanelPlan &plan, const PanelTask &task) {
    const LinearCall &call = plan.call;
    const int64_t k_block = plan.header.k_block, window_rows = plan.header.window_rows;
    const int64_t n_blocks = plan.sections.n_blocks;
    const int64_t block_floats = (k_block + 1) * V * WIDTH;  // and a row of zeros, which padding refers to
    const bool keep = n_blocks * block_floats * int64_t(sizeof(float)) <= PANEL_KEPT_TILE_BYTES;
    const int64_t tile_floats = (keep ? n_blocks : 1) * block_floats;
    // Of one block, the sums of a window are done before those of the next, and stay in the L1 cache.
    const int64_t window_floats = n_blocks == 1 ? 0 : window_rows * V * WIDTH;
    // And what is read past the rows of a window that begin within it.
    const int64_t sums_floats = (plan.windows_per_part * window_rows + WIDTH) * V * WIDTH;
    float *const tile = static_cast<float *>(thread_scratch(size_t(tile_floats + sums_floats) * sizeof(float)));
    if (!tile) return SPARSIFY_NO_MEMORY;
    float *const sums = tile + tile_floats;
    const bool filled = keep && panel_kept_call == plan.id && panel_kept_tile == task.tile;
    panel_kept_call = plan.id;
    panel_kept_tile = task.tile;

    const T *x = static_cast<const T *>(call.x) + task.image * plan.x_image_stride;
    T *y = static_cast<T *>(call.y) + task.image * plan.y_image_stride;
    x += task.first_token * (PLANES ? 1 : call.x_stride);
    y += task.first_token * (PLANES ? 1 : call.y_stride);
    Ending<T> ending = {plan.scale, static_cast<const T *>(call.bias), nullptr, int(call.activation)};
    if (plan.residual) ending.residual = static_cast<const T *>(plan.residual) + (y - static_cast<T *>(call.y));
    for (int64_t block = 0; block < n_blocks; ++block) {
        const int64_t first = block * k_block, width = call.in - first < k_block ? call.in - first : k_block;
        float *block_tile = tile + (keep ? block * block_floats : 0);
        if (!filled) {
            if constexpr (PLANES)
                fill_tile_from_planes<V>(x + first * call.x_stride, call.x_stride, task.n_tokens, width, block_tile);
            else
                fill_tile<V>(x + first, call.x_stride, task.n_tokens, width, block_tile);
            memset(block_tile + k_block * V * WIDTH, 0, V * WIDTH * sizeof(float));
        }
        for (int64_t window = task.first_window; window < task.end_window; ++window) {
            const int64_t row = window * window_rows, left = plan.sections.padded_rows - row;
            if (!PLANES && plan.far) prefetch_for_window(plan, task, block, window, filled, x, y);
            float *window_sums = sums + (window - task.first_window) * window_floats;
            add_window<V, W>(plan, block, window, left < window_rows ? left : window_rows, block_tile, window_sums);
            if (block == n_blocks - 1) {
                const Rows rows = part_of_call(call, row, window_rows);
                const float *from = window_sums + rows.skipped * V * WIDTH;
                const int64_t to = (rows.first - call.first_row) * (PLANES ? call.y_stride : 1);
                const Ending<T> by = ending.from(rows.first, to);
                if constexpr (PLANES)
                    empty_tile_to_planes<V>(from, by, y + to, call.y_stride, task.n_tokens, rows.n);
                else
                    empty_tile<V>(from, by, y + to, call.y_stride, task.n_tokens, rows.n);
            }
        }
    }
    return SPARSIFY_OK;
}

// A task whose tile has n_vecs vectors, at most MOST.
template <int MOST, bool PLANES, typename T, typename W>
int run_panel_tile(const PanelPlan &plan, const PanelTask &task, int64_t n_vecs) {
    if constexpr (MOST > 1)
        if (n_vecs < MOST) return run_panel_tile<MOST - 1, PLANES, T, W>(plan, task, n_vecs);
    return run_panel_task<MOST, PLANES, T, W>(plan, task);
}

template <bool PLANES, typename T, typename W>
int run_panel_task(const void *context, int64_t number) {
    const PanelPlan &plan = *static_cast<const PanelPlan *>(context);
    PanelTask task;
    task.tile = number / plan.n_parts;
    task.image = task.tile / plan.tiles.n_tiles;
    const int64_t tile = task.tile % plan.tiles.n_tiles;
    const int64_t first_vec = plan.tiles.first_vec(tile), end_vec = plan.tiles.first_vec(tile + 1);
    task.first_token = first_vec * WIDTH;
    task.n_tokens = (end_vec * WIDTH < plan.call.tokens ? end_vec * WIDTH : plan.call.tokens) - task.first_token;
    task.first_window = plan.first_window + number % plan.n_parts * plan.windows_per_part;
    const int64_t end = task.first_window + plan.windows_per_part;
    task.end_window = end < plan.end_window ? end : plan.end_window;
    return run_panel_tile<PANEL_MAX_VECS, PLANES, T, W>(plan, task, end_vec - first_vec);
}

// Reads what a plan has of a call's weight. False if the weight is another one's.
inline bool open_panel(PanelPlan &plan, const LinearCall &call, const float *scale) {
    plan.call = call;
    plan.scale = scale;
    plan.residual = nullptr;
    memcpy(&plan.header, call.index, sizeof plan.header);
    plan.sections = panel_sections(call.out, call.in, plan.header.k_block, plan.header.window_rows);
    plan.id = next_call_id();
    return plan.header.out == call.out && plan.header.in == call.in;
}

// The most vectors of a tile whose block of columns fits the L1 cache.
inline int64_t widest_tile(int64_t k_block) {
    const int64_t fitting = PANEL_BLOCK_BYTES / (k_block * WIDTH * int64_t(sizeof(float)));
    return fitting < 1 ? 1 : fitting < PANEL_MAX_VECS ? fitting : PANEL_MAX_VECS;
}

template <bool PLANES, typename T, typename W>
int run_panel(const LinearCall &call, const float *scale, int64_t n_images, int64_t x_image_stride,
              int64_t y_image_stride, const void *residual = nullptr) {
    PanelPlan plan;
    if (!open_panel(plan, call, scale)) return SPARSIFY_BAD_INDEX;
    plan.residual = residual;
    plan.x_image_stride = x_image_stride;
    plan.y_image_stride = y_image_stride;
    plan.first_window = call.first_row / plan.header.window_rows;
    plan.end_window = (call.end_row + plan.header.window_rows - 1) / plan.header.window_rows;
    const int64_t n_windows = plan.end_window - plan.first_window;
    const int64_t n_vecs = (call.tokens + WIDTH - 1) / WIDTH, most_vecs = widest_tile(plan.header.k_block);
    const double nnz = double(plan.header.nnz) * double(call.end_row - call.first_row) / double(call.out);
    const int n_threads = worthwhile_threads(2.0 * nnz * double(n_images * n_vecs * WIDTH), call.n_threads);
    // A few tasks for each thread, so that a delayed one does not hold up all.
    const int64_t wanted_tasks = n_threads == 1 ? 1 : 4 * n_threads;
    constexpr bool ROWS_TAKE_TURNS = PANEL_MAX_VECS > PANEL_FOUR_ROW_VECS;  // else narrower tiles cost little more
    if (ROWS_TAKE_TURNS && n_images == 1 && n_vecs >= n_threads * most_vecs) {
        plan.tiles = spread_widely(n_vecs, most_vecs, n_threads);
    } else {  // smaller tiles before idle threads
        const int64_t fewest = (n_vecs + most_vecs - 1) / most_vecs;
        const int64_t needed = (n_threads + n_windows * n_images - 1) / (n_windows * n_images);
        int64_t n_tiles = fewest < needed ? needed : fewest;
        // Tiles enough to be tasks by themselves: as many for each thread. Two threads take as long for 13 as for 14.
        if (n_images == 1 && n_tiles >= wanted_tasks) n_tiles = (n_tiles + n_threads - 1) / n_threads * n_threads;
        plan.tiles = spread_evenly(n_vecs, n_tiles < n_vecs ? n_tiles : n_vecs);
    }
    const int64_t n_tiles = n_images * plan.tiles.n_tiles;
    const int64_t wanted_parts = (wanted_tasks + n_tiles - 1) / n_tiles;
    plan.windows_per_part = (n_windows + wanted_parts - 1) / wanted_parts;
    const int64_t most_windows = PANEL_PART_ROWS / plan.header.window_rows;
    if (plan.windows_per_part > most_windows) plan.windows_per_part = most_windows;
    plan.far = call.tokens * (call.in + call.out) * int64_t(sizeof(T)) > PANEL_FAR_BYTES;
    plan.n_parts = (n_windows + plan.windows_per_part - 1) / plan.windows_per_part;
    return run_tasks(n_tiles * plan.n_parts, n_threads, run_panel_task<PLANES, T, W>, &plan);
}

template <typename T>
int linear_panel(const LinearCall &call) {
    return run_panel<false, T, T>(call, nullptr, 1, 0, 0);
}

template <typename T>
int linear_panel_int8(const Int8Call &call) {
    return run_panel<false, T, int8_t>(call.linear, call.scale, 1, 0, 0);
}

template <typename T>
int pointwise_panel(const PointwiseCall &call) {
    return run_panel<true, T, T>(call.image, nullptr, call.n_images, call.x_image_stride, call.y_image_stride);
}

}  // namespace
