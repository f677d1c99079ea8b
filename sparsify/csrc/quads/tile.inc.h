// In and out of a tile of the quads form: rows of tokens are quantised and packed, [quads][V * WIDTH tokens][4], and
// sums become outputs.
#pragma once

#include "few_tokens.inc.h"
#include "panel/format.h"
#include "quads/format.h"
#include "quantize.inc.h"
#include "sparsify.h"

namespace {

// The numbers of the quantised tokens of a tile: x = step * (q - zero_point).
struct Quantization {
    float step[64];
    int32_t zero_point[64];
};

// tile[block][quad][token] = the bytes of the quad's inputs; a row of zeros follows each block of quads.
template <int V>
void fill_quads(const uint8_t *rows, int64_t row_bytes, const uint8_t *inputs, int64_t n_quads, int64_t k_block,
                uint32_t *tile) {
    for (int64_t quad = 0; quad < n_quads; ++quad) {
        int32_t four[4];
        memcpy(four, inputs + 16 * quad, sizeof four);
        uint8_t *to = reinterpret_cast<uint8_t *>(tile + (quad + quad / k_block) * V * WIDTH);
        for (int i = 0; i < 4; ++i) {
            if (four[i] == QUADS_NO_INPUT) {
                for (int t = 0; t < V * WIDTH; ++t) to[4 * t + i] = 0;
            } else {
                for (int t = 0; t < V * WIDTH; ++t) to[4 * t + i] = rows[t * row_bytes + four[i]];
            }
        }
        if (quad % k_block == k_block - 1 || quad == n_quads - 1)
            memset(tile + (quad / k_block * (k_block + 1) + k_block) * V * WIDTH, 0, V * WIDTH * sizeof *tile);
    }
    if (n_quads == 0) memset(tile + k_block * V * WIDTH, 0, V * WIDTH * sizeof *tile);
}

// y[token][row] = activation((sums - zero_point[token] * row_sums[row]) * (step[token] * scale[row]) + bias[row]).
template <int V, typename T>
void empty_quads(const int32_t *sums, const Quantization &tokens, const int32_t *row_sums, const float *scale,
                 const T *bias, T *y, int64_t y_stride, int64_t n_tokens, int64_t n_rows, int activation) {
    for (int v = 0; v < V && v * WIDTH < n_tokens; ++v) {
        const int64_t here = n_tokens - v * WIDTH;
        for (int64_t row = 0; row < n_rows; row += WIDTH) {
            const int width = n_rows - row < WIDTH ? int(n_rows - row) : WIDTH;
            const Vec b = bias ? load_first(bias + row, width) : zero();
            const Vec s = load_first(scale + row, width);
            const IntVec of_rows = load_first(row_sums + row, width);
            T *to = y + v * WIDTH * y_stride + row;
            Vec r[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i) r[i] = bits_as_float(load(sums + ((row + i) * V + v) * WIDTH));
            transpose(r);
            for (int t = 0; t < WIDTH && t < here; ++t) {
                const int token = v * WIDTH + t;
                const IntVec exact = sub(bits_as_int(r[t]), mul(set1(tokens.zero_point[token]), of_rows));
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
