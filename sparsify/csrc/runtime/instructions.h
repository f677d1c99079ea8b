// Which instructions this processor has, and the system lets a process use.
#pragma once

namespace sparsify {

struct Instructions {
    bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false;  // x86-64
    bool amx_bf16_int8 = false;                                              // whether the processor has them
    bool dot_products = false;                                               // aarch64
};

// Looked up once.
const Instructions &instructions();

}  // namespace sparsify
