// The library about itself: its version, its statuses in words, its forms by number.
#include "sparsify.h"

namespace {

#define FORM(NAME, QUANTIZES_INPUTS) \
    {#NAME,                          \
     QUANTIZES_INPUTS,               \
     sparsify_##NAME##_index_bytes,  \
     sparsify_##NAME##_n_values,     \
     sparsify_##NAME##_pack,         \
     sparsify_##NAME##_check,        \
     sparsify_##NAME##_nnz,          \
     sparsify_##NAME##_unpack}

const sparsify_form_functions FORMS[SPARSIFY_N_FORMS] = {
    FORM(panel, 0),     FORM(bitmask, 0),  FORM(gather, 0), FORM(quads, 1),     FORM(quadmask, 1),
    FORM(quadsteps, 1), FORM(pairmask, 0), FORM(sell, 0),   FORM(widesteps, 1),
};

}  // namespace

extern "C" {

const char *sparsify_version(void) { return SPARSIFY_VERSION; }

const sparsify_form_functions *sparsify_form(int form) {
    return form >= 0 && form < SPARSIFY_N_FORMS ? &FORMS[form] : nullptr;
}

const char *sparsify_status_text(int status) {
    switch (status) {
        case SPARSIFY_OK:
            return "done";
        case SPARSIFY_FOUND:
            return "found";
        case SPARSIFY_BAD_CSR:
            return "no CSR matrix of this shape: pointers must rise from 0, columns must rise within a row";
        case SPARSIFY_BAD_INDEX:
            return "the packed index is damaged or belongs to another form or shape";
        case SPARSIFY_BAD_ARGUMENT:
            return "argument out of range";
        case SPARSIFY_NO_MEMORY:
            return "out of memory";
        case SPARSIFY_UNKNOWN_KERNEL:
            return "unknown kernel";
        case SPARSIFY_UNSUPPORTED_KERNEL:
            return "this processor lacks the instructions of the kernel";
        case SPARSIFY_UNKNOWN_THREADS:
            return "SPARSIFY_THREADS names no team of threads of the native kernels: openmp (Linux), pool or serial";
        case SPARSIFY_BAD_FILE:
            return "no checkpoint, or a damaged one";
        case SPARSIFY_NOT_FOUND:
            return "no layer or tensor of that name";
        default:
            return "unknown status";
    }
}
}
