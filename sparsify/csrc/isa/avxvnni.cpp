// The kernels of quads for AVX2 with AVX-VNNI; all others are those of AVX2.
#include "simd/avx2.h"
#include "simd/quads_avx2.h"
// after the vectors
#include "activation.inc.h"
#include "quads/fill.inc.h"
// after filling
#include "quads/kernel.inc.h"
#include "quads/mlp.inc.h"
// after the kernels
#include "isa/dtypes.inc.h"

namespace sparsify {

const KernelTable *avxvnni_table() {
    static const KernelTable table = [] {
        KernelTable with_vnni = *avx2_table();
        with_vnni.name = "avxvnni";
        replace(with_vnni.linear_int8[SPARSIFY_QUADS], OF_DTYPES(linear_quads));
        replace(with_vnni.mlp[SPARSIFY_QUADS], OF_DTYPES(mlp_quads));
        return with_vnni;
    }();
    return &table;
}

}  // namespace sparsify
