// The kernels that use AMX; the others are those of AVX-512 with VNNI.
// Compiled with its own flags (setup.py).
#include "simd/expand_bytes_avx512.h"
// after the vectors
#include "activation.inc.h"
#include "few_quantized_mlp.inc.h"
#include "tilemask/pairmask.inc.h"
#include "tilemask/quadmask.inc.h"
// after the kernels
#include "isa/dtypes.inc.h"

namespace sparsify {

const KernelTable *avx512amx_table() {
    static const KernelTable table = [] {
        KernelTable with_amx = *avx512vnni_table();
        with_amx.name = "avx512amx";
        replace(with_amx.linear_int8[SPARSIFY_QUADMASK], OF_FORM(linear_quantized_blocks, Quadmask));
        replace(with_amx.mlp[SPARSIFY_QUADMASK], OF_FORM(mlp_quantized_blocks, Quadmask));
        with_amx.linear[SPARSIFY_PAIRMASK][SPARSIFY_BF16] = linear_pairmask;
        return with_amx;
    }();
    return &table;
}

}  // namespace sparsify
