// The sell form (gather/format.h) weight by weight.
#pragma once

#include "gather/plain.inc.h"

namespace {

struct Sell {
    using View = GatherView;
    static constexpr int64_t LEAST_IN = 0;
    static constexpr int MAX_TOKENS = 4;
    static constexpr bool SKIPS_MASKED = true;

    static View view(const uint8_t *index) { return gather_view(index); }

    template <int N, bool EXACT, typename T>
    static void block(const View &view, const T *values, int64_t block, const float *x, int64_t x_stride, float *sums) {
        gather_block_plain<N>(view, values, block, x, x_stride, sums);
    }
};

}  // namespace
