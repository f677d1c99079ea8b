// The way into every form: is this the CSR that sparsify.h asks for?
#include "runtime/csr.h"
#include "sparsify.h"

namespace sparsify {

int check_csr(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in >= INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (crow[0] != 0) return SPARSIFY_BAD_CSR;
    for (int64_t row = 0; row < out; ++row) {
        if (crow[row + 1] < crow[row] || int64_t(crow[row + 1]) - crow[row] > in) return SPARSIFY_BAD_CSR;
        for (int32_t i = crow[row]; i < crow[row + 1]; ++i)
            if (col[i] < 0 || col[i] >= in || (i > crow[row] && col[i] <= col[i - 1])) return SPARSIFY_BAD_CSR;
    }
    return SPARSIFY_OK;
}

}  // namespace sparsify
