// The quads form, for many tokens and int8 values: quads of inputs, multiplied by instructions that take four products
// at once. What lies where in `index`, shared by the packer and the kernels.
//
// Inputs are put in an order (quads/order.h) in which four neighbours, a *quad*, tend to be kept by the same rows, and
// a row multiplies the quads of which it keeps a weight. So a weight of the form is a panel (panel/format.h) whose
// columns are quads and whose values are four int8, zero where a weight is not kept.
//
//   QuadsHeader
//   int32 inputs[n_quads][4]           the input in each place; QUADS_NO_INPUT where there is none: it counts as 0
//   uint8 kept[(n_panel_values + 1) / 2]   4 bits for each value of the panel, the first in the lower ones; bit i: the
//                                      weight of input i is kept. Kernels read none of it: it is for unpack
//   (up to a multiple of 64 bytes)
//   the index of a panel of out rows and n_quads columns
//
// values: four bytes for each value of the panel in its order; then int32 row_sums[out], the sums of the weights of
// each row, with which a kernel takes out the zero point of the activations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "panel/format.h"

namespace sparsify {

constexpr uint32_t QUADS_MAGIC = 0x31445551;  // "QUD1"
constexpr int32_t QUADS_NO_INPUT = -1;

struct QuadsHeader {
    uint32_t magic, unused;
    int64_t out, in, nnz;
    int64_t n_panel_values;
    int64_t unused2[3];
};
static_assert(sizeof(QuadsHeader) == 64, "the layout of the blob");

struct QuadWeights {
    int8_t of_input[4];
};

static inline int64_t quads_of(int64_t in) { return (in + 3) / 4; }

static inline int64_t quads_n_values(int64_t out, int64_t n_panel_values) { return 4 * (n_panel_values + out); }

struct QuadsSections {
    int64_t inputs, kept, panel;  // byte offsets in index
};

static inline QuadsSections quads_sections(int64_t in, int64_t n_panel_values) {
    QuadsSections s;
    s.inputs = int64_t(sizeof(QuadsHeader));
    s.kept = s.inputs + quads_of(in) * 4 * int64_t(sizeof(int32_t));
    s.panel = (s.kept + (n_panel_values + 1) / 2 + 63) / 64 * 64;
    return s;
}

}  // namespace sparsify
