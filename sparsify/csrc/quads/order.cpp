#include "quads/order.h"

#include "quads/format.h"
#include "sparsify.h"

namespace sparsify {

int order_inputs(int64_t, int64_t in, const int32_t *, const int32_t *, int32_t *inputs) {
    for (int64_t i = 0; i < 4 * quads_of(in); ++i) inputs[i] = i < in ? int32_t(i) : QUADS_NO_INPUT;
    return SPARSIFY_OK;
}

}  // namespace sparsify
