// Time, memory and threads of POSIX and of Windows.
#include "runtime/system.h"

#include <stdlib.h>
#include <time.h>

#include <system_error>
#include <thread>

#ifdef _WIN32
#include <malloc.h>
#else
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#endif

namespace sparsify {
namespace {

constexpr size_t PAGE = 4096;
[[maybe_unused]] constexpr size_t HUGE_PAGE = 2 * 1024 * 1024;

size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

bool start(void (*run)(void *), void *argument) {
    try {
        std::thread(run, argument).detach();
        return true;
    } catch (const std::system_error &) {
        return false;
    }
}

}  // namespace

#ifdef _WIN32

int64_t now_ns() {
    LARGE_INTEGER ticks, per_s;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_s);
    const int64_t s = ticks.QuadPart / per_s.QuadPart, rest = ticks.QuadPart % per_s.QuadPart;
    return s * 1000000000 + rest * 1000000000 / per_s.QuadPart;
}

void prefer_huge_pages(void *, size_t) {}

void give_way() { SwitchToThread(); }

void *allocate_pages(size_t bytes) { return _aligned_malloc(whole_pages(bytes), PAGE); }
void free_pages(void *memory) { _aligned_free(memory); }

bool start_thread(void (*run)(void *), void *argument) { return start(run, argument); }

bool call_after_fork(void (*)()) { return true; }  // there is no fork

void Monitor::enter() { AcquireSRWLockExclusive(&lock); }
void Monitor::leave() { ReleaseSRWLockExclusive(&lock); }
void Monitor::sleep() { SleepConditionVariableSRW(&woken, &lock, INFINITE, 0); }
void Monitor::wake_one() { WakeConditionVariable(&woken); }
void Monitor::wake_all() { WakeAllConditionVariable(&woken); }

#else

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void prefer_huge_pages([[maybe_unused]] void *memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (first + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE,
                    end = (first + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void give_way() { sched_yield(); }

void *allocate_pages(size_t bytes) { return aligned_alloc(PAGE, whole_pages(bytes)); }
void free_pages(void *memory) { free(memory); }

bool start_thread(void (*run)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    // A new thread has the mask of the one that starts it. (pthread_sigmask is the same, but needs a newer glibc.)
    sigprocmask(SIG_SETMASK, &all, &before);
    const bool started = start(run, argument);
    sigprocmask(SIG_SETMASK, &before, nullptr);
    return started;
}

bool call_after_fork(void (*run)()) { return pthread_atfork(nullptr, nullptr, run) == 0; }

void Monitor::enter() { pthread_mutex_lock(&lock); }
void Monitor::leave() { pthread_mutex_unlock(&lock); }
void Monitor::sleep() { pthread_cond_wait(&woken, &lock); }
void Monitor::wake_one() { pthread_cond_signal(&woken); }
void Monitor::wake_all() { pthread_cond_broadcast(&woken); }

#endif

}  // namespace sparsify
