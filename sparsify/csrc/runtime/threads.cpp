// Threads: who runs the tasks of a call, and the scratch memory each thread owns.
#include "runtime/threads.h"

#include <atomic>

#include "runtime/lent_threads.h"
#include "runtime/system.h"
#include "runtime/team.h"
#include "runtime/thread_policy.h"
#include "sparsify.h"

namespace sparsify {
namespace {

struct Scratch {
    void *memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { free_pages(memory); }
};
thread_local Scratch scratch;

// The tasks that one thread starts with. On a cache line of its own.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};
constexpr int MAX_THREADS = 256;

struct Work {
    Task task;
    const void *context;
    int n_shares;
    Share shares[MAX_THREADS];
    std::atomic<int> status{SPARSIFY_OK};
    int64_t own_work_done_ns = 0;
};

// A member takes its own share, then what is left of every other one: who does not come is not missed.
void take_shares(void *context, int member) {
    Work &work = *static_cast<Work *>(context);
    for (int i = 0, share = member % work.n_shares; i < work.n_shares; ++i, share = (share + 1) % work.n_shares) {
        Share &from = work.shares[share];
        for (int64_t t; (t = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;)
            if (const int error = work.task(work.context, t)) work.status.store(error, std::memory_order_relaxed);
    }
    if (member == 0) work.own_work_done_ns = now_ns();
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
    if (const int status = team_status()) return status;  // no silent fallback
    if (n_threads > n_tasks) n_threads = int(n_tasks);
    if (const Lender *threads = n_threads > 1 ? lender() : nullptr) {
        Lent lent = {task, context, {SPARSIFY_OK}};
        threads->run(threads->self, size_t(n_tasks), run_lent, &lent);
        return lent.status.load(std::memory_order_relaxed);
    }
    if (n_threads > MAX_THREADS) n_threads = MAX_THREADS;
    const bool several = n_threads > 1 && team_has_others();
    const int64_t start = several ? now_ns() : 0;
    if (!several || !team_is_worthwhile(start)) {
        for (int64_t i = 0; i < n_tasks; ++i)
            if (const int status = task(context, i)) return status;
        return SPARSIFY_OK;
    }
    Work work;
    work.task = task;
    work.context = context;
    work.n_shares = n_threads;
    for (int i = 0; i < n_threads; ++i) {
        work.shares[i].next.store(n_tasks * i / n_threads, std::memory_order_relaxed);
        work.shares[i].end = n_tasks * (i + 1) / n_threads;
    }
    run_team(n_threads, take_shares, &work);
    note_call({n_threads, start, work.own_work_done_ns, now_ns()});
    return work.status.load(std::memory_order_relaxed);
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
        free_pages(scratch.memory);
        scratch.bytes = (bytes + 4095) / 4096 * 4096;
        scratch.memory = allocate_pages(scratch.bytes);
        if (!scratch.memory) scratch.bytes = 0;
    }
    return scratch.memory;
}

}  // namespace sparsify
