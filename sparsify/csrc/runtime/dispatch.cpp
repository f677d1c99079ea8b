// Chooses the instruction set once, and hands calls to its table.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "runtime/instructions.h"
#include "runtime/kernels.h"
#include "runtime/system.h"
#include "sparsify.h"

namespace sparsify {
namespace {

// A table may be asked for only where it runs: the code that makes it is compiled for its instruction set, too.
struct Known {
    const char *name;
    const KernelTable *(*table)();
    bool (*runs_here)();
};

#if defined(__x86_64__)
// Linux gives the registers of AMX to a process that asks.
bool ask_for_amx() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool has_avx512amx() { return instructions().amx_bf16_int8 && ask_for_amx(); }
#endif

const Known best_first[] = {
#if defined(__x86_64__)
    {"avx512amx", avx512amx_table, has_avx512amx},
    {"avx512vnni", avx512vnni_table, [] { return instructions().avx512vnni; }},
    {"avx512", avx512_table, [] { return instructions().avx512; }},
    {"avxvnni", avxvnni_table, [] { return instructions().avxvnni; }},
    {"avx2", avx2_table, [] { return instructions().avx2; }},
#elif defined(__aarch64__)
    {"neondot", neondot_table, [] { return instructions().dot_products; }},
    {"neon", neon_table, [] { return true; }},
#endif
    {"portable", portable_table, [] { return true; }},
};

struct Choice {
    const KernelTable *table;
    int status;
};

Choice choose(const char *name) {
    const bool any = !name || !*name;
    int status = SPARSIFY_UNKNOWN_KERNEL;
    for (const Known &known : best_first) {
        if (!any && strcmp(name, known.name) != 0) continue;
        if (known.runs_here()) return {known.table(), SPARSIFY_OK};
        status = SPARSIFY_UNSUPPORTED_KERNEL;
    }
    return {choose(nullptr).table, status};
}

Choice &current() {
    static Choice choice = choose(getenv("SPARSIFY_KERNEL"));
    return choice;
}

bool is_sound(const sparsify_linear_call &call) {
    return call.tokens >= 0 && call.out >= 0 && call.in >= 0 && call.n_threads >= 1 &&
           call.activation >= SPARSIFY_NONE && call.activation <= SPARSIFY_RELU6 && 0 <= call.first_row &&
           call.first_row <= call.end_row && call.end_row <= call.out;
}

bool has_all_rows(const sparsify_linear_call &call) { return call.first_row == 0 && call.end_row == call.out; }

bool is_sound(const sparsify_convolution_call &call) {
    return call.n_images >= 0 && call.channels >= 0 && call.height >= 0 && call.width >= 0 && call.out >= 0 &&
           call.out_height >= 0 && call.out_width >= 0 && call.kernel_height >= 1 && call.kernel_width >= 1 &&
           call.stride_height >= 1 && call.stride_width >= 1 && call.top >= 0 && call.left >= 0 &&
           call.dilation_height >= 1 && call.dilation_width >= 1 && call.n_threads >= 1 &&
           call.activation >= SPARSIFY_NONE && call.activation <= SPARSIFY_RELU6 &&
           (call.x_column_stride == 1 || call.x_channel_stride == 1) && !call.norm_variance == !call.norm_mean &&
           !(call.norm_variance && call.scale);
}

// A large output is often memory that its allocator has just been given, page by page.
constexpr int64_t LARGE_OUTPUT_BYTES = 4 * 1024 * 1024;

void expect_output(int dtype, void *y, int64_t n) {
    const int64_t bytes = n * (dtype == SPARSIFY_F32 ? 4 : 2);
    if (bytes >= LARGE_OUTPUT_BYTES) prefer_huge_pages(y, size_t(bytes));
}

void expect_output(int dtype, const sparsify_linear_call &call) {
    const int64_t width = call.end_row - call.first_row;
    if (call.y_stride == width) expect_output(dtype, call.y, call.tokens * width);
}

}  // namespace

const KernelTable *kernel_in_use() { return current().table; }

}  // namespace sparsify

using namespace sparsify;

namespace {

int masked_call(int (*const (&of_width)[3])(void *, const uint8_t *, int64_t, int), void *values, const uint8_t *mask,
                int64_t n, int value_bytes, int n_threads) {
    const int width = value_bytes == 2 ? 0 : value_bytes == 4 ? 1 : value_bytes == 8 ? 2 : -1;
    if (n < 0 || width < 0 || n_threads < 1) return SPARSIFY_BAD_ARGUMENT;
    return n ? of_width[width](values, mask, n, n_threads) : SPARSIFY_OK;
}

}  // namespace

