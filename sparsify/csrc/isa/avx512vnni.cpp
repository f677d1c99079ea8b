// The kernels that multiply quads with VNNI; all others are those of AVX-512.
#include "simd/expand_bytes_avx512.h"
#include "simd/quads_avx512.h"
// after the vectors
#include "activation.inc.h"
#include "quads/fill_avx512.inc.h"
// after filling
#include "quads/kernel.inc.h"
#include "quadsteps/kernel.inc.h"
#include "tilemask/quadmask.inc.h"

namespace sparsify {

const KernelTable *avx512vnni_table() {
    static const KernelTable table = [] {
        KernelTable with_vnni = *avx512_table();
        with_vnni.name = "avx512vnni";
        with_vnni.linear_int8[SPARSIFY_QUADS][SPARSIFY_F32] = linear_quads<float>;
        with_vnni.linear_int8[SPARSIFY_QUADS][SPARSIFY_BF16] = linear_quads<uint16_t>;
        with_vnni.linear_int8[SPARSIFY_QUADMASK][SPARSIFY_F32] = linear_quantized_blocks<Quadmask, float>;
        with_vnni.linear_int8[SPARSIFY_QUADMASK][SPARSIFY_BF16] = linear_quantized_blocks<Quadmask, uint16_t>;
        with_vnni.linear_int8[SPARSIFY_QUADSTEPS][SPARSIFY_F32] = linear_quantized_blocks<Quadsteps, float>;
        with_vnni.linear_int8[SPARSIFY_QUADSTEPS][SPARSIFY_BF16] = linear_quantized_blocks<Quadsteps, uint16_t>;
        return with_vnni;
    }();
    return &table;
}

}  // namespace sparsify
