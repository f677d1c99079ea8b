// Load: how many processors other processes leave to this one.
#include <time.h>

#include "runtime/cpu_load.h"

#ifdef __linux__
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#endif

namespace sparsify {

#ifdef __linux__

namespace {

// Reads the lines "cpuN user nice system idle iowait ..." at the start of /proc/stat, in clock ticks.
bool read_idle(const cpu_set_t &allowed, double &idle_s) {
    const double ticks_per_s = double(sysconf(_SC_CLK_TCK));
    FILE *file = fopen("/proc/stat", "re");
    if (!file) return false;
    char line[512];
    int found = 0;
    idle_s = 0;
    while (fgets(line, sizeof line, file) && !strncmp(line, "cpu", 3)) {
        int cpu;
        unsigned long long idle, waiting;
        if (sscanf(line, "cpu%d %*u %*u %*u %llu %llu", &cpu, &idle, &waiting) != 3) continue;  // the sum of all
        if (cpu < 0 || cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &allowed)) continue;
        idle_s += double(idle + waiting) / ticks_per_s;
        ++found;
    }
    fclose(file);
    return found == CPU_COUNT(&allowed);
}

}  // namespace

bool look_at_load(Load &load) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) || !read_idle(allowed, load.idle_s)) return false;
    load.processors = CPU_COUNT(&allowed);
    timespec own;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
    load.own_s = double(own.tv_sec) + 1e-9 * double(own.tv_nsec);
    return true;
}

int64_t thread_queued_ns() {
    unsigned long long queued_ns = 0;
    if (FILE *file = fopen("/proc/thread-self/schedstat", "re")) {  // ran, queued, slices
        if (fscanf(file, "%*u %llu", &queued_ns) != 1) queued_ns = 0;
        fclose(file);
    }
    return int64_t(queued_ns);
}

#else

int64_t thread_queued_ns() { return 0; }

bool look_at_load(Load &) { return false; }

#endif

}  // namespace sparsify
