// The kernels that multiply quads by dot products; all others are those of NEON.
// Compiled with its own flags (setup.py).
#include "simd/expand_bytes_neon.h"
#include "simd/quads_neon.h"
// after the vectors
#include "activation.inc.h"
#include "quads/fill.inc.h"
// after filling
#include "few_quantized_mlp.inc.h"
#include "quads/kernel.inc.h"
#include "quads/mlp.inc.h"
#include "quadsteps/kernel.inc.h"
#include "tilemask/quadmask.inc.h"
// after the kernels
#include "isa/dtypes.inc.h"

namespace sparsify {

const KernelTable *neondot_table() {
    static const KernelTable table = [] {
        KernelTable with_dot = *neon_table();
        with_dot.name = "neondot";
        replace(with_dot.linear_int8[SPARSIFY_QUADS], OF_DTYPES(linear_quads));
        replace(with_dot.mlp[SPARSIFY_QUADS], OF_DTYPES(mlp_quads));
        replace(with_dot.linear_int8[SPARSIFY_QUADMASK], OF_FORM(linear_quantized_blocks, Quadmask));
        replace(with_dot.linear_int8[SPARSIFY_QUADSTEPS], OF_FORM(linear_quantized_blocks, Quadsteps));
        replace(with_dot.linear_int8[SPARSIFY_WIDESTEPS], OF_FORM(linear_quantized_blocks, Widesteps));
        replace(with_dot.mlp[SPARSIFY_QUADMASK], OF_FORM(mlp_quantized_blocks, Quadmask));
        replace(with_dot.mlp[SPARSIFY_QUADSTEPS], OF_FORM(mlp_quantized_blocks, Quadsteps));
        return with_dot;
    }();
    return &table;
}

}  // namespace sparsify
