// The order of inputs in which quads are full.
#pragma once

#include <cstdint>

namespace sparsify {

// Writes inputs[quads_of(in)][4] for a sound CSR matrix. Returns a sparsify_status.
int order_inputs(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, int32_t *inputs);

}  // namespace sparsify