extern "C" {

int sparsify_interface(void) { return SPARSIFY_INTERFACE; }

const char *sparsify_known_kernels(void) {
#if defined(__x86_64__)
    return "avx512amx avx512vnni avx512 avxvnni avx2 portable";
#elif defined(__aarch64__)
    return "neondot neon portable";
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

const char *sparsify_kernel_origin(const char *name, int form, int quantized) {
    if (!name || form < 0 || form >= SPARSIFY_N_FORMS) return nullptr;
    const KernelTable *of = nullptr, *origin = nullptr;
    for (const Known &known : best_first) {  // a table comes before the one that it copies
        const bool is_it = strcmp(name, known.name) == 0;
        if (is_it && !known.runs_here()) return known.name;
        if ((!of && !is_it) || !known.runs_here()) continue;
        const KernelTable *table = known.table();
        if (is_it) of = table;
        bool same = true;
        for (int dtype = 0; dtype < SPARSIFY_N_DTYPES; ++dtype)
            same &= quantized ? of->linear_int8[form][dtype] == table->linear_int8[form][dtype]
                              : of->linear[form][dtype] == table->linear[form][dtype];
        if (same) origin = table;
    }
    return origin ? origin->name : nullptr;
}

int sparsify_linear(int form, int dtype, const sparsify_linear_call *call) {
    if (form < 0 || form >= SPARSIFY_N_FORMS || dtype < 0 || dtype >= SPARSIFY_N_DTYPES || !is_sound(*call))
        return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;  // SPARSIFY_KERNEL asks for what is not here: no silent fallback
    const LinearKernel kernel = current().table->linear[form][dtype];
    if (!kernel) return SPARSIFY_BAD_ARGUMENT;
    if (call->tokens == 0 || call->first_row == call->end_row) return SPARSIFY_OK;
    expect_output(dtype, *call);
    return kernel(*call);
}

int sparsify_linear_int8(int form, int dtype, const sparsify_int8_call *call) {
    if (form < 0 || form >= SPARSIFY_N_FORMS || dtype < 0 || dtype >= SPARSIFY_N_DTYPES || !is_sound(call->linear))
        return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    const Int8Kernel kernel = current().table->linear_int8[form][dtype];
    if (!kernel) return SPARSIFY_BAD_ARGUMENT;
    if (call->linear.tokens == 0 || call->linear.first_row == call->linear.end_row) return SPARSIFY_OK;
    expect_output(dtype, call->linear);
    return kernel(*call);
}

int sparsify_sddmm(const sparsify_sddmm_call *call) {
    if (call->tokens < 0 || call->out < 0 || call->in < 0 || call->n_threads < 1) return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    if (call->tokens == 0 || call->out == 0 || call->in == 0) return SPARSIFY_OK;
    return current().table->sddmm(*call);
}

int sparsify_factor_parts(const sparsify_factor_call *call) {
    if (call->n < 0 || call->n_parts < 0 || call->size < 0 || call->n_threads < 1) return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    return call->n_parts && call->size ? current().table->factor(*call) : SPARSIFY_OK;
}

int sparsify_clear_masked(void *values, const uint8_t *mask, int64_t n, int value_bytes, int n_threads) {
    if (current().status) return current().status;
    return masked_call(current().table->clear, values, mask, n, value_bytes, n_threads);
}

int sparsify_hides_values(void *values, const uint8_t *mask, int64_t n, int value_bytes, int n_threads) {
    if (current().status) return current().status;
    return masked_call(current().table->hides, values, mask, n, value_bytes, n_threads);
}

int sparsify_pointwise(int dtype, const sparsify_pointwise_call *call) {
    if (dtype < 0 || dtype >= SPARSIFY_N_DTYPES || call->n_images < 0 || !is_sound(call->image))
        return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    if (call->n_images == 0 || call->image.tokens == 0 || call->image.first_row == call->image.end_row)
        return SPARSIFY_OK;
    if (call->image.y_stride == call->image.tokens && call->y_image_stride == call->image.tokens * call->image.out)
        expect_output(dtype, call->image.y, call->n_images * call->y_image_stride);
    return current().table->pointwise[dtype](*call);
}

int sparsify_mlp(int form, int dtype, const sparsify_mlp_call *call) {
    const sparsify_linear_call &first = call->first, &second = call->second;
    if (form < 0 || form >= SPARSIFY_N_FORMS || dtype < 0 || dtype >= SPARSIFY_N_DTYPES || !is_sound(first) ||
        !is_sound(second) || !has_all_rows(first) || !has_all_rows(second) || first.tokens != second.tokens ||
        first.out != second.in)
        return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    const MlpKernel kernel = current().table->mlp[form][dtype];
    if (!kernel) return SPARSIFY_BAD_ARGUMENT;
    if (second.tokens == 0 || second.out == 0) return SPARSIFY_OK;
    expect_output(dtype, second);
    return kernel(*call);
}

int sparsify_convolution(int dtype, const sparsify_convolution_call *call) {
    if (dtype < 0 || dtype >= SPARSIFY_N_DTYPES || !is_sound(*call)) return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    if (call->n_images == 0 || call->out == 0 || call->out_height == 0 || call->out_width == 0) return SPARSIFY_OK;
    expect_output(dtype, call->y, call->n_images * call->out * call->out_height * call->out_width);
    return current().table->convolution[dtype](*call);
}

int sparsify_depthwise(int dtype, const sparsify_convolution_call *call) {
    if (dtype < 0 || dtype >= SPARSIFY_N_DTYPES || !is_sound(*call)) return SPARSIFY_BAD_ARGUMENT;
    if (current().status) return current().status;
    if (call->n_images == 0 || call->out == 0 || call->out_height == 0 || call->out_width == 0) return SPARSIFY_OK;
    expect_output(dtype, call->y, call->n_images * call->out * call->out_height * call->out_width);
    return current().table->depthwise[dtype](*call);
}
}
