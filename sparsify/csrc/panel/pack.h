// The packer of the panel form, for the forms that are panels of something else than weights.
#pragma once

#include "panel/format.h"

namespace sparsify {

// Packs a sound CSR matrix (runtime/csr.h), or measures when index is null. Writes the header that the index has or
// would have. Patterns of several rows are used from `pattern_density` on, as a share of the weights that is kept.
int pack_panel(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, double pattern_density, uint8_t *index,
               int64_t *order, PanelHeader *header);

}  // namespace sparsify
