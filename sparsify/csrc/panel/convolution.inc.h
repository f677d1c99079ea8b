// Convolutions with the panel form (panel/format.h), over strips of images (panel/strip.inc.h).
//
// A task is a strip and a part of the rows. Its thread copies the strip's planes when it first meets it, then goes from
// tile to tile: per block of columns it fills the tile and adds all cells of the part, as linear does; after the last
// block the sums are written to y.
#pragma once

#include <stdlib.h>

#include "norm.inc.h"
#include "panel/kernel.inc.h"
#include "panel/strip.inc.h"

namespace {

using namespace sparsify;

// The planes of a strip stay in the L2 cache while its tiles are filled.
constexpr int64_t STRIP_BYTES = 512 * 1024;

struct ConvolutionPlan {
    ConvolutionCall call;
    PlaneShape shape;
    PanelPlan panel;     // what add_window reads of it
    const float *scale;  // the call's, or of the BatchNorm, whose shift is then the bias
    int64_t n_positions, n_taps, n_vecs, most_vecs;
    int64_t n_tiles, n_strips, n_parts, windows_per_part;
};

// What this thread has in its scratch memory.
thread_local int64_t strip_kept_call = 0, strip_kept = 0;

struct ConvolutionTile {
    int64_t position, n_positions, first_window, end_window;
    const float *planes;
    const int64_t *taps;
    float *tile, *sums;
};

// One window's rows of the output, for the positions of a tile.
template <int V, typename T>
void write_window(const ConvolutionPlan &plan, const ConvolutionTile &of, int64_t row, const float *sums) {
    const ConvolutionCall &call = plan.call;
    const Rows rows = part_of_call(plan.panel.call, row, plan.panel.header.window_rows);
    const Ending<T> ending = {plan.scale, static_cast<const T *>(call.bias), static_cast<const T *>(call.residual),
                              int(call.activation)};
    T *y = static_cast<T *>(call.y);
    if (call.y_channels_last) {
        const int64_t to = of.position * call.out + rows.first;
        empty_tile<V>(sums, ending.from(rows.first, to), y + to, call.out, of.n_positions, rows.n);
        return;
    }
    const int64_t plane = call.out_height * call.out_width;
    for (int64_t done = 0; done < of.n_positions;) {  // image by image
        const int64_t image = (of.position + done) / plane, first = (of.position + done) % plane;
        const int64_t left = of.n_positions - done, here = plane - first < left ? plane - first : left;
        const int64_t to = (image * call.out + rows.first) * plane + first;
        empty_tile_to_planes<V>(sums + done, ending.from(rows.first, to), y + to, plane, here, rows.n);
        done += here;
    }
}

template <int V, typename T>
void run_convolution_tile(const ConvolutionPlan &plan, const Strip &strip, const ConvolutionTile &of) {
    const PanelPlan &panel = plan.panel;
    const int64_t k_block = panel.header.k_block, window_rows = panel.header.window_rows;
    Move moves[V * WIDTH];
    const int n_moves = find_moves(plan.call, plan.shape, strip, of.position, of.n_positions, moves);
    const Filling by = {of.planes, strip.plane, of.taps, plan.n_taps, moves, n_moves, of.n_positions};
    for (int64_t block = 0; block < panel.sections.n_blocks; ++block) {
        const int64_t first = block * k_block, left = panel.call.in - first;
        fill_tile_from_strip<V>(by, first, left < k_block ? left : k_block, of.tile);
        memset(of.tile + k_block * V * WIDTH, 0, V * WIDTH * sizeof(float));  // which padding refers to
        for (int64_t window = of.first_window; window < of.end_window; ++window) {
            const int64_t row = window * window_rows, below = panel.sections.padded_rows - row;
            float *sums = of.sums + (window - of.first_window) * window_rows * V * WIDTH;
            add_window<V, T>(panel, block, window, below < window_rows ? below : window_rows, of.tile, sums);
            if (block == panel.sections.n_blocks - 1) write_window<V, T>(plan, of, row, sums);
        }
    }
}

// A tile of n_vecs vectors, at most MOST.
template <int MOST, typename T>
void run_convolution_tile(const ConvolutionPlan &plan, const Strip &strip, const ConvolutionTile &of, int64_t n_vecs) {
    if constexpr (MOST > 1)
        if (n_vecs < MOST) return run_convolution_tile<MOST - 1, T>(plan, strip, of, n_vecs);
    run_convolution_tile<MOST, T>(plan, strip, of);
}

inline int64_t first_vec(const ConvolutionPlan &plan, int64_t tile) { return tile * plan.n_vecs / plan.n_tiles; }

// Positions before a tile.
inline int64_t first_position(const ConvolutionPlan &plan, int64_t tile) {
    const int64_t position = first_vec(plan, tile) * WIDTH;
    return position < plan.n_positions ? position : plan.n_positions;
}

template <typename T>
int run_convolution_task(const void *context, int64_t number) {
    const ConvolutionPlan &plan = *static_cast<const ConvolutionPlan *>(context);
    const ConvolutionCall &call = plan.call;
    const int64_t n_strip = number / plan.n_parts, part = number % plan.n_parts;
    const int64_t first_tile = n_strip * plan.n_tiles / plan.n_strips;
    const int64_t end_tile = (n_strip + 1) * plan.n_tiles / plan.n_strips;
    const Strip strip = make_strip(call, plan.shape, first_position(plan, first_tile), first_position(plan, end_tile));

    const int64_t window_rows = plan.panel.header.window_rows, tokens = plan.most_vecs * WIDTH;
    const int64_t planes = (call.channels * strip.plane + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t tile_floats = (plan.panel.header.k_block + 1) * tokens;
    // And what is read past the rows of a window that begin within it.
    const int64_t sums_floats = (plan.windows_per_part * window_rows + WIDTH) * tokens;
    const size_t floats = size_t(tile_floats + sums_floats + planes);
    ConvolutionTile of;
    of.tile = static_cast<float *>(thread_scratch(floats * sizeof(float) + size_t(plan.n_taps) * sizeof(int64_t)));
    if (!of.tile) return SPARSIFY_NO_MEMORY;
    of.sums = of.tile + tile_floats;
    float *const copied = of.sums + sums_floats;
    int64_t *const taps = reinterpret_cast<int64_t *>(copied + planes);
    of.planes = copied;
    of.taps = taps;
    if (strip_kept_call != plan.panel.id || strip_kept != n_strip) {
        if (call.x_column_stride == 1)
            copy_planes<T>(call, plan.shape, strip, copied);
        else
            transpose_planes<T>(call, plan.shape, strip, copied);
        find_taps(call, plan.shape, strip, taps);
    }
    strip_kept_call = plan.panel.id;
    strip_kept = n_strip;

    of.first_window = part * plan.windows_per_part;
    const int64_t end = of.first_window + plan.windows_per_part, n_windows = plan.panel.sections.n_windows;
    of.end_window = end < n_windows ? end : n_windows;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        of.position = first_position(plan, tile);
        of.n_positions = first_position(plan, tile + 1) - of.position;
        const int64_t n_vecs = first_vec(plan, tile + 1) - first_vec(plan, tile);
        run_convolution_tile<PANEL_MAX_VECS, T>(plan, strip, of, n_vecs);
    }
    return SPARSIFY_OK;
}

// How many tiles, strips and parts. Parts fill the same tiles each, so there are more than one only where there are
// fewer tiles than threads, or sums for too many rows.
inline void split_convolution(ConvolutionPlan &plan, int n_threads) {
    const PanelHeader &header = plan.panel.header;
    const int64_t n_windows = plan.panel.sections.n_windows;
    plan.most_vecs = widest_tile(header.k_block);
    plan.n_tiles = (plan.n_vecs + plan.most_vecs - 1) / plan.most_vecs;
    const int64_t needed = (n_threads + n_windows - 1) / n_windows;
    if (plan.n_tiles < needed) plan.n_tiles = needed;
    if (plan.n_tiles > n_threads) plan.n_tiles = (plan.n_tiles + n_threads - 1) / n_threads * n_threads;
    if (plan.n_tiles > plan.n_vecs) plan.n_tiles = plan.n_vecs;

    const ConvolutionCall &call = plan.call;
    const double image_bytes = double(call.channels * plan.shape.n_phases * plan.shape.width) *
                               double(plane_rows(call, plan.shape, call.out_height)) * sizeof(float);
    const double strips = double(call.n_images) * image_bytes / double(STRIP_BYTES);
    const int64_t wanted = n_threads == 1 ? 1 : 4 * n_threads;
    plan.n_strips = strips > double(wanted) ? int64_t(strips) + 1 : wanted;
    if (plan.n_strips > plan.n_tiles) plan.n_strips = plan.n_tiles;

    const int64_t wanted_parts = (n_threads + plan.n_tiles - 1) / plan.n_tiles;
    const int64_t most_windows = PANEL_PART_ROWS / header.window_rows;
    plan.windows_per_part = (n_windows + wanted_parts - 1) / wanted_parts;
    if (plan.windows_per_part > most_windows) plan.windows_per_part = most_windows;
    plan.n_parts = (n_windows + plan.windows_per_part - 1) / plan.windows_per_part;
}

// scale and shift: what a BatchNorm does to the sums of the weights, with the bias.
inline void fold_norm(const ConvolutionCall &call, float *scale, float *shift) {
    const float *const bias = static_cast<const float *>(call.bias);
    for (int64_t o = 0; o < call.out; ++o) {
        scale[o] = norm_scale(call, o);
        shift[o] = norm_shift(call, o, bias ? bias[o] : 0.0f, scale[o]);
    }
}

// A kernel of one position reads and writes where x and y lie, as rows of tokens or as planes. Returns whether it can.
template <typename T>
bool convolve_in_place(const ConvolutionCall &call, const float *scale, int *status) {
    if (call.kernel_height * call.kernel_width * call.stride_height * call.stride_width != 1 || call.top || call.left)
        return false;
    const bool planes = call.x_column_stride == 1 && !call.y_channels_last;
    const int64_t plane = call.height * call.width;
    LinearCall image = {call.index,      call.values,    call.bias, call.x,   call.x_channel_stride,
                        call.y,          plane,          plane,     call.out, call.channels,
                        call.activation, call.n_threads, 0,         call.out};
    if (planes && call.x_row_stride == call.width) {
        // Of small images the last vectors are rather shared.
        if (call.n_images > 1 && (plane + WIDTH - 1) / WIDTH * WIDTH > plane + plane / 8) return false;
        *status =
            run_panel<true, T, T>(image, scale, call.n_images, call.x_image_stride, call.out * plane, call.residual);
        return true;
    }
    const bool no_gaps = call.x_row_stride == call.width * call.x_column_stride &&
                         (call.n_images == 1 || call.x_image_stride == plane * call.x_column_stride);
    if (planes || !call.y_channels_last || call.x_channel_stride != 1 || !no_gaps) return false;
    image.x_stride = call.x_column_stride;
    image.y_stride = call.out;
    image.tokens = call.n_images * plane;
    *status = run_panel<false, T, T>(image, scale, 1, 0, 0, call.residual);
    return true;
}

template <typename T>
int convolve(const ConvolutionCall &call, const float *scale) {
    if (int status; convolve_in_place<T>(call, scale, &status)) return status;
    ConvolutionPlan plan;
    plan.call = call;
    plan.scale = scale;
    plan.shape = plane_shape(call);
    plan.n_taps = call.kernel_height * call.kernel_width;
    PanelPlan &panel = plan.panel;
    LinearCall weight = {};
    weight.index = call.index;
    weight.values = call.values;
    weight.in = call.channels * plan.n_taps;
    weight.out = weight.end_row = call.out;
    if (!open_panel(panel, weight, scale)) return SPARSIFY_BAD_INDEX;
    plan.n_positions = call.n_images * call.out_height * call.out_width;
    plan.n_vecs = (plan.n_positions + WIDTH - 1) / WIDTH;
    const double flops = 2.0 * double(panel.header.nnz) * double(plan.n_vecs * WIDTH);
    const int n_threads = worthwhile_threads(flops, int(call.n_threads));
    split_convolution(plan, n_threads);
    return run_tasks(plan.n_strips * plan.n_parts, n_threads, run_convolution_task<T>, &plan);
}

template <typename T>
int convolution_panel(const ConvolutionCall &call) {
    if (!call.norm_variance) return convolve<T>(call, call.scale);
    if (sizeof(T) != sizeof(float)) return SPARSIFY_BAD_ARGUMENT;
    float *const scale = static_cast<float *>(malloc(size_t(2 * call.out) * sizeof(float)));
    if (!scale) return SPARSIFY_NO_MEMORY;
    fold_norm(call, scale, scale + call.out);
    ConvolutionCall with_shift = call;
    with_shift.bias = scale + call.out;
    const int status = convolve<T>(with_shift, scale);
    free(scale);
    return status;
}

}  // namespace
