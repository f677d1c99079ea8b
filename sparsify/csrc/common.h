// What the kernels of all forms and instruction sets share: the table each instruction
// set exports, threads and scratch memory. No STL and nothing inline that does work: this header is compiled into
// translation units with different instruction sets, and the linker keeps only one copy of an inline function.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparsify.h"

namespace sparsify {

using LinearCall = sparsify_linear_call;
using LinearKernel = int (*)(const LinearCall &);
using PointwiseCall = sparsify_pointwise_call;
using PointwiseKernel = int (*)(const PointwiseCall &);

// One instruction set: its name and a kernel for every form and dtype.
struct KernelTable {
    const char *name;
    LinearKernel linear[SPARSIFY_N_FORMS][SPARSIFY_N_DTYPES];
    PointwiseKernel pointwise[SPARSIFY_N_DTYPES];
    int (*sddmm)(const sparsify_sddmm_call &);
    int (*factor)(const sparsify_factor_call &);
    int (*clear[3])(void *values, const uint8_t *mask, int64_t n, int n_threads);  // of 2, 4 and 8 bytes
};

const KernelTable *portable_table();
const KernelTable *avx2_table();    // null where the compiler does not target x86-64
const KernelTable *avx512_table();

// ---- csr.cpp ------------------------------------------------------------------------------------------------------

// SPARSIFY_OK if crow and col are a canonical CSR matrix of this shape. Reads col only as far as crow was found sound.
int check_csr(int64_t out, int64_t in, const int32_t *crow, const int32_t *col);

// ---- team.cpp -----------------------------------------------------------------------------------------------------

// Whether a call that begins at now_ns may use several threads, as far as stalls are known.
bool team_is_worthwhile(int64_t now_ns);

// A call by a team, in the eyes and from the thread of its caller.
struct TeamCall {
    int n_threads;
    int64_t start_ns, own_work_done_ns, end_ns;
};

void note_call(const TeamCall &call);

// ---- load.cpp -----------------------------------------------------------------------------------------------------

// Seconds since some moment that this process computed, and that the processors it may use were idle.
struct Load {
    double own_s, idle_s;
    int processors;
};

// False where nobody tells.
bool look_at_load(Load &load);

// How long this thread has been ready to run while another one had the processor; 0 where nobody tells.
int64_t thread_queued_ns();

// ---- threads.cpp --------------------------------------------------------------------------------------------------

using Task = int (*)(const void *context, int64_t task);  // returns a sparsify_status

// Runs task(context, i) for i in [0, n_tasks) on up to n_threads threads. Each thread starts with a contiguous share
// and, when that is done, takes what is left of the others', one task at a time: a core stolen by another process
// delays one task and not its share of the layer. Make a few tasks per thread. Results must not depend on which thread
// runs a task. Returns an error if any task did.
int run_tasks(int64_t n_tasks, int n_threads, Task task, const void *context);

// How many threads a call of `flops` (2 x kept weights x tokens) is worth, at most n_threads.
int worthwhile_threads(double flops, int n_threads);

// The rows that a call asks for of n rows from `row` on: n of them from `first` on, `skipped` after `row`.
struct Rows {
    int64_t first, skipped, n;
};

static inline Rows part_of_call(const LinearCall &call, int64_t row, int64_t n) {
    const int64_t first = row > call.first_row ? row : call.first_row;
    const int64_t end = row + n < call.end_row ? row + n : call.end_row;
    return {first, first - row, end - first};
}

// A number that no other call gets; never 0.
int64_t next_call_id();

// A 64-byte aligned buffer of this thread, at least `bytes` long, valid until the next call from this thread; null
// when memory is short. Contents are undefined.
void *thread_scratch(size_t bytes);

}  // namespace sparsify
