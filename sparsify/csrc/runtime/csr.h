// The check of a CSR matrix that somebody else wrote.
#pragma once

#include <cstdint>

namespace sparsify {

// SPARSIFY_OK if crow and col are a canonical CSR matrix of this shape. Reads col only as far as crow was found sound.
int check_csr(int64_t out, int64_t in, const int32_t *crow, const int32_t *col);

}  // namespace sparsify
