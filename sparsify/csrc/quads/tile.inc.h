// Out of a tile of the quads form: sums become outputs. Include after quads/fill.inc.h or its like.
#pragma once

#include "dequantize.inc.h"
#include "panel/tile.inc.h"
#include "quads/format.h"
#include "sparsify.h"

namespace {

// y[token][row] for the sums [row][V][WIDTH tokens] of n_rows rows.
template <int V, typename T>
void empty_quads(const int32_t *sums, const TokenScales &tokens, const int32_t *row_sums, const float *scale,
                 const T *bias, T *y, int64_t y_stride, int64_t n_tokens, int64_t n_rows, int activation, int64_t in) {
    for (int64_t row = 0; row < n_rows; row += WIDTH) {
        const int width = n_rows - row < WIDTH ? int(n_rows - row) : WIDTH;
        const OutputRows rows = output_rows(row_sums + row, scale + row, bias ? bias + row : nullptr, width, in);
        for (int v = 0; v < V && v * WIDTH < n_tokens; ++v) {
            const int64_t here = n_tokens - v * WIDTH;
            T *to = y + v * WIDTH * y_stride + row;
            Vec r[WIDTH];
            load_transposed(reinterpret_cast<const float *>(sums + (row * V + v) * WIDTH), V * WIDTH, r);
            for (int t = 0; t < WIDTH && t < here; ++t) {
                const int token = v * WIDTH + t;
                const Vec out =
                    output_of(bits_as_int(r[t]), rows, tokens.minus_zero[token], tokens.step[token], activation);
                if (width == WIDTH)
                    store(to + t * y_stride, out);
                else
                    store_first(to + t * y_stride, out, width);
            }
        }
    }
}

}  // namespace
