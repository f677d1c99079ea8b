// Teams: whether other threads are to be trusted with a part of a call, or another process holds their cores.
#include <math.h>

#include <atomic>

#include "runtime/cpu_load.h"
#include "runtime/thread_policy.h"
#include "sparsify.h"

namespace sparsify {
namespace {

// libgomp ends a parallel region with a barrier that waits for every thread, also for one that found no task left
// because another process holds its core: the wait is a time slice of the scheduler, 3 to 8 ms, for a call of 0.1 ms.
// Or a thread that spins while it waits for work shares a core, slice by slice, with the caller, which has it.
// A stall is a hiccup if since the last look at the load, LOOK_NS ago or more, the other processes have left room for
// the team, and stalls have not taken a quarter of the time. After another one calls stay alone until there is room for
// a window of time. A stall soon after that doubles how many windows in a row it takes: beside a process that computes
// now and then stalls stay rarer than one call in a hundred. Where nobody tells the load there is room.
constexpr int64_t STALL_NS = 500 * 1000, SLOW_NS = 1000 * 1000, SLICE_NS = 4 * 1000 * 1000;
constexpr int64_t LOOK_NS = 60 * 1000 * 1000, WINDOW_NS = 100 * 1000 * 1000, SOON_NS = 10 * WINDOW_NS;
constexpr int64_t MOST_WINDOWS = 8;
constexpr double SLACK = 0.4;  // processors that the others may take of the team's: load is told in ticks of 10 ms

// When to look next; 0: together. The rest belongs to whoever holds `held`.
std::atomic<int64_t> next_look_ns{0};
std::atomic<bool> held{false};
constexpr Load UNKNOWN = {NAN, NAN, 0};
Load last = UNKNOWN;
int64_t last_look_ns = -WINDOW_NS, stalled_ns = 0;  // since then
int team;
int64_t windows_to_wait = 1, windows_left, together_since_ns = -SOON_NS;

// Looks, and says whether there was room since the last time.
bool had_room(int64_t now_ns) {
    const Load from = last;
    const double wall_s = 1e-9 * double(now_ns - last_look_ns);
    if (!look_at_load(last)) last = UNKNOWN;
    last_look_ns = now_ns;
    stalled_ns = 0;
    const double free_s = last.idle_s - from.idle_s + last.own_s - from.own_s;
    const int wanted = team < last.processors ? team : last.processors;  // there may be more threads than processors
    return !(free_s < (wanted - SLACK) * wall_s);
}

void stay_alone(int64_t now_ns) {
    const bool soon = now_ns < together_since_ns + SOON_NS;
    windows_to_wait = !soon ? 1 : windows_to_wait < MOST_WINDOWS ? 2 * windows_to_wait : MOST_WINDOWS;
    windows_left = windows_to_wait;
    next_look_ns.store(now_ns + WINDOW_NS, std::memory_order_relaxed);
}

// How long this thread has stood in the queue for a core since this was last asked, after another slow call, if that is
// a good part of the time.
int64_t queued_long(int64_t now_ns) {
    static thread_local int64_t asked_ns = 0, queued_ns = 0;
    const int64_t since_ns = now_ns - asked_ns;
    if (since_ns < SLICE_NS) return 0;  // asking takes some microseconds
    const int64_t before_ns = queued_ns;
    asked_ns = now_ns;
    queued_ns = thread_queued_ns();
    const int64_t queued = queued_ns - before_ns;
    return queued >= STALL_NS && queued >= since_ns / 4 ? queued : 0;
}

}  // namespace

bool team_is_worthwhile(int64_t now_ns) {
    const int64_t look_ns = next_look_ns.load(std::memory_order_relaxed);
    if (look_ns == 0) return true;
    if (now_ns < look_ns || held.exchange(true, std::memory_order_acquire)) return false;
    const int64_t windows = 1 + (now_ns - look_ns) / WINDOW_NS;
    windows_left = had_room(now_ns) ? windows_left - windows : windows_to_wait;
    const bool together = windows_left <= 0;
    if (together) together_since_ns = now_ns;
    next_look_ns.store(together ? 0 : now_ns + WINDOW_NS, std::memory_order_relaxed);
    held.store(false, std::memory_order_release);
    return together;
}

void note_call(const TeamCall &call) {
    const int64_t worked = call.own_work_done_ns - call.start_ns, waited = call.end_ns - call.own_work_done_ns;
    const int64_t stalled = waited >= STALL_NS && waited >= 2 * worked ? waited
                            : worked + waited >= SLOW_NS               ? queued_long(call.end_ns)
                                                                       : 0;
    if (!stalled || held.exchange(true, std::memory_order_acquire)) return;
    stalled_ns += stalled;
    const int64_t since_ns = call.end_ns - last_look_ns;
    if (since_ns >= LOOK_NS) {
        const bool often = stalled_ns >= since_ns / 4;
        team = call.n_threads;
        if (!had_room(call.end_ns) || often) stay_alone(call.end_ns);
    }
    held.store(false, std::memory_order_release);
}

}  // namespace sparsify

void sparsify_forget_stalls(void) { sparsify::next_look_ns.store(0, std::memory_order_relaxed); }
