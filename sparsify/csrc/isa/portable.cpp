// The kernels of every form for one instruction set. Compiled with its own flags (setup.py).
#include "simd/portable.h"
#include "simd/expand_bytes_portable.h"
#include "simd/quads_portable.h"
// after the vectors
#include "activation.inc.h"
#include "bitmask/portable.inc.h"
#include "depthwise/kernel.inc.h"
#include "gather/portable.inc.h"
#include "linalg/cholesky.inc.h"
#include "panel/convolution.inc.h"
#include "panel/mlp.inc.h"
#include "quads/fill.inc.h"
// after filling
#include "quads/kernel.inc.h"
#include "quadsteps/kernel.inc.h"
#include "tilemask/pairmask.inc.h"
#include "tilemask/quadmask.inc.h"
#include "training/clear.inc.h"
#include "training/sddmm.inc.h"

namespace sparsify {

const KernelTable *portable_table() {
    static const KernelTable table = {
        "portable",
        {
            {linear_panel<float>, linear_panel<uint16_t>},
            {linear_row_blocks<Bitmask, float>, linear_row_blocks<Bitmask, uint16_t>},
            {linear_row_blocks<Gather, float>, linear_row_blocks<Gather, uint16_t>},
            {nullptr, nullptr},
            {nullptr, nullptr},
            {nullptr, nullptr},
            {nullptr, linear_pairmask},
            {linear_row_blocks<GatherPlain, float>, linear_row_blocks<GatherPlain, uint16_t>},
        },
        {
            {linear_panel_int8<float>, linear_panel_int8<uint16_t>},
            {linear_row_blocks_int8<Bitmask, float>, linear_row_blocks_int8<Bitmask, uint16_t>},
            {linear_row_blocks_int8<Gather, float>, linear_row_blocks_int8<Gather, uint16_t>},
            {linear_quads<float>, linear_quads<uint16_t>},
            {linear_quantized_blocks<Quadmask, float>, linear_quantized_blocks<Quadmask, uint16_t>},
            {linear_quantized_blocks<Quadsteps, float>, linear_quantized_blocks<Quadsteps, uint16_t>},
            {nullptr, nullptr},
            {linear_row_blocks_int8<GatherPlain, float>, linear_row_blocks_int8<GatherPlain, uint16_t>},
        },
        {pointwise_panel<float>, pointwise_panel<uint16_t>},
        {convolution_panel<float>, convolution_panel<uint16_t>},
        {depthwise<float>, depthwise<uint16_t>},
        {mlp_panel<float>, mlp_panel<uint16_t>},
        GATHER_TILE,
        PANEL_PATTERN_DENSITY,
        sddmm_f32,
        factor_f32,
        {clear_masked<uint16_t>, clear_masked<uint32_t>, clear_masked<uint64_t>},
        {hides_values<uint16_t>, hides_values<uint32_t>, hides_values<uint64_t>},
    };
    return &table;
}

}  // namespace sparsify
