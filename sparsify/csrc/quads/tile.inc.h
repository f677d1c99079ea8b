// Out of a tile of the quads form: sums become outputs. Include after quads/fill.inc.h or its like.
#pragma once

#include "panel/format.h"
#include "quads/format.h"
#include "sparsify.h"

namespace {

// y[token][row] = activation((sums - zero_point[token] * row_sums[row]) * (step[token] * scale[row]) + bias[row]).
template <int V, typename T>
void empty_quads(const int32_t *sums, const TokenScales &tokens, const int32_t *row_sums, const float *scale,
                 const T *bias, T *y, int64_t y_stride, int64_t n_tokens, int64_t n_rows, int activation,
                 bool few_inputs) {
    // zero_point * row_sum = zero_point * (low + 128 high), products of 16 bits; too little for many inputs.
    int32_t minus_zeros[V * WIDTH];
    for (int t = 0; t < V * WIDTH; ++t) {
        const uint32_t minus = t < n_tokens ? uint32_t(-tokens.zero_point[t]) : 0;
        minus_zeros[t] = int32_t((minus & 0xffff) | minus << 7 << 16);
    }
    for (int v = 0; v < V && v * WIDTH < n_tokens; ++v) {
        const int64_t here = n_tokens - v * WIDTH;
        for (int64_t row = 0; row < n_rows; row += WIDTH) {
            const int width = n_rows - row < WIDTH ? int(n_rows - row) : WIDTH;
            const Vec b = bias ? load_first(bias + row, width) : zero();
            const Vec s = load_first(scale + row, width);
            const IntVec of_rows = load_first(row_sums + row, width), in_parts = low_and_high(of_rows);
            T *to = y + v * WIDTH * y_stride + row;
            Vec r[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i) r[i] = bits_as_float(load(sums + ((row + i) * V + v) * WIDTH));
            transpose(r);
            for (int t = 0; t < WIDTH && t < here; ++t) {
                const int token = v * WIDTH + t;
                const IntVec sum = bits_as_int(r[t]);
                const IntVec exact = few_inputs ? add_pairs(in_parts, set1(minus_zeros[token]), sum)
                                                : sub(sum, mul(set1(tokens.zero_point[token]), of_rows));
                const Vec product = rounded(mul(to_float(exact), rounded(mul(set1(tokens.step[token]), s))));
                const Vec out = activate(bias ? add(product, b) : product, activation);
                if (width == WIDTH)
                    store(to + t * y_stride, out);
                else
                    store_first(to + t * y_stride, out, width);
            }
        }
    }
}

}  // namespace
