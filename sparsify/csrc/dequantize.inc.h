// Exact sums over quantised activations become outputs; sparsify.h has the definition. Include after a simd/quads_*.h
// and activation.inc.h.
#pragma once

#include <stdint.h>

namespace {

// With so many inputs the sum of a row's weights is less than 2^22, and zero_point * row_sum a sum of two products of
// 16 bits: zero_point * (low + 128 high). One instruction, where a product of 32 bits takes two and waits for them.
constexpr int64_t FEW_INPUTS = 33024;

// What WIDTH rows have in common for all tokens.
struct OutputRows {
    IntVec row_sums;
    Vec scale, bias;
    bool few_inputs, has_bias;
};

template <typename T>
inline OutputRows output_rows(const int32_t *row_sums, const float *scale, const T *bias, int width, int64_t in) {
    const bool few = in <= FEW_INPUTS;
    const IntVec sums = load_first(row_sums, width);
    return {few ? low_and_high(sums) : sums, load_first(scale, width), bias ? load_first(bias, width) : zero(), few,
            bias != nullptr};
}

// -zero_point, of bytes less BYTE_OFFSET, as output_of takes it.
inline int32_t minus_zero_point(int32_t zero_point, int64_t in) {
    const uint32_t minus = uint32_t(BYTE_OFFSET - zero_point);
    return int32_t(in <= FEW_INPUTS ? (minus & 0xffff) | minus << 7 << 16 : minus);
}

// activation((sum - zero_point * row_sum) * (step * scale) + bias) for one token.
inline Vec output_of(IntVec sum, const OutputRows &rows, int32_t minus_zero, float step, int activation) {
    const IntVec zeros = set1(minus_zero);
    const IntVec exact = rows.few_inputs ? add_pairs(rows.row_sums, zeros, sum) : add(sum, mul(zeros, rows.row_sums));
    const Vec product = rounded(mul(to_float(exact), rounded(mul(set1(step), rows.scale))));
    return activate(rows.has_bias ? add(product, rows.bias) : product, activation);
}

}  // namespace
