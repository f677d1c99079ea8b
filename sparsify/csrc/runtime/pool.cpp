// A pool: threads that are started when first needed, and wait for the next call.
//
// A call opens a job, runs its own part, and closes the job: who comes later finds it closed. So a call never waits for
// a thread that has not begun, whose core another process holds, but only for those that are amid a task. OpenMP's
// parallel region ends with a barrier for all.
#include "runtime/pool.h"

#include <atomic>
#include <cstdint>
#include <new>

#include "runtime/processors.h"
#include "runtime/system.h"

namespace sparsify {
namespace {

// A thread looks for the next call for so long before it sleeps: to wake one takes 5 to 50 us.
constexpr int64_t SPIN_NS = 200 * 1000;
// From then on it lets others run between its looks: where another process holds a processor, the thread that it waits
// for may be waiting for its own. Without that, the slowest hundredth of short calls took 2.7 times as long there.
constexpr int64_t KEEP_NS = 10 * 1000;
constexpr int LOOKS_PER_TIME = 64;
constexpr int MOST_WORKERS = 255;

// The job as one number, so that a worker comes only to the job that it has seen: its number, a bit that says that it
// is closed, how many may come and how many have.
using Word = uint64_t;
constexpr Word CAME = 0xffff, CLOSED = 1u << 31;
constexpr int LIMIT_SHIFT = 16, NUMBER_SHIFT = 32;
constexpr unsigned came(Word word) { return unsigned(word & CAME); }
constexpr unsigned limit(Word word) { return unsigned(word >> LIMIT_SHIFT & 0x7fff); }
constexpr uint32_t number(Word word) { return uint32_t(word >> NUMBER_SHIFT); }
constexpr bool may_come(Word word) { return !(word & CLOSED) && came(word) < limit(word); }

// Looks until done() or for SPIN_NS, and says whether done() was.
template <typename Done>
bool spin_until(bool worthwhile, Done done) {
    if (done()) return true;
    if (!worthwhile) return false;
    const int64_t start = now_ns();
    int64_t waited = 0;
    do {
        for (int i = 0; i < LOOKS_PER_TIME; ++i) {
            if (done()) return true;
            relax();
        }
        waited = now_ns() - start;
        if (waited > KEEP_NS) give_way();
    } while (waited < SPIN_NS);
    return done();
}

// Never destroyed: its threads may be looking at it while the process ends.
struct Pool {
    alignas(64) std::atomic<Word> job{CLOSED};
    alignas(64) std::atomic<unsigned> gone{0};  // who have done their part of the job
    std::atomic<bool> caller_sleeps{false};
    alignas(64) std::atomic<int> n_sleeping{0};
    std::atomic<bool> in_use{false};
    std::atomic<bool> spins{true};
    // Of whoever has in_use; the body is read by those that have come to its job.
    int n_workers = 0;
    TeamBody body = nullptr;
    void *context = nullptr;
    Monitor workers, caller;

    // Sleeps, in the end, until there is another job than the one seen.
    Word next_job(uint32_t seen) {
        const auto another = [&] { return number(job.load(std::memory_order_seq_cst)) != seen; };
        if (!spin_until(spins.load(std::memory_order_relaxed), another)) {
            workers.enter();
            n_sleeping.fetch_add(1, std::memory_order_seq_cst);
            while (!another()) workers.sleep();
            n_sleeping.fetch_sub(1, std::memory_order_relaxed);
            workers.leave();
        }
        return job.load(std::memory_order_acquire);
    }

    void work(uint32_t seen) {
        for (;;) {
            Word word = next_job(seen);
            while (may_come(word))
                if (job.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) {
                    body(context, int(came(word)) + 1);
                    gone.fetch_add(1, std::memory_order_seq_cst);
                    if (caller_sleeps.load(std::memory_order_seq_cst)) {
                        caller.enter();
                        caller.wake_one();
                        caller.leave();
                    }
                    break;
                }
            seen = number(word);
        }
    }

    void have_workers(int n) {
        if (n > MOST_WORKERS) n = MOST_WORKERS;
        for (; n_workers < n; ++n_workers)
            if (!start_thread([](void *pool) { static_cast<Pool *>(pool)->work(0); }, this)) break;
        // Threads that look for work take processors from those that have some, where there are too few for all.
        spins.store(n_workers < n_processors(), std::memory_order_relaxed);
    }

    void wake(int n) {
        if (n_sleeping.load(std::memory_order_seq_cst) == 0) return;
        workers.enter();
        if (n >= n_workers)
            workers.wake_all();
        else
            for (int i = 0; i < n; ++i) workers.wake_one();
        workers.leave();
    }

    void wait_for(unsigned n) {
        const auto all_gone = [&] { return gone.load(std::memory_order_seq_cst) == n; };
        if (spin_until(spins.load(std::memory_order_relaxed), all_gone)) return;
        caller.enter();
        caller_sleeps.store(true, std::memory_order_seq_cst);
        while (!all_gone()) caller.sleep();
        caller_sleeps.store(false, std::memory_order_relaxed);
        caller.leave();
    }

    // By whoever has in_use.
    void run(int n_others, TeamBody new_body, void *new_context) {
        if (n_workers < n_others) have_workers(n_others);
        body = new_body;
        context = new_context;
        gone.store(0, std::memory_order_relaxed);
        const uint32_t next = number(job.load(std::memory_order_relaxed)) + 1;
        job.store(Word(next) << NUMBER_SHIFT | Word(unsigned(n_others)) << LIMIT_SHIFT, std::memory_order_seq_cst);
        wake(n_others);
        body(context, 0);
        wait_for(came(job.fetch_or(CLOSED, std::memory_order_acq_rel)));
    }
};

std::atomic<Pool *> pool{nullptr};

// The child of a fork has none of the threads: it makes a pool of its own.
const bool forgets_after_fork = call_after_fork([] { pool.store(nullptr, std::memory_order_relaxed); });

Pool *the_pool() {
    Pool *now = pool.load(std::memory_order_acquire);
    if (now || !forgets_after_fork) return now;
    void *const memory = allocate_pages(sizeof(Pool));
    if (!memory) return nullptr;
    Pool *const made = new (memory) Pool;
    if (pool.compare_exchange_strong(now, made, std::memory_order_acq_rel)) return made;
    free_pages(memory);
    return now;
}

}  // namespace

void run_pool(int n_threads, TeamBody body, void *context) {
    Pool *const own = n_threads > 1 ? the_pool() : nullptr;
    if (!own || own->in_use.exchange(true, std::memory_order_acquire)) return body(context, 0);
    const int most = MOST_WORKERS;
    own->run(n_threads - 1 < most ? n_threads - 1 : most, body, context);
    own->in_use.store(false, std::memory_order_release);
}

}  // namespace sparsify
