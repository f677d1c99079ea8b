// The kernels that multiply quads by dot products; all others are those of NEON.
// Compiled with its own flags (setup.py).
#include "simd/expand_bytes_neon.h"
#include "simd/quads_neon.h"
// after the vectors
#include "activation.inc.h"
#include "quads/fill.inc.h"
// after filling
#include "quads/kernel.inc.h"
#include "quadsteps/kernel.inc.h"
#include "tilemask/quadmask.inc.h"

namespace sparsify {

const KernelTable *neondot_table() {
    static const KernelTable table = [] {
        KernelTable with_dot = *neon_table();
        with_dot.name = "neondot";
        with_dot.linear_int8[SPARSIFY_QUADS][SPARSIFY_F32] = linear_quads<float>;
        with_dot.linear_int8[SPARSIFY_QUADS][SPARSIFY_BF16] = linear_quads<uint16_t>;
        with_dot.linear_int8[SPARSIFY_QUADMASK][SPARSIFY_F32] = linear_quantized_blocks<Quadmask, float>;
        with_dot.linear_int8[SPARSIFY_QUADMASK][SPARSIFY_BF16] = linear_quantized_blocks<Quadmask, uint16_t>;
        with_dot.linear_int8[SPARSIFY_QUADSTEPS][SPARSIFY_F32] = linear_quantized_blocks<Quadsteps, float>;
        with_dot.linear_int8[SPARSIFY_QUADSTEPS][SPARSIFY_BF16] = linear_quantized_blocks<Quadsteps, uint16_t>;
        return with_dot;
    }();
    return &table;
}

}  // namespace sparsify
