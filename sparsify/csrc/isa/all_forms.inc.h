// The table of an instruction set that has kernels for every form. Include after all of them.
#pragma once

#include "isa/dtypes.inc.h"

namespace {

// `Step` has the kernel of the form sell.
template <typename Step>
KernelTable kernels_of_all_forms(const char *name) {
    return {
        name,
        {
            OF_DTYPES(linear_panel),
            OF_FORM(linear_row_blocks, Bitmask),
            OF_FORM(linear_row_blocks, Gather),
            {},
            {},
            {},
            {nullptr, linear_pairmask, nullptr},
            OF_FORM(linear_row_blocks, Step),
            {},
        },
        {
            OF_DTYPES(linear_panel_int8),
            OF_FORM(linear_row_blocks_int8, Bitmask),
            OF_FORM(linear_row_blocks_int8, Gather),
            OF_DTYPES(linear_quads),
            OF_FORM(linear_quantized_blocks, Quadmask),
            OF_FORM(linear_quantized_blocks, Quadsteps),
            {},
            OF_FORM(linear_row_blocks_int8, Step),
            OF_FORM(linear_quantized_blocks, Widesteps),
        },
        OF_DTYPES(pointwise_panel),
        OF_DTYPES(convolution_panel),
        OF_DTYPES(depthwise),
        {
            OF_DTYPES(mlp_panel),
            {},
            {},
            OF_DTYPES(mlp_quads),
            OF_FORM(mlp_quantized_blocks, Quadmask),
            OF_FORM(mlp_quantized_blocks, Quadsteps),
            {},
            {},
            {},
        },
        GATHER_TILE,
        PANEL_PATTERN_DENSITY,
        sddmm_f32,
        factor_f32,
        {clear_masked<uint16_t>, clear_masked<uint32_t>, clear_masked<uint64_t>},
        {hides_values<uint16_t>, hides_values<uint32_t>, hides_values<uint64_t>},
    };
}

}  // namespace
