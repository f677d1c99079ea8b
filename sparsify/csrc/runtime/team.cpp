// The choice of a team, once; and those that need no file of their own.
#include "runtime/team.h"

#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>

#include "runtime/pool.h"
#include "runtime/system.h"
#include "sparsify.h"

namespace sparsify {
namespace {

struct Team {
    const char *name;
    void (*run)(int n_threads, TeamBody body, void *context);
    bool survives_fork;
};

void run_alone(int, TeamBody body, void *context) { body(context, 0); }

#ifdef _OPENMP
void run_openmp(int n_threads, TeamBody body, void *context) {
#pragma omp parallel num_threads(n_threads)
    body(context, omp_get_thread_num());
}
#endif

const Team TEAMS[] = {
#ifdef _OPENMP
    {"openmp", run_openmp, false},
#endif
    {"pool", run_pool, true},
    {"serial", run_alone, true},
};

// The team that SPARSIFY_THREADS names, the first if it names none; null if it is unknown.
const Team *choose() {
    const char *name = getenv("SPARSIFY_THREADS");
    if (!name || !*name) return TEAMS;
    for (const Team &team : TEAMS)
        if (!strcmp(team.name, name)) return &team;
    return nullptr;
}

const Team *chosen() {
    static const Team *const team = choose();
    return team;
}

std::atomic<bool> forked{false};
const bool knows_of_forks = call_after_fork([] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

int team_status() { return chosen() ? SPARSIFY_OK : SPARSIFY_UNKNOWN_THREADS; }

const char *team_name() { return chosen() ? chosen()->name : ""; }

bool team_has_others() {
    if (!chosen() || chosen()->run == run_alone) return false;
    return chosen()->survives_fork || (knows_of_forks && !forked.load(std::memory_order_relaxed));
}

void run_team(int n_threads, TeamBody body, void *context) { chosen()->run(n_threads, body, context); }

}  // namespace sparsify

const char *sparsify_threads(void) { return sparsify::team_name(); }
