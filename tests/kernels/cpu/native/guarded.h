// Arrays that end where memory ends: a read or write past the last element is a fault.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>
#include <utility>
#include <vector>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#endif

// `bytes` bytes before a page that must not be touched. Filled with 0xff: NaN in every dtype.
class Guarded {
    static constexpr size_t PAGE = 65536;  // of any aarch64 or Windows
    uint8_t *memory = nullptr;
    size_t pages = 0, bytes = 0;

public:
    explicit Guarded(size_t n) : pages((n + PAGE - 1) / PAGE + (n == 0)), bytes(n) {
#ifdef _WIN32
        memory = static_cast<uint8_t *>(VirtualAlloc(nullptr, (pages + 1) * PAGE, MEM_RESERVE, PAGE_NOACCESS));
        if (!memory || !VirtualAlloc(memory, pages * PAGE, MEM_COMMIT, PAGE_READWRITE)) abort();
#else
        void *const all = mmap(nullptr, (pages + 1) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED || mprotect(all, pages * PAGE, PROT_READ | PROT_WRITE)) abort();
        memory = static_cast<uint8_t *>(all);
#endif
        memset(memory, 0xff, pages * PAGE);
    }
    Guarded(Guarded &&other) noexcept
        : memory(std::exchange(other.memory, nullptr)), pages(other.pages), bytes(other.bytes) {}
    ~Guarded() {
        if (!memory) return;
#ifdef _WIN32
        VirtualFree(memory, 0, MEM_RELEASE);
#else
        munmap(memory, (pages + 1) * PAGE);
#endif
    }
    template <typename T = uint8_t>
    T *data() const {
        return reinterpret_cast<T *>(memory + pages * PAGE - bytes);
    }
    size_t size() const { return bytes; }
};

template <typename T>
Guarded guarded(const std::vector<T> &from) {
    Guarded copy(from.size() * sizeof(T));
    if (!from.empty()) memcpy(copy.data(), from.data(), copy.size());
    return copy;
}
