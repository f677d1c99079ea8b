// The kernels of every form for one instruction set. Compiled with its own flags (setup.py).
#include "simd_portable.h"
// after the vectors
#include "activation.inc.h"
#include "panel.inc.h"

namespace sparsify {

const KernelTable *portable_table() {
    static const KernelTable table = {
        "portable",
        {
            {linear_panel<float>, linear_panel<uint16_t>},
            {nullptr, nullptr},
            {nullptr, nullptr},
        },
    };
    return &table;
}

}  // namespace sparsify
