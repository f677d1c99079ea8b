// What this machine can do at most: multiply-adds and bytes read per second, for benchmarks to compare kernels with.
#include <string.h>

#include <atomic>

#include "runtime/system.h"
#include "sparsify.h"

namespace {

double now_s() { return 1e-9 * double(sparsify::now_ns()); }

using Floats4 = float __attribute__((vector_size(16)));
using Floats8 = float __attribute__((vector_size(32)));
using Floats16 = float __attribute__((vector_size(64)));

// One instruction set: its two loops are written once, compilers turn a * b + c into its multiply-add.
// multiply_adds: 12 independent sums hide the latency (two units, four cycles each). read_floats: eight streams of
// one vector, n a multiple of 128.
#define DEFINE_LOOPS(NAME, TARGET, Floats)                                                   \
    TARGET float multiply_adds_##NAME(int64_t rounds, float factor) {                        \
        Floats sums[12], a = Floats{} + factor, b = Floats{} + (1 - factor);                 \
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; ++i) sums[i] = b * float(i);        \
        for (int64_t round = 0; round < rounds; ++round) {                                   \
            _Pragma("GCC unroll 12") for (int i = 0; i < 12; ++i) sums[i] = sums[i] * a + b; \
        }                                                                                    \
        float total = 0;                                                                     \
        for (int i = 0; i < 12; ++i) total += sums[i][0];                                    \
        return total;                                                                        \
    }                                                                                        \
    TARGET float read_floats_##NAME(const float *data, int64_t n) {                          \
        constexpr int lanes = sizeof(Floats) / sizeof(float);                                \
        Floats sums[8] = {};                                                                 \
        const Floats *vectors = reinterpret_cast<const Floats *>(data);                      \
        for (int64_t i = 0; i < n / lanes; i += 8) {                                         \
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; ++j) sums[j] += vectors[i + j];   \
        }                                                                                    \
        float total = 0;                                                                     \
        for (int j = 0; j < 8; ++j) total += sums[j][0];                                     \
        return total;                                                                        \
    }

struct Loops {
    float (*multiply_adds)(int64_t rounds, float factor);
    float (*read_floats)(const float *data, int64_t n);
    int lanes;
};

#define TARGET_OF(FEATURES) __attribute__((target(FEATURES)))
DEFINE_LOOPS(portable, , Floats4)
#if defined(__x86_64__)
DEFINE_LOOPS(avx2, TARGET_OF("avx2,fma"), Floats8)
DEFINE_LOOPS(avx512, TARGET_OF("avx512f,avx512vl,fma"), Floats16)
#endif

// The loops of the kernel in use, so that SPARSIFY_KERNEL sets the roof too.
Loops loops() {
#if defined(__x86_64__)
    if (!strncmp(sparsify_kernel(), "avx512", 6)) return {multiply_adds_avx512, read_floats_avx512, 16};
    if (!strncmp(sparsify_kernel(), "avx", 3)) return {multiply_adds_avx2, read_floats_avx2, 8};
#endif
    return {multiply_adds_portable, read_floats_portable, 4};
}

volatile float sink;  // results go here, so that no loop is left out

// One measurement, by threads of its own that begin together: a team (runtime/team.h) does not say who comes.
template <class Work>
struct Measurement {
    const Work &work;
    double seconds;
    int n_threads;
    std::atomic<int> n_numbered{0}, n_ready{0}, n_done{0};
    std::atomic<int64_t> calls_per_s{0};

    void run() {
        const int thread = n_numbered.fetch_add(1);
        work(thread, true);  // pages touched, clock raised
        n_ready.fetch_add(1);
        while (n_ready.load() < n_threads) sparsify::relax();
        const double start = now_s();
        double end = start;
        int64_t n_calls = 0;
        while (end - start < seconds) {
            work(thread, false);
            ++n_calls;
            end = now_s();
        }
        calls_per_s.fetch_add(int64_t(1e6 * double(n_calls) / (end - start)));  // in millionths
        n_done.fetch_add(1);
    }
};

// Calls `work` on every thread again and again; returns the units that all of them got through per second.
template <class Work>
double units_per_second(double seconds, int n_threads, double units, const Work &work) {
    Measurement<Work> measurement{work, seconds, n_threads};
    for (int i = 1; i < n_threads; ++i)
        if (!sparsify::start_thread([](void *all) { static_cast<Measurement<Work> *>(all)->run(); }, &measurement))
            measurement.n_ready.fetch_add(1), measurement.n_done.fetch_add(1);
    measurement.run();
    while (measurement.n_done.load() < n_threads) sparsify::relax();
    return 1e-6 * units * double(measurement.calls_per_s.load());
}

}  // namespace

extern "C" {

double sparsify_measure_fma_gflops(double seconds, int n_threads) {
    if (!(seconds > 0) || n_threads < 1) return SPARSIFY_BAD_ARGUMENT;
    const Loops loop = loops();
    constexpr int64_t rounds = 20000;
    const double flops = 2.0 * 12 * loop.lanes * rounds;
    return 1e-9 *
           units_per_second(seconds, n_threads, flops, [&](int, bool) { sink = loop.multiply_adds(rounds, 0.999f); });
}

double sparsify_measure_read_gbs(double seconds, int n_threads, int64_t bytes) {
    if (!(seconds > 0) || n_threads < 1) return SPARSIFY_BAD_ARGUMENT;
    const int64_t floats = bytes / (512 * n_threads) * 128;  // of each thread
    if (floats < 128) return SPARSIFY_BAD_ARGUMENT;
    float *data = static_cast<float *>(sparsify::allocate_pages(size_t(floats * n_threads) * 4));
    if (!data) return SPARSIFY_NO_MEMORY;
    const Loops loop = loops();
    const double rate = units_per_second(seconds, n_threads, 4.0 * double(floats), [&](int thread, bool first) {
        float *own = data + floats * thread;
        if (first) memset(own, 0, size_t(floats) * 4);
        sink = loop.read_floats(own, floats);
    });
    sparsify::free_pages(data);
    return 1e-9 * rate;
}
}
