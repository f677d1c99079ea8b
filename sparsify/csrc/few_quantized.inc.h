// What the forms for few tokens that quantise them have in common, quadmask and quadsteps: the tokens of a batch are
// quantised first, row by row; then blocks of 64 output rows are the tasks. Include after a simd/quads_*.h and
// activation.inc.h.
//
// A form is a struct with
//   View             of an index, with its header
//   row_sums(view, values)
//   flops(view)      as long as it takes to multiply a token, in floating point operations
//   at_once(n)       of n tokens, as many as `block` takes together
//   block(view, values, block, n_tokens, rows, row_bytes, sums)
//                    sums[token][row of the block]; rows that do not exist are left alone. The tokens are rows of
//                    bytes, row_bytes apart, and there are 64 readable ones after an input and memory for whole 16
//                    tokens
#pragma once

#include "few_tokens.inc.h"
#include "quantize.inc.h"
#include "runtime/kernels.h"
#include "runtime/threads.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

// Tokens quantised together; their sums are on the stack of a task.
constexpr int64_t QUANTIZED_BATCH_TOKENS = 256;
constexpr int64_t QUANTIZED_TOKENS_PER_TASK = 8;
constexpr int64_t QUANTIZED_TASKS_PER_THREAD = 8;

template <typename Form>
struct QuantizedBatch {
    const LinearCall *call;
    const float *scale;
    typename Form::View view;
    const int8_t *values;
    const int32_t *row_sums;
    int64_t first_token, n_tokens;
    uint8_t *rows;
    int64_t row_bytes;
    float step[QUANTIZED_BATCH_TOKENS];
    int32_t zero_point[QUANTIZED_BATCH_TOKENS];
    int64_t first_block, end_block, blocks_per_task;
};

// Quantises the tokens of a task.
template <typename Form, typename T>
int quantize_tokens(const void *context, int64_t task) {
    QuantizedBatch<Form> &batch = **static_cast<QuantizedBatch<Form> *const *>(context);
    const LinearCall &call = *batch.call;
    const int64_t first = task * QUANTIZED_TOKENS_PER_TASK, end = first + QUANTIZED_TOKENS_PER_TASK;
    for (int64_t t = first; t < end && t < batch.n_tokens; ++t) {
        uint8_t *row = batch.rows + t * batch.row_bytes;
        quantize_row(static_cast<const T *>(call.x) + (batch.first_token + t) * call.x_stride, call.in, row,
                     batch.step + t, batch.zero_point + t);
        memset(row + call.in, 0, size_t(batch.row_bytes - call.in));
    }
    return SPARSIFY_OK;
}

// y[rows] = activation((sums - zero_point * row_sums) * (step * scale) + bias) for one token.
template <typename T>
inline void finish_quantized(const int32_t *sums, const int32_t *row_sums, int32_t zero_point, float step,
                             const float *scale, const T *bias, T *y, int n_rows, int activation) {
    for (int row = 0; row < n_rows; row += WIDTH) {
        const int width = n_rows - row < WIDTH ? n_rows - row : WIDTH;
        const IntVec of_rows = load_first(row_sums + row, width);
        const IntVec exact = sub(load(sums + row), mul(set1(zero_point), of_rows));
        const Vec factor = rounded(mul(set1(step), load_first(scale + row, width)));
        Vec out = rounded(mul(to_float(exact), factor));
        if (bias) out = add(out, load_first(bias + row, width));
        out = activate(out, activation);
        if (width == WIDTH)
            store(y + row, out);
        else
            store_first(y + row, out, width);
    }
}

