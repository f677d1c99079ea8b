// Depthwise convolutions: each channel of an image with a dense kernel of its own. Lanes are channels.
//
// A task is some blocks of channels and a strip of rows of one image's output. Its thread copies what the strip reads
// of the blocks, with the padding around it, as [block][row][column][channel]. A tile of outputs side by side is then
// summed in registers, row by row of the kernel: a row's weights stay in registers, and each value of the image is
// loaded once for all the outputs that it is part of. Sums are added in the order of the kernel's positions, whatever
// the path.
#pragma once

#include <string.h>

#include "norm.inc.h"
#include "panel/tile.inc.h"
#include "runtime/kernels.h"
#include "runtime/threads.h"
#include "simd/scalar.h"

namespace {

using namespace sparsify;

// Channels of a block: a line of the cache.
constexpr int BLOCK_VECS = WIDTH < 16 ? 16 / WIDTH : 1, BLOCK = BLOCK_VECS * WIDTH;
// Blocks of a task where channels are neighbours: pieces of memory that a processor fetches ahead.
constexpr int MOST_BLOCKS = 4;
// Outputs of a tile. The maps of most networks, 7 to 224 wide, are whole numbers of tiles; 7 sums, 7 weights and a
// value fit 16 registers.
constexpr int TILE = 7;
// The copy of a strip stays in the L2 cache.
constexpr int64_t DEPTHWISE_STRIP_BYTES = 256 * 1024;

struct DepthwisePlan {
    ConvolutionCall call;
    int64_t n_taps, columns, rows;        // columns of a copied row, rows of a copied strip
    int64_t n_strips, strip_rows;         // rows of the output
    int64_t n_groups, group;              // blocks of a task
    int64_t weight_floats, image_floats;  // of a block
};

// The memory of a thread for a block of channels.
struct DepthwiseBlock {
    int64_t n_channels;  // of BLOCK; the others are 0
    float *weights;      // [tap][channel], then scale and shift of each channel
    float *image;        // [row][column][channel]
};

inline float *scale_of(const DepthwisePlan &plan, const DepthwiseBlock &of) { return of.weights + plan.n_taps * BLOCK; }

// to[i][channel] = x[i][channel] for n columns of a row. PLANES: columns lie side by side, else channels.
template <bool PLANES, typename T>
void copy_columns(const T *x, int64_t column_stride, int64_t channel_stride, int64_t n, int64_t n_channels, float *to) {
    for (int v = 0; v < BLOCK_VECS; ++v, to += WIDTH) {
        const int64_t left = n_channels - v * WIDTH;
        const int here = left < WIDTH ? left > 0 ? int(left) : 0 : WIDTH;
        if constexpr (PLANES) {
            const T *const from = x + v * WIDTH * channel_stride;
            for (int64_t i = 0; i < n; i += WIDTH) {
                const int width = n - i < WIDTH ? int(n - i) : WIDTH;
                Vec r[WIDTH];
                if (here == WIDTH && width == WIDTH) {
                    load_transposed(from + i, channel_stride, r);
                } else {
                    for (int c = 0; c < WIDTH; ++c)
                        r[c] = c < here ? load_first(from + c * channel_stride + i, width) : zero();
                    transpose(r);
                }
                for (int j = 0; j < width; ++j) store(to + (i + j) * BLOCK, r[j]);
            }
        } else {
            const T *const from = x + v * WIDTH;
            for (int64_t i = 0; i < n; ++i)
                store(to + i * BLOCK, here == WIDTH ? load(from + i * column_stride)
                                      : here        ? load_first(from + i * column_stride, here)
                                                    : zero());
        }
    }
}

// The rows of an image that outputs of rows [top, top + n_rows) read, from `channel` on, into some blocks.
template <bool PLANES, typename T>
void copy_strip(const DepthwisePlan &plan, int64_t image, int64_t channel, int64_t top, int64_t n_rows,
                const DepthwiseBlock *blocks, int64_t n_blocks) {
    const ConvolutionCall &call = plan.call;
    const int64_t right = plan.columns - call.left, inside = right < call.width ? right : call.width;
    const int64_t row_floats = plan.columns * BLOCK, before = call.left * BLOCK, after = (call.left + inside) * BLOCK;
    const int64_t n = (n_rows - 1) * call.stride_height + (call.kernel_height - 1) * call.dilation_height + 1;
    const T *x = static_cast<const T *>(call.x) + image * call.x_image_stride + channel * call.x_channel_stride;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = top * call.stride_height + i - call.top;
        const bool exists = row >= 0 && row < call.height && inside > 0;
        for (int64_t b = 0; b < n_blocks; ++b) {
            float *const to = blocks[b].image + i * row_floats;
            memset(to, 0, size_t(exists ? before : row_floats) * sizeof *to);
            if (!exists) continue;
            copy_columns<PLANES>(x + row * call.x_row_stride + b * BLOCK * call.x_channel_stride, call.x_column_stride,
                                 call.x_channel_stride, inside, blocks[b].n_channels, to + before);
            memset(to + after, 0, size_t(row_floats - after) * sizeof *to);
        }
    }
}

