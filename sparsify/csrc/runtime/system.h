// What the library asks of an operating system: time, memory, threads. POSIX and Windows.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <pthread.h>
#endif

namespace sparsify {

// Nanoseconds since some moment.
int64_t now_ns();

// Whole pages; null when memory is short. Back to free_pages.
void *allocate_pages(size_t bytes);
void free_pages(void *memory);

// Asks for huge pages where memory that is about to be written is not in use yet. A request: nothing fails.
void prefer_huge_pages(void *memory, size_t bytes);

// Starts a thread that nobody waits for, with the signals of the process kept from it. False if there can be no more.
bool start_thread(void (*run)(void *argument), void *argument);

// Has `run` called in every child of a fork. False if the system cannot say so.
bool call_after_fork(void (*run)());

// Lets another thread that waits for this processor run first.
void give_way();

// A moment of a loop that waits for another thread.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A lock, and threads that sleep until they are woken. Neither constructed nor destroyed by code: it may be static.
struct Monitor {
#ifdef _WIN32
    SRWLOCK lock = SRWLOCK_INIT;
    CONDITION_VARIABLE woken = CONDITION_VARIABLE_INIT;
#else
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t woken = PTHREAD_COND_INITIALIZER;
#endif
    void enter();
    void leave();
    void sleep();  // between enter and leave; returns when woken, or for no reason
    void wake_one();
    void wake_all();
};

}  // namespace sparsify
