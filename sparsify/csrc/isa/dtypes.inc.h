// A kernel for every dtype, as the tables of instruction sets have them. Include after the kernels.
#pragma once

#include "runtime/kernels.h"
#include "simd/halves.h"

namespace {

using namespace sparsify;

#define OF_DTYPES(KERNEL) {KERNEL<float>, KERNEL<BFloat16>, KERNEL<Float16>}
#define OF_FORM(KERNEL, FORM) {KERNEL<FORM, float>, KERNEL<FORM, BFloat16>, KERNEL<FORM, Float16>}

// For a table that has all kernels but a few from another one.
template <typename Kernel>
inline void replace(Kernel (&in_table)[SPARSIFY_N_DTYPES], const Kernel (&by)[SPARSIFY_N_DTYPES]) {
    for (int dtype = 0; dtype < SPARSIFY_N_DTYPES; ++dtype) in_table[dtype] = by[dtype];
}

}  // namespace
