// What the forms for few tokens, bitmask and gather, have in common: blocks of 64 output rows are the tasks, and a
// block is multiplied with up to MAX_TOKENS tokens at a time. Include after a simd/*.h and activation.inc.h.
//
// A form is a struct with
//   LEAST_IN       columns that a row of x must have to be read in place; shorter rows are copied and padded
//   MAX_TOKENS     tokens per pass over the weights; each token's sum is the same in any company
//   SKIPS_MASKED   a masked weight never meets an activation, so that Inf and NaN need no care
//   view(index)
//   block<N, EXACT>(view, values, block, x, x_stride, sums)
//                  sums[n][row of the block], row-major [N][BLOCK_ROWS]; rows that do not exist are left alone. EXACT:
//                  activations may be Inf or NaN, and must not reach the outputs that do not keep their column
#pragma once

#include "runtime/kernels.h"
#include "runtime/threads.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

constexpr int BLOCK_ROWS = 64;
// Tokens whose activations are prepared together: enough to use a block of weights well while it is in the cache, few
// enough that a widened copy of x stays small.
constexpr int64_t BATCH_TOKENS = 64;
// Tasks per thread: a core that is taken away delays the call by one task.
constexpr int64_t TASKS_PER_THREAD = 16;
// Rows of x that lie a multiple of 2 KB apart fall into the same few sets of the L1 cache: eight tokens of 4096 floats
// took 3x as long as they should. From 3 tokens on such rows are copied, three cache lines further apart.
constexpr int64_t CROWDED_STRIDE = 512, CROWDED_TOKENS = 3, STAGGER = 48;

// y[rows of the block] = activation(sums * scale + bias) for one token; scale may be null.
template <typename T>
inline void finish_block(const float *sums, const float *scale, const T *bias, T *y, int n_rows, int activation) {
    for (int row = 0; row < n_rows; row += WIDTH) {
        const int width = n_rows - row < WIDTH ? n_rows - row : WIDTH;
        Vec a = load(sums + row);
        if (scale) a = mul(a, width == WIDTH ? load(scale + row) : load_first(scale + row, width));
        if (bias) a = add(a, width == WIDTH ? load(bias + row) : load_first(bias + row, width));
        a = activate(a, activation);
        if (width == WIDTH)
            store(y + row, a);
        else
            store_first(y + row, a, width);
    }
}

template <typename T>
bool all_finite(const T *x, int64_t n) {
    Vec bad[4] = {zero(), zero(), zero(), zero()};  // Inf x 0 and NaN x 0 are NaN, and stay
    int64_t k = 0;
    for (; k + 4 * WIDTH <= n; k += 4 * WIDTH)
        for (int i = 0; i < 4; ++i) bad[i] = fma(load(x + k + i * WIDTH), zero(), bad[i]);
    for (; k < n; k += WIDTH) bad[0] = fma(n - k < WIDTH ? load_first(x + k, int(n - k)) : load(x + k), zero(), bad[0]);
    float lanes[WIDTH];
    store(lanes, add(add(bad[0], bad[1]), add(bad[2], bad[3])));
    bool finite = true;
    for (const float lane : lanes) finite &= lane == 0;
    return finite;
}

template <typename T>
void widen_row(const T *x, int64_t n, float *to, int64_t padded) {
    int64_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) store(to + k, load(x + k));
    if (k < n) store_first(to + k, load_first(x + k, int(n - k)), int(n - k));
    for (k = n; k < padded; ++k) to[k] = 0;
}

// Some tokens of a call, ready to be multiplied.
struct Batch {
    const LinearCall *call;
    const float *scale;  // of the rows, where values are int8
    int64_t first_token, n_tokens;
    const float *x;
    int64_t x_stride;
    bool finite[BATCH_TOKENS];
    int64_t first_block, end_block, blocks_per_task;
};

template <typename Form, int N, typename T, typename W>
void run_block(const typename Form::View &view, const Batch &batch, int64_t block, int64_t token) {
    const LinearCall &call = *batch.call;
    const W *values = static_cast<const W *>(call.values);
    const float *x = batch.x + token * batch.x_stride;
    bool finite = true;
    for (int n = 0; n < N; ++n) finite &= batch.finite[token + n];
    alignas(64) float sums[N * BLOCK_ROWS + WIDTH];  // and what is read past the rows of a block that begin within it
    if (finite)
        Form::template block<N, false>(view, values, block, x, batch.x_stride, sums);
    else
        Form::template block<N, true>(view, values, block, x, batch.x_stride, sums);
    const Rows rows = part_of_call(call, block * BLOCK_ROWS, BLOCK_ROWS);
    const T *bias = call.bias ? static_cast<const T *>(call.bias) + rows.first : nullptr;
    const float *scale = batch.scale ? batch.scale + rows.first : nullptr;
    T *y = static_cast<T *>(call.y) + (batch.first_token + token) * call.y_stride + rows.first - call.first_row;
    for (int n = 0; n < N; ++n)
        finish_block(sums + n * BLOCK_ROWS + rows.skipped, scale, bias, y + n * call.y_stride, int(rows.n),
                     call.activation);
}

