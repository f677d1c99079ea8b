// Into a tile of the quads form with AVX-512, as quads/fill.inc.h does: four tokens become bytes of one int32 for each
// input; transposed, these are a *plane* for each input, the bytes of all tokens; and the planes of the four inputs of
// a quad, wherever they are, are interleaved. 6 shuffles a quad and 16 tokens.
#pragma once

#include "quads/format.h"
#include "quantize.inc.h"

namespace {

using namespace sparsify;

// Of the quantised tokens of a tile.
struct TokenScales {
    float step[64];
    int32_t zero_point[64];
};

inline int64_t padded_inputs(int64_t in) { return (in + 15) / 16 * 16; }

template <int V>
constexpr int64_t PLANE_BYTES = V <= 2 ? 16 * V : 64;

// What fill_quads needs of scratch memory for V vectors of tokens: the int32, then planes, the last one of zeros.
template <int V>
inline int64_t fill_scratch_bytes(int64_t in) {
    return padded_inputs(in) * 16 * V + (padded_inputs(in) + 1) * PLANE_BYTES<V>;
}

// to[k] = the bytes of input k of n_tokens <= 4 tokens, the first lowest.
template <typename T>
inline void quantize_four(const T *x, int64_t x_stride, int64_t n_tokens, int64_t in, float *step, int32_t *zero_point,
                          int32_t *to) {
    Vec factor[4];
    IntVec zeros[4];
    const T *from[4];
    for (int t = 0; t < 4; ++t) {
        const bool there = t < n_tokens;
        from[t] = there ? x + t * x_stride : x;
        const RowQuantization row = there ? row_quantization(from[t], in) : RowQuantization{0, 0, 0};
        factor[t] = set1(row.factor);
        zeros[t] = set1(row.zero_point);
        step[t] = row.step;
        zero_point[t] = row.zero_point;
    }
    const IntVec most = set1(255);
    const auto put = [&](int64_t k, auto load_token) {
        IntVec q[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {  // never below 0: the least x becomes it
            const IntVec nearest = _mm512_cvtps_epi32(mul(load_token(from[t] + k), factor[t]));
            q[t] = _mm512_min_epu32(add(nearest, zeros[t]), most);
        }
        const IntVec low = _mm512_or_si512(q[0], _mm512_slli_epi32(q[1], 8));
        const IntVec high = _mm512_or_si512(_mm512_slli_epi32(q[2], 16), _mm512_slli_epi32(q[3], 24));
        store(to + k, _mm512_or_si512(low, high));
    };
    int64_t k = 0;
    for (; k + 16 <= in; k += 16) put(k, [](const T *p) { return load(p); });
    if (k < in) put(k, [&](const T *p) { return load_first(p, int(in - k)); });
}

// Planes of 64 tokens in an order that interleave_planes turns into the right one.
template <int V>
inline void make_planes(const int32_t *fours, int64_t padded, uint8_t *planes) {
    for (int64_t k = 0; k < padded; k += 16) {
        if constexpr (V > 2) {
            Vec r[16];
#pragma GCC unroll 16
            for (int d = 0; d < 16; ++d) {
                const int group = d % 4 * 4 + d / 4;
                r[d] = group < 4 * V ? bits_as_float(load(fours + group * padded + k)) : zero();
            }
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_storeu_ps(planes + (k + i) * 64, r[i]);
        } else {
            for (int v = 0; v < V; ++v) {
                const int32_t *of = fours + 4 * v * padded + k;
                const IntVec a = load(of), b = load(of + padded), c = load(of + 2 * padded), d = load(of + 3 * padded);
                const IntVec ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
                const IntVec cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
                const IntVec plane[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0),
                                         _mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1)};
                uint8_t *to = planes + k * PLANE_BYTES<V> + 16 * v;
                const auto put = [&](int input, __m128i bytes) {
                    _mm_storeu_si128((__m128i *)(to + input * PLANE_BYTES<V>), bytes);
                };
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    put(i, _mm512_castsi512_si128(plane[i]));
                    put(4 + i, _mm512_extracti32x4_epi32(plane[i], 1));
                    put(8 + i, _mm512_extracti32x4_epi32(plane[i], 2));
                    put(12 + i, _mm512_extracti32x4_epi32(plane[i], 3));
                }
            }
        }
    }
}

template <int V>
inline void interleave_planes(const uint8_t *const (&from)[4], uint32_t *to) {
    if constexpr (V > 2) {
        IntVec p[4];
        for (int i = 0; i < 4; ++i) p[i] = _mm512_loadu_si512(from[i]);
        const IntVec low[2] = {_mm512_unpacklo_epi8(p[0], p[1]), _mm512_unpacklo_epi8(p[2], p[3])};
        const IntVec high[2] = {_mm512_unpackhi_epi8(p[0], p[1]), _mm512_unpackhi_epi8(p[2], p[3])};
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low[0], low[1]));
        _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(low[0], low[1]));
        _mm512_storeu_si512(to + 32, _mm512_unpacklo_epi16(high[0], high[1]));
        if (V > 3) _mm512_storeu_si512(to + 48, _mm512_unpackhi_epi16(high[0], high[1]));
    } else {
        for (int v = 0; v < V; ++v) {
            IntVec p[4];
            for (int i = 0; i < 4; ++i)
                p[i] = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from[i] + 16 * v)));
            const IntVec low = _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 8));
            const IntVec high = _mm512_or_si512(_mm512_slli_epi32(p[2], 16), _mm512_slli_epi32(p[3], 24));
            _mm512_storeu_si512(to + 16 * v, _mm512_or_si512(low, high));
        }
    }
}

// As in quads/fill.inc.h.
template <int V, typename T>
void fill_quads(const T *x, int64_t x_stride, int64_t n_tokens, int64_t in, const uint8_t *inputs, int64_t k_block,
                uint8_t *scratch, TokenScales &scales, uint32_t *tile) {
    const int64_t padded = padded_inputs(in), n_quads = quads_of(in);
    int32_t *const fours = reinterpret_cast<int32_t *>(scratch);
    uint8_t *const planes = scratch + padded * 16 * V;
    for (int group = 0; group < 4 * V; ++group) {
        const int64_t left = n_tokens - 4 * group;
        int32_t *to = fours + group * padded;
        if (left > 0)
            quantize_four(x + 4 * group * x_stride, x_stride, left, in, scales.step + 4 * group,
                          scales.zero_point + 4 * group, to);
        else
            memset(to, 0, size_t(padded) * sizeof *to);
    }
    make_planes<V>(fours, padded, planes);
    memset(planes + padded * PLANE_BYTES<V>, 0, PLANE_BYTES<V>);
    int64_t until_zeros = k_block;
    for (int64_t quad = 0; quad < n_quads; ++quad, tile += V * 16) {
        int32_t four[4];
        memcpy(four, inputs + 16 * quad, sizeof four);
        const uint8_t *from[4];
        for (int i = 0; i < 4; ++i) from[i] = planes + (four[i] == QUADS_NO_INPUT ? padded : four[i]) * PLANE_BYTES<V>;
        interleave_planes<V>(from, tile);
        if (--until_zeros == 0) {
            tile += V * 16;
            until_zeros = k_block;
        }
    }
}

}  // namespace
