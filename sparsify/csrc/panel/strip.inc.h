// Images on their way into tiles of the panel form: the tokens of a convolution are its output positions.
//
// A weight (out, channels * kernel height * kernel width) has a column for each channel and tap, a position of its
// kernel; the row of a tile for such a column is the image of that channel, moved by the tap. Output positions are
// numbered row by row and image by image, so that a tile can hold the end of one row, or image, and the start of the
// next: maps of 7 x 7 waste no lanes. A *strip* is a run of positions, and a copy of what they read: for each channel
// a plane of rows with their padding, in float32. With a stride over columns, a plane has a part, a *phase*, for each
// remainder of columns divided by it. So what lies side by side in the output lies side by side in a plane, for every
// tap: a row of a tile is a few pieces of a plane, each from a row of the output, at an offset that the tap gives.
#pragma once

#include <string.h>

#include "panel/tile.inc.h"
#include "runtime/kernels.h"
#include "simd/scalar.h"

namespace {

using namespace sparsify;

// The geometry of a strip's planes, the same for all strips of a call.
struct PlaneShape {
    int64_t n_phases, width;            // columns of a phase
    int64_t row_step, rows_per_output;  // rows of the padded image between rows of a plane; of a plane, between outputs
};

inline PlaneShape plane_shape(const ConvolutionCall &call) {
    const bool one_row = call.kernel_height == 1, one_column = call.kernel_width == 1;
    return {one_column ? 1 : call.stride_width,
            call.out_width + (call.kernel_width - 1) * call.dilation_width / call.stride_width,
            one_row ? call.stride_height : 1, one_row ? 1 : call.stride_height};
}

// Rows of a plane that n rows of the output read.
inline int64_t plane_rows(const ConvolutionCall &call, const PlaneShape &shape, int64_t n) {
    return (n - 1) * shape.rows_per_output + (call.kernel_height - 1) * call.dilation_height + 1;
}

struct Strip {
    int64_t first, end;                      // positions
    int64_t image, row, end_image, end_row;  // of the first position; one past those of the last
    int64_t first_rows, whole_rows, n_rows;  // rows of a plane: of the first image, of a whole one, of all
    int64_t plane;                           // floats of a plane, with room for a vector that ends in the last row
};

inline Strip make_strip(const ConvolutionCall &call, const PlaneShape &shape, int64_t first, int64_t end) {
    const int64_t image = call.out_height * call.out_width, last = end - 1;
    Strip strip = {first,
                   end,
                   first / image,
                   first % image / call.out_width,
                   last / image + 1,
                   last % image / call.out_width + 1,
                   0,
                   plane_rows(call, shape, call.out_height),
                   0,
                   0};
    const bool one = strip.end_image == strip.image + 1;
    strip.first_rows = plane_rows(call, shape, (one ? strip.end_row : call.out_height) - strip.row);
    strip.n_rows = strip.first_rows;
    if (!one)
        strip.n_rows += (strip.end_image - strip.image - 2) * strip.whole_rows + plane_rows(call, shape, strip.end_row);
    strip.plane = shape.n_phases * strip.n_rows * shape.width + WIDTH;
    return strip;
}

// The first row in a strip's planes of what belongs to an image.
inline int64_t first_plane_row(const Strip &strip, int64_t image) {
    return image == strip.image ? 0 : strip.first_rows + (image - strip.image - 1) * strip.whole_rows;
}

// The columns of a phase that lie inside of the image: n from the first on, of which that one is column `from`.
struct PhaseColumns {
    int64_t first, n, from;
};

inline PhaseColumns columns_of_phase(const ConvolutionCall &call, const PlaneShape &shape, int64_t phase) {
    // Column i of the phase is column i * stride - before of the image.
    const int64_t stride = call.stride_width, before = call.left - phase;
    const int64_t first = before > 0 ? (before + stride - 1) / stride : 0;
    const int64_t inside = (call.width + before + stride - 1) / stride;
    const int64_t n = (inside < shape.width ? inside : shape.width) - first;
    return {first, n > 0 ? n : 0, first * stride - before};
}

// The rows of a strip's planes that belong to an image: n from the first on, of which that one is row `y` of the image.
struct PlaneRows {
    int64_t first, n, y;
};

inline PlaneRows rows_of_image(const ConvolutionCall &call, const PlaneShape &shape, const Strip &strip,
                               int64_t image) {
    const int64_t top = image == strip.image ? strip.row : 0;
    const int64_t bottom = image == strip.end_image - 1 ? strip.end_row : call.out_height;
    return {first_plane_row(strip, image), plane_rows(call, shape, bottom - top), top * call.stride_height - call.top};
}

// n values, `step` apart, into a row of a plane. A vector may end past them, where it writes zeros: what belongs there
// is written later, or is zero.
template <typename T>
void copy_row(const T *x, int64_t step, int64_t n, float *to) {
    if (step == 1) {
        for (int64_t i = 0; i < n; i += WIDTH)
            store(to + i, n - i >= WIDTH ? load(x + i) : load_first(x + i, int(n - i)));
        return;
    }
    int64_t i = 0;
    if (step == 2)  // two vectors end one value behind the last that is wanted
        for (; i + WIDTH < n; i += WIDTH) store(to + i, evens(load(x + 2 * i), load(x + 2 * i + WIDTH)));
    for (; i < n; ++i) to[i] = to_float(x[i * step]);
}

// planes[channel][phase][row][column] of a strip; zero where the padding is. x has channels first: a channel is read
// row by row as it lies in memory, which processors foresee.
template <typename T>
void copy_planes(const ConvolutionCall &call, const PlaneShape &shape, const Strip &strip, float *planes) {
    for (int64_t channel = 0; channel < call.channels; ++channel, planes += strip.plane) {
        memset(planes, 0, size_t(strip.plane) * sizeof *planes);
        for (int64_t phase = 0; phase < shape.n_phases; ++phase) {
            const PhaseColumns columns = columns_of_phase(call, shape, phase);
            for (int64_t image = strip.image; columns.n > 0 && image < strip.end_image; ++image) {
                const PlaneRows rows = rows_of_image(call, shape, strip, image);
                const T *const from = static_cast<const T *>(call.x) + image * call.x_image_stride +
                                      channel * call.x_channel_stride + columns.from;
                float *to = planes + (phase * strip.n_rows + rows.first) * shape.width + columns.first;
                for (int64_t i = 0; i < rows.n; ++i, to += shape.width) {
                    const int64_t y = rows.y + i * shape.row_step;
                    if (y >= 0 && y < call.height)
                        copy_row(from + y * call.x_row_stride, call.stride_width, columns.n, to);
                }
            }
        }
    }
}

// Up to WIDTH channels of n positions, `step` apart, into a row of each of their planes, as copy_row.
template <typename T>
void transpose_row(const T *x, int64_t step, int64_t n, int64_t n_channels, int64_t plane, float *to) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        const T *from = x + i * step;
        Vec r[WIDTH];
        if (n - i >= WIDTH && n_channels == WIDTH) {
            load_transposed(from, step, r);
#pragma GCC unroll 16
            for (int c = 0; c < WIDTH; ++c) store(to + c * plane + i, r[c]);
        } else {
            for (int t = 0; t < WIDTH; ++t) r[t] = t < n - i ? load_first(from + t * step, int(n_channels)) : zero();
            transpose(r);
            for (int64_t c = 0; c < n_channels; ++c) store(to + c * plane + i, r[c]);
        }
    }
}

