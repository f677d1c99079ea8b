// Threads of another runtime, lent to the calls of one thread: two teams would wait for each other's cores.
#pragma once

#include <cstddef>

namespace sparsify {

struct Lender {
    // Runs body(context, i) for i in [0, n) on threads of its own and the caller's; returns when all are done.
    void (*run)(void *self, size_t n, void (*body)(void *context, size_t i), void *context);
    void *self;
};

// The lender to the calls of this thread, or null.
const Lender *lender();

// Lends for as long as it lives.
class Lending {
public:
    explicit Lending(const Lender &to);
    ~Lending();
    Lending(const Lending &) = delete;
    Lending &operator=(const Lending &) = delete;

private:
    const Lender *before_;
};

}  // namespace sparsify
