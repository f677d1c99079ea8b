// In and out of a tile of the panel form, [features][V * WIDTH tokens]: from and to rows of tokens, [tokens][features],
// or planes of features, [features][tokens], as the channels of an image.
#pragma once

#include "panel/format.h"
#include "sparsify.h"

namespace {

// r[j][i] = p[i * stride + j]; a simd header may have a faster one.
template <typename T>
__attribute__((always_inline)) inline void load_transposed(const T *p, int64_t stride, Vec (&r)[WIDTH]) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) r[i] = load(p + i * stride);
    transpose(r);
}

// tile[k][token] = x[token][k] for k < n; of the V * WIDTH tokens only n_tokens exist, the others are 0.
template <int V, typename T>
void fill_tile(const T *x, int64_t x_stride, int64_t n_tokens, int64_t n, float *tile) {
    for (int v = 0; v < V; ++v) {
        const T *rows = x + v * WIDTH * x_stride;
        const int64_t here = n_tokens - v * WIDTH;
        for (int64_t k = 0; k < n; k += WIDTH) {
            const int width = n - k < WIDTH ? int(n - k) : WIDTH;
            float *to = tile + k * (V * WIDTH) + v * WIDTH;
            Vec r[WIDTH];
            if (here >= WIDTH && width == WIDTH) {
                load_transposed(rows + k, x_stride, r);
#pragma GCC unroll 16
                for (int i = 0; i < WIDTH; ++i) store(to + i * (V * WIDTH), r[i]);
            } else {
                for (int t = 0; t < WIDTH; ++t) r[t] = t < here ? load_first(rows + t * x_stride + k, width) : zero();
                transpose(r);
                for (int i = 0; i < width; ++i) store(to + i * (V * WIDTH), r[i]);
            }
        }
    }
}

// What becomes of sums on their way to y: activation(sum * scale + bias + residual), all but the activation may be
// null.
template <typename T>
struct Ending {
    const float *scale;  // of each row
    const T *bias;       // of each row
    const T *residual;   // of each output, where y has it
    int activation;

    // For outputs from a row on, and y moved by `to`.
    Ending from(int64_t row, int64_t to) const {
        return {scale ? scale + row : nullptr, bias ? bias + row : nullptr, residual ? residual + to : nullptr,
                activation};
    }
};

// y[token][row] = ending(sums[row][token]) for n_rows rows and n_tokens tokens. Tokens are the outer loop, so that the
// stores walk along 16 rows of y: 1.05x over rows first at 95%, where the output weighs most.
template <int V, typename T>
void empty_tile(const float *sums, const Ending<T> &by, T *y, int64_t y_stride, int64_t n_tokens, int64_t n_rows) {
    for (int v = 0; v < V && v * WIDTH < n_tokens; ++v) {
        const int64_t here = n_tokens - v * WIDTH;
        for (int64_t row = 0; row < n_rows; row += WIDTH) {
            const int width = n_rows - row < WIDTH ? int(n_rows - row) : WIDTH;
            const Vec b = by.bias ? load_first(by.bias + row, width) : zero();
            T *to = y + v * WIDTH * y_stride + row;
            const T *residual = by.residual ? by.residual + v * WIDTH * y_stride + row : nullptr;
            Vec r[WIDTH];
            load_transposed(sums + (row * V + v) * WIDTH, V * WIDTH, r);
            if (by.scale) {
                const Vec s = load_first(by.scale + row, width);
#pragma GCC unroll 16
                for (int t = 0; t < WIDTH; ++t) r[t] = fma(r[t], s, b);
            } else {
#pragma GCC unroll 16
                for (int t = 0; t < WIDTH; ++t) r[t] = add(r[t], b);
            }
            if (here >= WIDTH && width == WIDTH && by.activation == SPARSIFY_NONE && !residual) {
#pragma GCC unroll 16
                for (int t = 0; t < WIDTH; ++t) store(to + t * y_stride, r[t]);
            } else {
                for (int t = 0; t < WIDTH && t < here; ++t) {
                    Vec out = r[t];
                    if (residual) out = add(out, load_first(residual + t * y_stride, width));
                    out = activate(out, by.activation);
                    if (width == WIDTH)
                        store(to + t * y_stride, out);
                    else
                        store_first(to + t * y_stride, out, width);
                }
            }
        }
    }
}

// As fill_tile, from planes: x[k][token].
template <int V, typename T>
void fill_tile_from_planes(const T *x, int64_t x_stride, int64_t n_tokens, int64_t n, float *tile) {
    for (int64_t k = 0; k < n; ++k)
        for (int v = 0; v < V; ++v) {
            const T *from = x + k * x_stride + v * WIDTH;
            const int64_t here = n_tokens - v * WIDTH;
            const Vec a = here >= WIDTH ? load(from) : here > 0 ? load_first(from, int(here)) : zero();
            store(tile + (k * V + v) * WIDTH, a);
        }
}

// As empty_tile, to planes: y[row][token].
template <int V, typename T>
void empty_tile_to_planes(const float *sums, const Ending<T> &by, T *y, int64_t y_stride, int64_t n_tokens,
                          int64_t n_rows) {
    for (int64_t row = 0; row < n_rows; ++row) {
        const Vec b = by.bias ? broadcast(by.bias + row) : zero();
        for (int v = 0; v < V && v * WIDTH < n_tokens; ++v) {
            const int64_t at = row * y_stride + v * WIDTH, here = n_tokens - v * WIDTH;
            T *to = y + at;
            Vec a = load(sums + (row * V + v) * WIDTH);
            a = by.scale ? fma(a, broadcast(by.scale + row), b) : add(a, b);
            if (by.residual)
                a = add(a, here >= WIDTH ? load(by.residual + at) : load_first(by.residual + at, int(here)));
            a = activate(a, by.activation);
            if (here >= WIDTH)
                store(to, a);
            else
                store_first(to, a, int(here));
        }
    }
}

}  // namespace