// The same planes; x has channels last.
template <typename T>
void transpose_planes(const ConvolutionCall &call, const PlaneShape &shape, const Strip &strip, float *planes) {
    const int64_t step = call.x_column_stride * call.stride_width;
    for (int64_t channel = 0; channel < call.channels; channel += WIDTH) {
        const int64_t left = call.channels - channel, n_channels = left < WIDTH ? left : WIDTH;
        float *const to = planes + channel * strip.plane;
        memset(to, 0, size_t(n_channels * strip.plane) * sizeof *to);
        for (int64_t phase = 0; phase < shape.n_phases; ++phase) {
            const PhaseColumns columns = columns_of_phase(call, shape, phase);
            for (int64_t image = strip.image; columns.n > 0 && image < strip.end_image; ++image) {
                const PlaneRows rows = rows_of_image(call, shape, strip, image);
                const T *const from = static_cast<const T *>(call.x) + image * call.x_image_stride +
                                      channel * call.x_channel_stride + columns.from * call.x_column_stride;
                for (int64_t i = 0; i < rows.n; ++i) {
                    const int64_t y = rows.y + i * shape.row_step;
                    if (y >= 0 && y < call.height)
                        transpose_row(from + y * call.x_row_stride, step, columns.n, n_channels, strip.plane,
                                      to + (phase * strip.n_rows + rows.first + i) * shape.width + columns.first);
                }
            }
        }
    }
}

