// The kernels that multiply quads with VNNI; all others are those of AVX-512.
#include "simd/expand_bytes_avx512.h"
#include "simd/quads_avx512.h"
// after the vectors
#include "activation.inc.h"
#include "quads/fill_avx512.inc.h"
// after filling
#include "few_quantized_mlp.inc.h"
#include "quads/kernel.inc.h"
#include "quads/mlp.inc.h"
#include "quadsteps/kernel.inc.h"
#include "tilemask/quadmask.inc.h"
// after the kernels
#include "isa/dtypes.inc.h"

namespace sparsify {

const KernelTable *avx512vnni_table() {
    static const KernelTable table = [] {
        KernelTable with_vnni = *avx512_table();
        with_vnni.name = "avx512vnni";
        replace(with_vnni.linear_int8[SPARSIFY_QUADS], OF_DTYPES(linear_quads));
        replace(with_vnni.mlp[SPARSIFY_QUADS], OF_DTYPES(mlp_quads));
        replace(with_vnni.linear_int8[SPARSIFY_QUADMASK], OF_FORM(linear_quantized_blocks, Quadmask));
        replace(with_vnni.linear_int8[SPARSIFY_QUADSTEPS], OF_FORM(linear_quantized_blocks, Quadsteps));
        replace(with_vnni.linear_int8[SPARSIFY_WIDESTEPS], OF_FORM(linear_quantized_blocks, Widesteps));
        replace(with_vnni.mlp[SPARSIFY_QUADMASK], OF_FORM(mlp_quantized_blocks, Quadmask));
        replace(with_vnni.mlp[SPARSIFY_QUADSTEPS], OF_FORM(mlp_quantized_blocks, Quadsteps));
        return with_vnni;
    }();
    return &table;
}

}  // namespace sparsify
