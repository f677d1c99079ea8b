// Chooses the instruction set once, and turns the exported calls into calls of its table.
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "sparsify.h"

namespace sparsify {
namespace {

bool runs_here(const KernelTable *table) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (table == avx512_table())
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
    if (table == avx2_table())
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
    return table == portable_table();
}

struct Choice {
    const KernelTable *table;
    int status;
};

Choice choose(const char *name) {
    const KernelTable *const best_first[] = {avx512_table(), avx2_table(), portable_table()};
    const bool any = !name || !*name;
    int status = SPARSIFY_UNKNOWN_KERNEL;
    for (const KernelTable *table : best_first) {
        if (!table || (!any && strcmp(name, table->name) != 0)) continue;
        if (runs_here(table)) return {table, SPARSIFY_OK};
        status = SPARSIFY_UNSUPPORTED_KERNEL;
    }
    return {choose(nullptr).table, status};
}

Choice &current() {
    static Choice choice = choose(getenv("SPARSIFY_KERNEL"));
    return choice;
}

int linear(Form form, Dtype dtype, const LinearCall &call) {
    if (call.tokens < 0 || call.out < 0 || call.in < 0 || call.n_threads < 1 || call.activation < SPARSIFY_NONE ||
        call.activation > SPARSIFY_SILU)
        return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;  // SPARSIFY_KERNEL asks for what is not here: no silent fallback
    if (call.tokens == 0 || call.out == 0) return SPARSIFY_OK;
    return current().table->linear[form][dtype](call);
}

}  // namespace
}  // namespace sparsify

using namespace sparsify;

extern "C" {

const char *sparsify_known_kernels(void) {
#if defined(__x86_64__)
    return "avx512 avx2 portable";
#else
    return "portable";
#endif
}

const char *sparsify_kernel(void) { return current().table->name; }

int sparsify_kernel_status(void) { return current().status; }

int sparsify_set_kernel(const char *name) {
    const Choice choice = choose(name);
    if (choice.status == SPARSIFY_OK) current() = choice;
    return choice.status;
}

#define DEFINE_LINEAR(form, FORM, dtype, DTYPE, T)                                                                     \
    int sparsify_linear_##form##_##dtype(const uint8_t *index, const T *values, const T *bias, const T *x,             \
                                         int64_t x_stride, T *y, int64_t y_stride, int64_t tokens, int64_t out,        \
                                         int64_t in, int activation, int n_threads) {                                  \
        return linear(FORM, DTYPE, {index, values, bias, x, x_stride, y, y_stride, tokens, out, in, activation,        \
                                    n_threads});                                                                       \
    }

DEFINE_LINEAR(panel, PANEL, f32, F32, float)
DEFINE_LINEAR(panel, PANEL, bf16, BF16, uint16_t)
DEFINE_LINEAR(bitmask, BITMASK, f32, F32, float)
DEFINE_LINEAR(bitmask, BITMASK, bf16, BF16, uint16_t)
DEFINE_LINEAR(gather, GATHER, f32, F32, float)
DEFINE_LINEAR(gather, GATHER, bf16, BF16, uint16_t)
}
