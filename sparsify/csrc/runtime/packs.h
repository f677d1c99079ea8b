// What forms of several kinds export from one source: functions that are told the kind first.
#pragma once

#include "sparsify.h"

// FORM packs by index_bytes, n_values and pack of KIND.
#define SPARSIFY_PACKS(FORM, KIND)                                                                               \
    int64_t sparsify_##FORM##_index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {    \
        return index_bytes(KIND, out, in, crow, col);                                                            \
    }                                                                                                            \
    int64_t sparsify_##FORM##_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {       \
        return n_values(KIND, out, in, crow, col);                                                               \
    }                                                                                                            \
    int sparsify_##FORM##_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index, \
                               int64_t *order) {                                                                 \
        return pack(KIND, out, in, crow, col, index, order);                                                     \
    }