// Sums of a tile for one vector of channels. K, S: columns of the kernel and their stride where both are known and the
// kernel is not dilated; else 0.
template <int K, int S>
__attribute__((always_inline)) inline void add_tile(const ConvolutionCall &call, int64_t columns, const float *image,
                                                    const float *weights, Vec (&sums)[TILE]) {
    const int64_t row_floats = columns * call.dilation_height * BLOCK;
#pragma GCC unroll 7
    for (int t = 0; t < TILE; ++t) sums[t] = zero();
    for (int64_t r = 0; r < call.kernel_height; ++r, image += row_floats) {
        if constexpr (K > 0) {
            Vec w[K];
#pragma GCC unroll 7
            for (int k = 0; k < K; ++k) w[k] = load(weights + k * BLOCK);
            weights += K * BLOCK;
#pragma GCC unroll 20
            for (int c = 0; c < (TILE - 1) * S + K; ++c) {
                const Vec a = load(image + c * BLOCK);
#pragma GCC unroll 7
                for (int k = 0; k < K; ++k)
                    if (c >= k && (c - k) % S == 0 && (c - k) / S < TILE)
                        sums[(c - k) / S] = fma(a, w[k], sums[(c - k) / S]);
            }
        } else {
            const int64_t step = call.stride_width * BLOCK;
            for (int64_t k = 0; k < call.kernel_width; ++k, weights += BLOCK) {
                const Vec w = load(weights);
                const float *const from = image + k * call.dilation_width * BLOCK;
#pragma GCC unroll 7
                for (int t = 0; t < TILE; ++t) sums[t] = fma(load(from + t * step), w, sums[t]);
            }
        }
    }
}

// Sums of a strip of some blocks, with scale, shift and activation: to y or, if that is channels first, to `planes`,
// [position][channel].
template <int K, int S, typename T>
void sum_strip(const DepthwisePlan &plan, int64_t n_rows, const DepthwiseBlock *blocks, int64_t n_blocks, T *y,
               float *planes) {
    const ConvolutionCall &call = plan.call;
    const int64_t step = call.stride_width * BLOCK, down = call.stride_height * plan.columns * BLOCK;
    // Down a column of tiles: rows stay in the L1 cache for the next tile.
    for (int64_t column = 0; column < call.out_width; column += TILE) {
        const int n = call.out_width - column < TILE ? int(call.out_width - column) : TILE;
        for (int64_t row = 0; row < n_rows; ++row) {
            const int64_t position = row * call.out_width + column;
            for (int64_t at = 0; at < n_blocks * BLOCK; at += WIDTH) {
                const DepthwiseBlock &of = blocks[at / BLOCK];
                const int64_t lane = at % BLOCK, left = of.n_channels - lane;
                if (left <= 0) break;
                Vec sums[TILE];
                add_tile<K, S>(call, plan.columns, of.image + row * down + column * step + lane, of.weights + lane,
                               sums);
                const float *const scale = scale_of(plan, of) + lane;
                const Vec by = load(scale), shift = load(scale + BLOCK);
#pragma GCC unroll 7
                for (int t = 0; t < TILE; ++t) sums[t] = activate(fma(sums[t], by, shift), int(call.activation));
                float *const kept = planes + position * BLOCK + lane;
                T *const to = y + position * call.out + at;
#pragma GCC unroll 7
                for (int t = 0; t < TILE; ++t) {
                    if (t >= n) break;
                    if (!call.y_channels_last)
                        store(kept + t * BLOCK, sums[t]);
                    else if (left >= WIDTH)
                        store(to + t * call.out, sums[t]);
                    else
                        store_first(to + t * call.out, sums[t], int(left));
                }
            }
        }
    }
}

