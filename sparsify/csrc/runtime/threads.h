// Tasks of a call on several threads, and the scratch memory of each thread. No STL and nothing inline that does work:
// see kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

using Task = int (*)(const void *context, int64_t task);  // returns a sparsify_status

// Runs task(context, i) for i in [0, n_tasks) on up to n_threads threads. Each thread starts with a contiguous share
// and, when that is done, takes what is left of the others', one task at a time: a core stolen by another process
// delays one task and not its share of the layer. Make a few tasks per thread. Results must not depend on which thread
// runs a task. Returns an error if any task did.
int run_tasks(int64_t n_tasks, int n_threads, Task task, const void *context);

// How many threads a call of `flops` (2 x kept weights x tokens) is worth, at most n_threads.
int worthwhile_threads(double flops, int n_threads);

// A number that no other call gets; never 0.
int64_t next_call_id();

// A 64-byte aligned buffer of this thread, at least `bytes` long, valid until the next call from this thread; null
// when memory is short. Contents are undefined.
void *thread_scratch(size_t bytes);

}  // namespace sparsify
