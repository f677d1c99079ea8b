// What the forms for few tokens that quantise them have in common, quadmask and quadsteps: the tokens of a batch are
// quantised first, row by row; then blocks of 64 output rows, times
// a part of the tokens, are the tasks. Include after a simd/quads_*.h and
// activation.inc.h.
//
// A form is a struct with
//   View             of an index, with its header
//   row_sums(view, values)
//   n_tiles(view, n_tokens, n_threads)
//                    parts of the tokens of a batch that are worth tasks of their own
//   flops(view)      as long as it takes to multiply a token, in floating point operations
//   at_once(n, row_bytes)
//                    of n tokens, as many as `block` takes together
//   block(view, values, block, n_tokens, rows, row_bytes, sums)
//                    sums[token][64], of the rows of the block in an order of the form's own. The tokens are rows of
//                    bytes, row_bytes apart, and there are 64 readable ones after an input and memory for whole 16
//                    tokens
//   sums_of(view, row, width).of(sums)
//                    of one token, the sums of up to WIDTH rows of the block
#pragma once

#include "dequantize.inc.h"
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
    int32_t minus_zero[QUANTIZED_BATCH_TOKENS];  // dequantize.inc.h
    // Thread i begins with part i of the tasks: with the tokens that it quantised if tiles come first.
    int64_t n_tiles, n_parts;
    int64_t first_block, end_block, blocks_per_part;
};

// Quantises the tokens of a task.
template <typename Form, typename T>
int quantize_tokens(const void *context, int64_t task) {
    QuantizedBatch<Form> &batch = **static_cast<QuantizedBatch<Form> *const *>(context);
    const LinearCall &call = *batch.call;
    const int64_t first = task * QUANTIZED_TOKENS_PER_TASK, end = first + QUANTIZED_TOKENS_PER_TASK;
    for (int64_t t = first; t < end && t < batch.n_tokens; ++t) {
        uint8_t *row = batch.rows + t * batch.row_bytes;
        int32_t zero_point;
        quantize_row(static_cast<const T *>(call.x) + (batch.first_token + t) * call.x_stride, call.in, row,
                     batch.step + t, &zero_point);
        batch.minus_zero[t] = minus_zero_point(zero_point, call.in);
        memset(row + call.in, 0, size_t(batch.row_bytes - call.in));
    }
    return SPARSIFY_OK;
}

// The outputs of n tokens, from number `token` of the batch on, for some rows of a block.
template <typename Form, typename T>
void finish_quantized(const QuantizedBatch<Form> &batch, const Rows &rows, int64_t token, int64_t n,
                      const int32_t *sums) {
    const LinearCall &call = *batch.call;
    const T *const all_bias = static_cast<const T *>(call.bias);
    for (int64_t row = rows.first; row < rows.first + rows.n; row += WIDTH) {
        const int64_t left = rows.first + rows.n - row;
        const int width = left < WIDTH ? int(left) : WIDTH;
        const OutputRows of_rows =
            output_rows(batch.row_sums + row, batch.scale + row, all_bias ? all_bias + row : nullptr, width, call.in);
        const typename Form::Sums sums_of_rows = Form::sums_of(batch.view, row, width);
        T *y = static_cast<T *>(call.y) + (batch.first_token + token) * call.y_stride + row - call.first_row;
        for (int64_t t = token; t < token + n; ++t, sums += BLOCK_ROWS, y += call.y_stride) {
            const Vec out =
                output_of(sums_of_rows.of(sums), of_rows, batch.minus_zero[t], batch.step[t], int(call.activation));
            if (width == WIDTH)
                store(y, out);
            else
                store_first(y, out, width);
        }
        sums -= n * BLOCK_ROWS;
    }
}

template <typename Form, typename T>
int run_quantized_blocks(const void *context, int64_t task) {
    const QuantizedBatch<Form> &batch = **static_cast<QuantizedBatch<Form> *const *>(context);
    const LinearCall &call = *batch.call;
    // And what is read past the rows of a token that begin within them.
    alignas(64) int32_t sums[QUANTIZED_BATCH_TOKENS * BLOCK_ROWS + WIDTH];
    const int64_t tile = task / batch.n_parts, part = task % batch.n_parts;
    const int64_t first_token = batch.n_tokens * tile / batch.n_tiles;
    const int64_t end_token = batch.n_tokens * (tile + 1) / batch.n_tiles;
    const int64_t at_once = Form::at_once(end_token - first_token, batch.row_bytes);
    const int64_t begin = batch.first_block + part * batch.blocks_per_part, last = begin + batch.blocks_per_part;
    for (int64_t block = begin; block < last && block < batch.end_block; ++block) {
        const Rows rows = part_of_call(call, block * BLOCK_ROWS, BLOCK_ROWS);
        for (int64_t token = first_token; token < end_token; token += at_once) {
            const int64_t left = end_token - token, n = left < at_once ? left : at_once;
            Form::block(batch.view, batch.values, block, n, batch.rows + token * batch.row_bytes, batch.row_bytes,
                        sums);
            finish_quantized<Form, T>(batch, rows, token, n, sums);
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
        const int n_quantizers = worthwhile_threads(8.0 * double(batch.n_tokens * call.in), call.n_threads);
        if (const int status = run_tasks(n_quantizing, n_quantizers, quantize_tokens<Form, T>, &context)) return status;
        const int n_threads = worthwhile_threads(flops * double(1 + batch.n_tokens), call.n_threads);
        batch.n_tiles = Form::n_tiles(batch.view, batch.n_tokens, n_threads);
        const int64_t wanted = n_threads > 1 ? n_threads * QUANTIZED_TASKS_PER_THREAD / batch.n_tiles : 1;
        batch.blocks_per_part = (n_blocks + wanted - 1) / wanted;
        batch.n_parts = (n_blocks + batch.blocks_per_part - 1) / batch.blocks_per_part;
        const int64_t n_tasks = batch.n_tiles * batch.n_parts;
        if (const int status = run_tasks(n_tasks, n_threads, run_quantized_blocks<Form, T>, &context)) return status;
    }
    return SPARSIFY_OK;
}

}  // namespace