// y[channel][position] = sums[position][channel]
template <typename T>
void write_planes(const float *sums, int64_t n_positions, int64_t n_channels, int64_t plane, T *y) {
    for (int64_t position = 0; position < n_positions; position += WIDTH) {
        const int64_t left = n_positions - position;
        const int here = left < WIDTH ? int(left) : WIDTH;
        for (int64_t channel = 0; channel < n_channels; channel += WIDTH) {
            Vec r[WIDTH];  // rows past the last position are read, and not written
            load_transposed(sums + position * BLOCK + channel, BLOCK, r);
            T *const to = y + channel * plane + position;
            for (int64_t c = 0; c < WIDTH && c < n_channels - channel; ++c) {
                if (here == WIDTH)
                    store(to + c * plane, r[c]);
                else
                    store_first(to + c * plane, r[c], here);
            }
        }
    }
}

template <typename T>
void sum_strip(const DepthwisePlan &plan, int64_t n_rows, const DepthwiseBlock *blocks, int64_t n_blocks, T *y,
               float *planes) {
    const ConvolutionCall &call = plan.call;
    switch (call.dilation_width == 1 ? call.kernel_width * 10 + call.stride_width : 0) {
        case 31:
            return sum_strip<3, 1>(plan, n_rows, blocks, n_blocks, y, planes);
        case 32:
            return sum_strip<3, 2>(plan, n_rows, blocks, n_blocks, y, planes);
        case 51:
            return sum_strip<5, 1>(plan, n_rows, blocks, n_blocks, y, planes);
        case 52:
            return sum_strip<5, 2>(plan, n_rows, blocks, n_blocks, y, planes);
        case 71:
            return sum_strip<7, 1>(plan, n_rows, blocks, n_blocks, y, planes);
        default:
            return sum_strip<0, 0>(plan, n_rows, blocks, n_blocks, y, planes);
    }
}

// The weights of a block, an image of one row each, and what becomes of the sums: times scale, plus shift.
template <typename T>
void copy_weights(const DepthwisePlan &plan, int64_t channel, const DepthwiseBlock &of) {
    const ConvolutionCall &call = plan.call;
    const T *const kernels = static_cast<const T *>(call.values) + channel * plan.n_taps;
    copy_columns<true>(kernels, 1, plan.n_taps, plan.n_taps, of.n_channels, of.weights);
    const T *const bias = static_cast<const T *>(call.bias);
    float *const scale = scale_of(plan, of), *const shift = scale + BLOCK;
    for (int64_t c = 0; c < BLOCK; ++c) {
        const int64_t o = channel + c;
        const bool exists = c < of.n_channels;
        const float b = exists && bias ? to_float(bias[o]) : 0.0f;
        scale[c] = exists && call.norm_variance ? norm_scale(call, o) : 1.0f;
        shift[c] = exists && call.norm_variance ? norm_shift(call, o, b, scale[c]) : b;
    }
}

