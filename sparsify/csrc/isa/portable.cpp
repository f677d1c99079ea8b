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
#include "few_quantized_mlp.inc.h"
#include "quads/kernel.inc.h"
#include "quads/mlp.inc.h"
#include "quadsteps/kernel.inc.h"
#include "tilemask/pairmask.inc.h"
#include "tilemask/quadmask.inc.h"
#include "training/clear.inc.h"
#include "training/sddmm.inc.h"
// after the kernels
#include "isa/all_forms.inc.h"

namespace sparsify {

const KernelTable *portable_table() {
    static const KernelTable table = kernels_of_all_forms<GatherPlain>("portable");
    return &table;
}

}  // namespace sparsify
