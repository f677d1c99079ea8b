#include "runtime/processors.h"

#if defined(__linux__)
#include <sched.h>
#elif !defined(_WIN32)
#include <unistd.h>
#else
#include <windows.h>
#endif

namespace sparsify {
namespace {

int count() {
#if defined(__linux__)
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
#elif defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return int(info.dwNumberOfProcessors);
#else
    return int(sysconf(_SC_NPROCESSORS_ONLN));
#endif
}

}  // namespace

int n_processors() {
    static const int n = count();
    return n > 0 ? n : 1;
}

}  // namespace sparsify