template <typename Form, typename T>
int run_quantized_blocks(const void *context, int64_t task) {
    const QuantizedBatch<Form> &batch = **static_cast<QuantizedBatch<Form> *const *>(context);
    const LinearCall &call = *batch.call;
    // And what is read past the rows of a token that begin within them.
    alignas(64) int32_t sums[QUANTIZED_BATCH_TOKENS * BLOCK_ROWS + WIDTH];
    const int64_t at_once = Form::at_once(batch.n_tokens), begin = batch.first_block + task * batch.blocks_per_task;
    for (int64_t block = begin; block < begin + batch.blocks_per_task && block < batch.end_block; ++block) {
        const Rows rows = part_of_call(call, block * BLOCK_ROWS, BLOCK_ROWS);
        const T *bias = call.bias ? static_cast<const T *>(call.bias) + rows.first : nullptr;
        for (int64_t token = 0; token < batch.n_tokens; token += at_once) {
            const int64_t left = batch.n_tokens - token, n = left < at_once ? left : at_once;
            Form::block(batch.view, batch.values, block, n, batch.rows + token * batch.row_bytes, batch.row_bytes,
                        sums);
            T *y = static_cast<T *>(call.y) + (batch.first_token + token) * call.y_stride;
            for (int64_t t = 0; t < n; ++t)
                finish_quantized(sums + t * BLOCK_ROWS + rows.skipped, batch.row_sums + rows.first,
                                 batch.zero_point[token + t], batch.step[token + t], batch.scale + rows.first, bias,
                                 y + t * call.y_stride + rows.first - call.first_row, int(rows.n),
                                 int(call.activation));
        }
    }
    return SPARSIFY_OK;
}

template <typename Form, typename T>
int linear_quantized_blocks(const Int8Call &int8_call) {
    const LinearCall &call = int8_call.linear;
    QuantizedBatch<Form> batch;
    const QuantizedBatch<Form> *const context = &batch;
    batch.call = &call;
    batch.scale = int8_call.scale;
    batch.view = Form::view(call.index);
    if (call.in > SPARSIFY_MOST_QUANTIZED_IN) return SPARSIFY_BAD_ARGUMENT;
    if (batch.view.header->out != call.out || batch.view.header->in != call.in) return SPARSIFY_BAD_INDEX;
    batch.values = static_cast<const int8_t *>(call.values);
    batch.row_sums = Form::row_sums(batch.view, batch.values);
    batch.first_block = call.first_row / BLOCK_ROWS;
    batch.end_block = (call.end_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t n_blocks = batch.end_block - batch.first_block;
    const double flops = Form::flops(batch.view) * double(call.end_row - call.first_row) / double(call.out);
    // Whole cache lines, an odd number of them: rows a power of two apart would share few sets of the cache.
    batch.row_bytes = ((call.in + 127) / 64 | 1) * 64;
    for (int64_t first = 0; first < call.tokens; first += QUANTIZED_BATCH_TOKENS) {
        const int64_t left = call.tokens - first;
        batch.first_token = first;
        batch.n_tokens = left < QUANTIZED_BATCH_TOKENS ? left : QUANTIZED_BATCH_TOKENS;
        const int64_t padded = (batch.n_tokens + 15) / 16 * 16;
        batch.rows = static_cast<uint8_t *>(thread_scratch(size_t(padded * batch.row_bytes)));
        if (!batch.rows) return SPARSIFY_NO_MEMORY;
        const int64_t n_quantizing = (batch.n_tokens + QUANTIZED_TOKENS_PER_TASK - 1) / QUANTIZED_TOKENS_PER_TASK;
        const int n_quantizers = worthwhile_threads(4.0 * double(batch.n_tokens * call.in), call.n_threads);
        if (const int status = run_tasks(n_quantizing, n_quantizers, quantize_tokens<Form, T>, &context)) return status;
        const int n_threads = worthwhile_threads(flops * double(1 + batch.n_tokens), call.n_threads);
        const int64_t n_tasks = n_threads > 1 ? n_threads * QUANTIZED_TASKS_PER_THREAD : 1;
        batch.blocks_per_task = (n_blocks + n_tasks - 1) / n_tasks;
        const int64_t needed = (n_blocks + batch.blocks_per_task - 1) / batch.blocks_per_task;
        if (const int status = run_tasks(needed, n_threads, run_quantized_blocks<Form, T>, &context)) return status;
    }
    return SPARSIFY_OK;
}

}  // namespace
