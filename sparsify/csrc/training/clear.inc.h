// Sets the places that a mask does not keep to zero, or only looks if one of them is not, for the instruction set this
// is compiled with.
//
// Between two updates of a mask an optimizer seldom moves a masked weight, so a block is written only where something
// in it changes: the pass reads 5 bytes a float32 weight, and writes nothing.
#pragma once

#include "runtime/threads.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

constexpr int64_t CLEAR_BLOCK = 256, CLEAR_TASK = 1 << 16, CLEAR_ALONE = 1 << 18;

struct ClearPlan {
    void *values;
    const uint8_t *mask;
    int64_t n;
};

template <class Word>
inline void clear_block(Word *values, const uint8_t *mask, int64_t n) {
    Word set = 0;
    for (int64_t i = 0; i < n; ++i) set |= values[i] & (Word(mask[i]) - Word(1));
    if (set)
        for (int64_t i = 0; i < n; ++i) values[i] &= Word(0) - Word(mask[i]);
}

template <class Word>
inline int clear_task(const void *context, int64_t number) {
    const ClearPlan &plan = *static_cast<const ClearPlan *>(context);
    const int64_t first = number * CLEAR_TASK;
    const int64_t end = first + CLEAR_TASK < plan.n ? first + CLEAR_TASK : plan.n;
    Word *const values = static_cast<Word *>(plan.values);
    int64_t i = first;
    for (; i + CLEAR_BLOCK <= end; i += CLEAR_BLOCK) clear_block(values + i, plan.mask + i, CLEAR_BLOCK);
    clear_block(values + i, plan.mask + i, end - i);
    return SPARSIFY_OK;
}

// Word is an unsigned integer of the values' size.
template <class Word>
int clear_masked(void *values, const uint8_t *mask, int64_t n, int n_threads) {
    const ClearPlan plan{values, mask, n};
    return run_tasks((n + CLEAR_TASK - 1) / CLEAR_TASK, n < CLEAR_ALONE ? 1 : n_threads, clear_task<Word>, &plan);
}

template <class Word>
inline int hides_task(const void *context, int64_t number) {
    const ClearPlan &plan = *static_cast<const ClearPlan *>(context);
    const int64_t first = number * CLEAR_TASK;
    const int64_t n = first + CLEAR_TASK < plan.n ? CLEAR_TASK : plan.n - first;
    const Word *const values = static_cast<const Word *>(plan.values) + first;
    Word set = 0;
    for (int64_t i = 0; i < n; ++i) set |= values[i] & (Word(plan.mask[first + i]) - Word(1));
    return set ? SPARSIFY_FOUND : SPARSIFY_OK;
}

// SPARSIFY_FOUND if any value at a place that the mask does not keep has a bit set.
template <class Word>
int hides_values(void *values, const uint8_t *mask, int64_t n, int n_threads) {
    const ClearPlan plan{values, mask, n};
    return run_tasks((n + CLEAR_TASK - 1) / CLEAR_TASK, n < CLEAR_ALONE ? 1 : n_threads, hides_task<Word>, &plan);
}

}  // namespace
