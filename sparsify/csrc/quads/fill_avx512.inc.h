// Into a tile of the quads form with AVX-512, as quads/fill.inc.h does, 16 tokens at a time: they become rows of bytes,
// and a transpose of these in units of four bytes makes quads of neighbouring inputs. Where the inputs have another
// order, each is split into four *planes*, the bytes of all tokens for one input, and four planes, wherever they are,
// make a quad; a permute of bytes does either.
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

// An odd number of cache lines: rows a power of two apart would share few sets of the cache.
inline int64_t quads_row_bytes(int64_t in) { return ((in + 63) / 64 | 1) * 64; }
inline int64_t padded_inputs(int64_t in) { return (in + 15) / 16 * 16; }

// What fill_quads needs of scratch memory: rows, and planes with one of zeros behind them.
template <int V>
inline int64_t fill_scratch_bytes(int64_t in) {
    return 16 * (quads_row_bytes(in) + padded_inputs(in) + 1);
}

// Byte 4 token + i of a quad is byte 16 i + token of four planes.
struct alignas(64) PlaneOrder {
    uint8_t of_quad[64], of_planes[64];
    constexpr PlaneOrder() : of_quad(), of_planes() {
        for (int i = 0; i < 64; ++i) {
            of_quad[i] = uint8_t(i % 4 * 16 + i / 4);
            of_planes[i] = uint8_t(i % 16 * 4 + i / 16);
        }
    }
};
constexpr PlaneOrder PLANE_ORDER;

// quads[q][token] = the four bytes from rows[token] + 4 q on.
inline void load_quads(const uint8_t *rows, int64_t row_bytes, Vec (&quads)[4]) {
    Vec parts[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
        const auto row = [&](int i) {
            return _mm_castsi128_ps(_mm_loadu_si128((const __m128i *)(rows + (t + i) * row_bytes)));
        };
        parts[t] = _mm512_insertf32x4(_mm512_castps128_ps512(row(0)), row(4), 1);
        parts[t] = _mm512_insertf32x4(_mm512_insertf32x4(parts[t], row(8), 2), row(12), 3);
    }
    transpose_quarters(parts, quads);
}

// One vector of tokens: to[quad], V vectors apart, from `rows`.
template <int V>
inline void fill_in_order(const uint8_t *rows, int64_t in, int64_t k_block, uint32_t *to) {
    const int64_t n_quads = quads_of(in);
    int64_t until_zeros = k_block;
    for (int64_t quad = 0; quad < n_quads; quad += 4, rows += 16) {
        Vec quads[4];
        load_quads(rows, quads_row_bytes(in), quads);
        for (int i = 0; i < 4 && quad + i < n_quads; ++i, to += V * 16) {
            _mm512_storeu_ps(to, quads[i]);
            if (--until_zeros == 0) {
                to += V * 16;
                until_zeros = k_block;
            }
        }
    }
}

// The same in the order of `inputs`.
template <int V>
inline void fill_by_planes(const uint8_t *rows, int64_t in, const uint8_t *inputs, int64_t k_block, uint8_t *planes,
                           uint32_t *to) {
    const int64_t padded = padded_inputs(in), n_quads = quads_of(in);
    const IntVec of_planes = _mm512_load_si512(PLANE_ORDER.of_planes), of_quad = _mm512_load_si512(PLANE_ORDER.of_quad);
    for (int64_t k = 0; k < padded; k += 16) {
        Vec quads[4];
        load_quads(rows + k, quads_row_bytes(in), quads);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            _mm512_storeu_si512(planes + 16 * (k + 4 * i),
                                _mm512_permutexvar_epi8(of_planes, _mm512_castps_si512(quads[i])));
    }
    memset(planes + 16 * padded, 0, 16);
    int64_t until_zeros = k_block;
    for (int64_t quad = 0; quad < n_quads; ++quad, to += V * 16) {
        int32_t four[4];
        memcpy(four, inputs + 16 * quad, sizeof four);
        const auto plane = [&](int i) {
            const int64_t input = four[i] == QUADS_NO_INPUT ? padded : four[i];
            return _mm_loadu_si128((const __m128i *)(planes + 16 * input));
        };
        IntVec bytes = _mm512_inserti32x4(_mm512_castsi128_si512(plane(0)), plane(1), 1);
        bytes = _mm512_inserti32x4(_mm512_inserti32x4(bytes, plane(2), 2), plane(3), 3);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi8(of_quad, bytes));
        if (--until_zeros == 0) {
            to += V * 16;
            until_zeros = k_block;
        }
    }
}

// As in quads/fill.inc.h.
template <int V, typename T>
void fill_quads(const T *x, int64_t x_stride, int64_t n_tokens, int64_t in, const uint8_t *inputs, bool in_order,
                int64_t k_block, uint8_t *rows, TokenScales &scales, uint32_t *tile) {
    const int64_t row_bytes = quads_row_bytes(in);
    for (int v = 0; v < V; ++v) {
        for (int64_t t = 0; t < 16; ++t) {
            const int64_t token = v * 16 + t;
            if (token < n_tokens) {
                int32_t zero_point;
                quantize_row(x + token * x_stride, in, rows + t * row_bytes, scales.step + token, &zero_point);
                scales.minus_zero[token] = minus_zero_point(zero_point, in);
            } else {
                memset(rows + t * row_bytes, 0, size_t(row_bytes));
            }
        }
        if (in_order)
            fill_in_order<V>(rows, in, k_block, tile + v * 16);
        else
            fill_by_planes<V>(rows, in, inputs, k_block, rows + 16 * row_bytes, tile + v * 16);
    }
}

}  // namespace