// taps[i]: how far the values of a tap are from those of the first, in a plane.
inline void find_taps(const ConvolutionCall &call, const PlaneShape &shape, const Strip &strip, int64_t *taps) {
    for (int64_t r = 0; r < call.kernel_height; ++r)
        for (int64_t s = 0; s < call.kernel_width; ++s) {
            const int64_t column = s * call.dilation_width;
            const int64_t row = column % call.stride_width * strip.n_rows + r * call.dilation_height;
            *taps++ = row * shape.width + column / call.stride_width;
        }
}

// A vector from a place in each plane to a place in each row of a tile.
struct Move {
    int64_t from, to;
};

// The moves that fill a row of a tile with n positions of a strip, from `position` on. A vector may end past what it
// is for: the next one, further right, writes over that. Returns how many; there is room for n.
inline int find_moves(const ConvolutionCall &call, const PlaneShape &shape, const Strip &strip, int64_t position,
                      int64_t n, Move *moves) {
    int n_moves = 0;
    for (int64_t done = 0; done < n;) {
        const int64_t row = (position + done) / call.out_width, column = (position + done) % call.out_width;
        const int64_t image = row / call.out_height, top = image == strip.image ? strip.row : 0;
        const int64_t plane_row = first_plane_row(strip, image) + (row % call.out_height - top) * shape.rows_per_output;
        const int64_t left = call.out_width - column, here = left < n - done ? left : n - done;
        for (int64_t i = 0; i < here; i += WIDTH) moves[n_moves++] = {plane_row * shape.width + column + i, done + i};
        done += here;
    }
    return n_moves;
}

// What fills the rows of a tile, for n columns of the weight from the first on.
struct Filling {
    const float *planes;
    int64_t plane;
    const int64_t *taps;
    int64_t n_taps;
    const Move *moves;
    int n_moves;
    int64_t n_positions;  // of the V * WIDTH; the others are 0
};

// N: as many moves, which then need no memory of their own; or 0 for any number.
template <int V, int N>
void fill_rows(const Filling &by, int64_t first, int64_t n, float *tile) {
    Move moves[N ? N : 1];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) moves[i] = by.moves[i];
    int64_t tap = first % by.n_taps;
    const float *channel = by.planes + first / by.n_taps * by.plane;
    for (int64_t k = 0; k < n; ++k, tile += V * WIDTH) {
        const float *from = channel + by.taps[tap];
        if constexpr (N > 0) {
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) store(tile + moves[i].to, load(from + moves[i].from));
        } else {
            for (int i = 0; i < by.n_moves; ++i) store(tile + by.moves[i].to, load(from + by.moves[i].from));
        }
        for (int64_t i = by.n_positions; i < V * WIDTH; i += WIDTH) store(tile + i, zero());
        if (++tap == by.n_taps) {
            tap = 0;
            channel += by.plane;
        }
    }
}

// MOST: rows of 14 positions and more need no more moves. Unrolled: 1.1 to 1.2x at 64 channels, 56 x 56 and 90%.
template <int V, int MOST = V + 4>
void fill_tile_from_strip(const Filling &by, int64_t first, int64_t n, float *tile) {
    if constexpr (MOST == 0) {
        fill_rows<V, 0>(by, first, n, tile);
    } else {
        if (by.n_moves == MOST) return fill_rows<V, MOST>(by, first, n, tile);
        fill_tile_from_strip<V, MOST - 1>(by, first, n, tile);
    }
}

}  // namespace
