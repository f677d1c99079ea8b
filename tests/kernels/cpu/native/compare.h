// What the files of the program share: random values, and arrays that have to agree.
#pragma once

#include <stdio.h>

#include <map>
#include <string>

#include "cases.h"

namespace {

inline void demand(bool holds, const char *tested, const char *what, double number) {
    if (holds) return;
    printf("%s: %s: %.9g\n", tested, what, number);
    exit(1);
}

template <typename T>
Guarded random_values(size_t n, uint64_t seed) {
    Random random{seed};
    Guarded made(n * sizeof(T));
    for (size_t i = 0; i < n; ++i) made.data<T>()[i] = from_float<T>(random.around_zero());
    return made;
}

template <typename T>
void compare_arrays(const Guarded &found, const Guarded &wanted, bool exactly, double magnitude, int64_t n_products,
                    const char *tested, const char *what) {
    for (size_t i = 0; i < wanted.size() / sizeof(T); ++i) {
        const double a = to_float(found.data<T>()[i]), b = to_float(wanted.data<T>()[i]);
        const double allowed = exactly ? 0 : 2 * allowed_error<T>(b, magnitude, n_products);  // each one's
        demand(std::isfinite(b) && fabs(a - b) <= allowed, tested, what, a - b);
    }
}

}  // namespace