// Runs block for the last n <= N tokens of a batch.
template <typename Form, int N, typename T, typename W>
void run_rest(const typename Form::View &view, const Batch &batch, int64_t block, int64_t token) {
    if constexpr (N > 0) {
        if (batch.n_tokens - token == N)
            run_block<Form, N, T, W>(view, batch, block, token);
        else
            run_rest<Form, N - 1, T, W>(view, batch, block, token);
    }
}

template <typename Form, typename T, typename W>
int run_blocks(const void *context, int64_t task) {
    const Batch &batch = *static_cast<const Batch *>(context);
    const typename Form::View view = Form::view(batch.call->index);
    const int64_t first = batch.first_block + task * batch.blocks_per_task;
    for (int64_t block = first; block < first + batch.blocks_per_task && block < batch.end_block; ++block) {
        int64_t token = 0;
        for (; batch.n_tokens - token >= Form::MAX_TOKENS; token += Form::MAX_TOKENS)
            run_block<Form, Form::MAX_TOKENS, T, W>(view, batch, block, token);
        run_rest<Form, Form::MAX_TOKENS - 1, T, W>(view, batch, block, token);
    }
    return SPARSIFY_OK;
}

template <typename Form, typename T, typename W>
int run_row_blocks(const LinearCall &call, const float *scale) {
    Batch batch;
    batch.call = &call;
    batch.scale = scale;
    batch.first_block = call.first_row / BLOCK_ROWS;
    batch.end_block = (call.end_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t n_blocks = batch.end_block - batch.first_block;
    const double nnz =
        double(Form::view(call.index).header->nnz) * double(call.end_row - call.first_row) / double(call.out);
    const bool crowded = call.x_stride % CROWDED_STRIDE == 0 && call.tokens >= CROWDED_TOKENS;
    const bool in_place = sizeof(T) == sizeof(float) && call.in >= Form::LEAST_IN && !crowded;
    const int64_t least = Form::LEAST_IN > 0 ? Form::LEAST_IN : 1;
    int64_t padded = call.in > least ? call.in : least;
    if (padded % CROWDED_STRIDE == 0) padded += STAGGER;
    for (int64_t token = 0; token < call.tokens; token += BATCH_TOKENS) {
        batch.first_token = token;
        batch.n_tokens = call.tokens - token < BATCH_TOKENS ? call.tokens - token : BATCH_TOKENS;
        const T *x = static_cast<const T *>(call.x) + token * call.x_stride;
        if (in_place) {
            batch.x = reinterpret_cast<const float *>(x);
            batch.x_stride = call.x_stride;
        } else {
            float *copy = static_cast<float *>(thread_scratch(size_t(batch.n_tokens * padded) * sizeof(float)));
            if (!copy) return SPARSIFY_NO_MEMORY;
            for (int64_t n = 0; n < batch.n_tokens; ++n)
                widen_row(x + n * call.x_stride, call.in, copy + n * padded, padded);
            batch.x = copy;
            batch.x_stride = padded;
        }
        for (int64_t n = 0; n < batch.n_tokens; ++n)
            batch.finite[n] = Form::SKIPS_MASKED || all_finite(x + n * call.x_stride, call.in);
        const int n_threads = worthwhile_threads(2 * nnz * double(batch.n_tokens), call.n_threads);
        const int64_t n_tasks = n_threads > 1 ? n_threads * TASKS_PER_THREAD : 1;
        batch.blocks_per_task = (n_blocks + n_tasks - 1) / n_tasks;
        const int status = run_tasks((n_blocks + batch.blocks_per_task - 1) / batch.blocks_per_task, n_threads,
                                     run_blocks<Form, T, W>, &batch);
        if (status) return status;
    }
    return SPARSIFY_OK;
}

template <typename Form, typename T>
int linear_row_blocks(const LinearCall &call) {
    return run_row_blocks<Form, T, T>(call, nullptr);
}

template <typename Form, typename T>
int linear_row_blocks_int8(const Int8Call &call) {
    return run_row_blocks<Form, T, int8_t>(call.linear, call.scale);
}

}  // namespace