template <typename T>
int run_depthwise_task(const void *context, int64_t number) {
    const DepthwisePlan &plan = *static_cast<const DepthwisePlan *>(context);
    const ConvolutionCall &call = plan.call;
    const int64_t strip = number % plan.n_strips, group = number / plan.n_strips % plan.n_groups;
    const int64_t image = number / plan.n_strips / plan.n_groups, first_channel = group * plan.group * BLOCK;
    const int64_t top = strip * plan.strip_rows, below = call.out_height - top;
    const int64_t n_rows = below < plan.strip_rows ? below : plan.strip_rows;
    const int64_t block_floats = plan.weight_floats + plan.image_floats;
    const int64_t sums_floats = call.y_channels_last ? 0 : (plan.strip_rows * call.out_width + WIDTH) * BLOCK;
    float *const memory =
        static_cast<float *>(thread_scratch(size_t(plan.group * block_floats + sums_floats) * sizeof(float)));
    if (!memory) return SPARSIFY_NO_MEMORY;

    DepthwiseBlock blocks[MOST_BLOCKS];
    int64_t n_blocks = 0;
    for (int64_t channel = first_channel; n_blocks < plan.group && channel < call.channels; channel += BLOCK) {
        DepthwiseBlock &of = blocks[n_blocks];
        of.weights = memory + n_blocks++ * block_floats;
        of.image = of.weights + plan.weight_floats;
        of.n_channels = call.channels - channel < BLOCK ? call.channels - channel : BLOCK;
        copy_weights<T>(plan, channel, of);
    }
    if (call.x_column_stride == 1)
        copy_strip<true, T>(plan, image, first_channel, top, n_rows, blocks, n_blocks);
    else
        copy_strip<false, T>(plan, image, first_channel, top, n_rows, blocks, n_blocks);
    const int64_t plane = call.out_height * call.out_width, first = top * call.out_width;
    T *const y = static_cast<T *>(call.y) + image * call.out * plane;
    float *const sums = memory + plan.group * block_floats;
    sum_strip(plan, n_rows, blocks, n_blocks, y + first * call.out + first_channel, sums);
    if (!call.y_channels_last)
        write_planes(sums, n_rows * call.out_width, blocks[0].n_channels, plane, y + first_channel * plane + first);
    return SPARSIFY_OK;
}

// Strips as tall as the cache allows, and low enough that there are a few tasks for each thread.
inline void split_depthwise(DepthwisePlan &plan, int n_threads) {
    const ConvolutionCall &call = plan.call;
    const int64_t tiles = (call.out_width + TILE - 1) / TILE, n_blocks = (call.channels + BLOCK - 1) / BLOCK;
    plan.n_taps = call.kernel_height * call.kernel_width;
    plan.columns = (tiles * TILE - 1) * call.stride_width + (call.kernel_width - 1) * call.dilation_width + 1;
    if (plan.columns < call.left) plan.columns = call.left;
    const bool last = call.x_column_stride != 1 && call.y_channels_last;
    plan.group = !last ? 1 : n_blocks < MOST_BLOCKS ? n_blocks : MOST_BLOCKS;
    const int64_t overlap = (call.kernel_height - 1) * call.dilation_height + 1;
    const int64_t row_bytes = plan.columns * BLOCK * int64_t(sizeof(float));
    if (2 * overlap * plan.group * row_bytes > DEPTHWISE_STRIP_BYTES) plan.group = 1;
    plan.n_groups = (n_blocks + plan.group - 1) / plan.group;
    const int64_t fitting = (DEPTHWISE_STRIP_BYTES / (plan.group * row_bytes) - overlap) / call.stride_height + 1;
    const int64_t most_rows = fitting < 1 ? 1 : fitting < call.out_height ? fitting : call.out_height;
    const int64_t without = call.n_images * plan.n_groups, wanted = n_threads == 1 ? 1 : 4 * n_threads;
    plan.n_strips = (call.out_height + most_rows - 1) / most_rows;
    if (plan.n_strips * without < wanted) plan.n_strips = (wanted + without - 1) / without;
    if (plan.n_strips > call.out_height) plan.n_strips = call.out_height;
    plan.strip_rows = (call.out_height + plan.n_strips - 1) / plan.n_strips;
    plan.n_strips = (call.out_height + plan.strip_rows - 1) / plan.strip_rows;

    plan.rows = (plan.strip_rows - 1) * call.stride_height + overlap;
    plan.weight_floats = (plan.n_taps + 2) * BLOCK;
    plan.image_floats = plan.rows * plan.columns * BLOCK;
}

template <typename T>
int depthwise(const ConvolutionCall &call) {
    if (call.residual || call.scale || call.channels != call.out || (call.norm_variance && sizeof(T) != sizeof(float)))
        return SPARSIFY_BAD_ARGUMENT;
    DepthwisePlan plan;
    plan.call = call;
    const double positions = double(call.n_images * call.out_height) * double(call.out_width);
    const double flops = 2.0 * positions * double(call.channels * call.kernel_height * call.kernel_width);
    const int n_threads = worthwhile_threads(flops, int(call.n_threads));
    split_depthwise(plan, n_threads);
    return run_tasks(call.n_images * plan.n_groups * plan.n_strips, n_threads, run_depthwise_task<T>, &plan);
}

}  // namespace
