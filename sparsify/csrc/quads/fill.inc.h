// Into a tile of the quads form, byte by byte; quads/fill_avx512.inc.h is faster.
#pragma once

#include "dequantize.inc.h"
#include "quads/format.h"
#include "quantize.inc.h"

namespace {

using namespace sparsify;

// Of the quantised tokens of a tile.
struct TokenScales {
    float step[64];
    int32_t minus_zero[64];  // dequantize.inc.h
};

inline int64_t quads_row_bytes(int64_t in) { return (in + 63) / 64 * 64 + 64; }

// What fill_quads needs of scratch memory for V vectors of tokens.
template <int V>
inline int64_t fill_scratch_bytes(int64_t in) {
    return quads_row_bytes(in) * V * WIDTH;
}

// tile[quad][token] = the bytes of the quad's inputs, in rows of V * WIDTH; a row of zeros follows k_block quads. Of
// the tokens only n_tokens exist, the others are 0. in_order: inputs[i] is i.
template <int V, typename T>
void fill_quads(const T *x, int64_t x_stride, int64_t n_tokens, int64_t in, const uint8_t *inputs, bool /*in_order*/,
                int64_t k_block, uint8_t *rows, TokenScales &scales, uint32_t *tile) {
    const int64_t row_bytes = quads_row_bytes(in), n_quads = quads_of(in);
    for (int64_t t = 0; t < V * WIDTH; ++t) {
        if (t < n_tokens) {
            int32_t zero_point;
            quantize_row(x + t * x_stride, in, rows + t * row_bytes, scales.step + t, &zero_point);
            scales.minus_zero[t] = minus_zero_point(zero_point, in);
        } else {
            memset(rows + t * row_bytes, 0, size_t(in));
        }
    }
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
    }
}

}  // namespace
