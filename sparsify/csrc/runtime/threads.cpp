// Threads: who runs the tasks of a call, and the scratch memory each thread owns.
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include <atomic>

#include "runtime/lent_threads.h"
#include "runtime/thread_policy.h"
#include "runtime/threads.h"
#include "sparsify.h"

namespace sparsify {
namespace {

// After fork() the child has only the thread that called it, but libgomp still believes in its pool and would wait for
// ever. The child therefore computes alone.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

struct Scratch {
    void *memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { free(memory); }
};
thread_local Scratch scratch;

// The tasks that one thread starts with. On a cache line of its own.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};
constexpr int MAX_THREADS = 256;

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

struct Lent {
    Task task;
    const void *context;
    std::atomic<int> status;
};

void run_lent(void *context, size_t i) {
    Lent &lent = *static_cast<Lent *>(context);
    if (const int error = lent.task(lent.context, int64_t(i))) lent.status.store(error, std::memory_order_relaxed);
}

}  // namespace

int run_tasks(int64_t n_tasks, int n_threads, Task task, const void *context) {
    if (n_threads > n_tasks) n_threads = int(n_tasks);
    if (const Lender *threads = n_threads > 1 ? lender() : nullptr) {
        Lent lent = {task, context, {SPARSIFY_OK}};
        threads->run(threads->self, size_t(n_tasks), run_lent, &lent);
        return lent.status.load(std::memory_order_relaxed);
    }
    if (n_threads > MAX_THREADS) n_threads = MAX_THREADS;
    const bool several = n_threads > 1 && fork_handler == 0 && !forked.load(std::memory_order_relaxed);
    const int64_t start = several ? now_ns() : 0;
    if (!several || !team_is_worthwhile(start)) {
        for (int64_t i = 0; i < n_tasks; ++i)
            if (const int status = task(context, i)) return status;
        return SPARSIFY_OK;
    }
    Share shares[MAX_THREADS];
    for (int i = 0; i < n_threads; ++i) {
        shares[i].next.store(n_tasks * i / n_threads, std::memory_order_relaxed);
        shares[i].end = n_tasks * (i + 1) / n_threads;
    }
    std::atomic<int> status{SPARSIFY_OK};
    int64_t own_work_done = start;
#pragma omp parallel num_threads(n_threads)
    {
        // The runtime may grant fewer threads than asked for: whoever is there takes every share.
        for (int i = 0, share = omp_get_thread_num(); i < n_threads; ++i, share = (share + 1) % n_threads) {
            Share &from = shares[share];
            for (int64_t t; (t = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;)
                if (const int error = task(context, t)) status.store(error, std::memory_order_relaxed);
        }
        if (omp_get_thread_num() == 0) own_work_done = now_ns();
    }
    note_call({n_threads, start, own_work_done, now_ns()});
    return status.load(std::memory_order_relaxed);
}

int worthwhile_threads(double flops, int n_threads) {
    // Waking a thread and joining it costs 2 to 5 us; so many flops take the kernels for one token 10 to 25 us.
    constexpr double FLOPS_PER_THREAD = 2e5;
    const double worth = 1 + flops / FLOPS_PER_THREAD;
    return worth < n_threads ? int(worth) : n_threads;
}

int64_t next_call_id() {
    static std::atomic<int64_t> last{0};
    return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

void *thread_scratch(size_t bytes) {
    if (scratch.bytes < bytes) {
        free(scratch.memory);
        scratch.bytes = (bytes + 4095) / 4096 * 4096;
        scratch.memory = aligned_alloc(4096, scratch.bytes);
        if (!scratch.memory) scratch.bytes = 0;
    }
    return scratch.memory;
}

}  // namespace sparsify
