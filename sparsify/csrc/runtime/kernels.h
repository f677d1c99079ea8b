// The table of kernels that each instruction set exports, and the calls they take. No STL and nothing inline that does
// work: this header is compiled into translation units with different instruction sets, and the linker keeps only one
// copy of an inline function.
#pragma once

#include <cstdint>

#include "gather/format.h"
#include "sparsify.h"

namespace sparsify {

using LinearCall = sparsify_linear_call;
using LinearKernel = int (*)(const LinearCall &);
using Int8Call = sparsify_int8_call;
using Int8Kernel = int (*)(const Int8Call &);
using PointwiseCall = sparsify_pointwise_call;
using PointwiseKernel = int (*)(const PointwiseCall &);
using MlpCall = sparsify_mlp_call;
using MlpKernel = int (*)(const MlpCall &);
using ConvolutionCall = sparsify_convolution_call;
using ConvolutionKernel = int (*)(const ConvolutionCall &);

// One instruction set: its name and a kernel for every form and dtype; null where a form has none.
struct KernelTable {
    const char *name;
    LinearKernel linear[SPARSIFY_N_FORMS][SPARSIFY_N_DTYPES];
    Int8Kernel linear_int8[SPARSIFY_N_FORMS][SPARSIFY_N_DTYPES];
    PointwiseKernel pointwise[SPARSIFY_N_DTYPES];
    ConvolutionKernel convolution[SPARSIFY_N_DTYPES];
    ConvolutionKernel depthwise[SPARSIFY_N_DTYPES];
    MlpKernel mlp[SPARSIFY_N_FORMS][SPARSIFY_N_DTYPES];
    GatherTile gather_tile;  // that pack writes for these kernels
    double pattern_density;  // from which pack gives columns of the panel form to several rows (panel/cell.inc.h)
    int (*sddmm)(const sparsify_sddmm_call &);
    int (*factor)(const sparsify_factor_call &);
    int (*clear[3])(void *values, const uint8_t *mask, int64_t n, int n_threads);  // of 2, 4 and 8 bytes
    int (*hides[3])(void *values, const uint8_t *mask, int64_t n, int n_threads);
};

const KernelTable *portable_table();
const KernelTable *avx2_table();  // this and those that follow on x86-64 alone
const KernelTable *avxvnni_table();
const KernelTable *avx512_table();
const KernelTable *avx512vnni_table();
const KernelTable *avx512amx_table();
const KernelTable *neon_table();  // on aarch64 alone, as the next
const KernelTable *neondot_table();
const KernelTable *kernel_in_use();

// The rows that a call asks for of n rows from `row` on: n of them from `first` on, `skipped` after `row`.
struct Rows {
    int64_t first, skipped, n;
};

static inline Rows part_of_call(const LinearCall &call, int64_t row, int64_t n) {
    const int64_t first = row > call.first_row ? row : call.first_row;
    const int64_t end = row + n < call.end_row ? row + n : call.end_row;
    return {first, first - row, end - first};
}

}  // namespace sparsify
