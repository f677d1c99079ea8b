// x86-64 is asked by cpuid itself: __builtin_cpu_supports does not know every name in every compiler, and says no to
// all where the compiler's own library has a stub (zig 0.17). Leaves and bits are in Intel's SDM, volume 2A, CPUID.
#include "runtime/instructions.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

namespace sparsify {
namespace {

#if defined(__x86_64__)
struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;  // zeros where the processor has no such leaf
    Leaf(unsigned number, unsigned part) { __get_cpuid_count(number, part, &a, &b, &c, &d); }
};

constexpr unsigned bits() { return 0; }
template <typename... Rest>
constexpr unsigned bits(int first, Rest... rest) {
    return 1u << first | bits(rest...);
}

constexpr bool all(unsigned word, unsigned wanted) { return (word & wanted) == wanted; }

// The registers that the system saves when it changes threads.
unsigned saved_registers() {
    constexpr unsigned OSXSAVE = bits(27);
    if (!all(Leaf(1, 0).c, OSXSAVE)) return 0;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

Instructions look() {
    constexpr unsigned FMA_POPCNT_F16C = bits(12, 23, 29), BMI_AVX2_BMI2 = bits(3, 5, 8),
                       F_DQ_BW_VL = bits(16, 17, 30, 31);
    constexpr unsigned VBMI_VBMI2 = bits(1, 6), VNNI = bits(11), AMX = bits(22, 24, 25), AVX_VNNI = bits(4);
    constexpr unsigned YMM = bits(1, 2), ZMM = bits(1, 2, 5, 6, 7);
    const unsigned saved = saved_registers();
    const Leaf basic(1, 0), extended(7, 0);
    Instructions found;
    found.avx2 = all(saved, YMM) && all(basic.c, FMA_POPCNT_F16C) && all(extended.b, BMI_AVX2_BMI2);
    found.avxvnni = found.avx2 && all(Leaf(7, 1).a, AVX_VNNI);
    found.avx512 = found.avx2 && all(saved, ZMM) && all(extended.b, F_DQ_BW_VL) && all(extended.c, VBMI_VBMI2);
    found.avx512vnni = found.avx512 && all(extended.c, VNNI);
    found.amx_bf16_int8 = found.avx512vnni && all(extended.d, AMX);
    return found;
}
#elif defined(__aarch64__)
Instructions look() {
    Instructions found;
#if defined(__linux__)
    constexpr unsigned long ASIMDDP = 1ul << 20;  // HWCAP_ASIMDDP
    found.dot_products = getauxval(AT_HWCAP) & ASIMDDP;
#elif defined(__APPLE__)
    found.dot_products = true;  // every processor that macOS runs on
#elif defined(_WIN32)
    constexpr DWORD V82_DOT_PRODUCTS = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
    found.dot_products = IsProcessorFeaturePresent(V82_DOT_PRODUCTS);
#endif
    return found;
}
#else
Instructions look() { return {}; }
#endif

}  // namespace

const Instructions &instructions() {
    static const Instructions found = look();
    return found;
}

}  // namespace sparsify
