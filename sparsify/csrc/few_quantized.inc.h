// What the forms that quantise tokens row by row have in common, quadmask, quadsteps and widesteps: the tokens of a
// batch are quantised first; then blocks of 64 output rows, times a part of the tokens, are the tasks. Include after a
// simd/quads_*.h and activation.inc.h.
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
//                    bytes, row_bytes apart, and there are 64 readable ones after an input, 256 after one of the
//                    last row, and memory for whole 16 tokens
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

// A layer, and what is between its inputs as bytes.
template <typename Form>
struct QuantizedLayer {
    LinearCall call;
    const float *scale;
    typename Form::View view;
    const int8_t *values;
    const int32_t *row_sums;
    int64_t row_bytes;
};

struct QuantizedTokens {
    uint8_t *rows;
    float step[QUANTIZED_BATCH_TOKENS];
    int32_t minus_zero[QUANTIZED_BATCH_TOKENS];  // dequantize.inc.h
};

// Bytes of the rows of n tokens: memory for whole 16 of them, and for a window that begins with the last input.
inline int64_t quantized_rows_bytes(int64_t n, int64_t row_bytes) { return (n + 15) / 16 * 16 * row_bytes + 256; }

// Reads what a layer has of a call. Returns a status.
template <typename Form>
int open_quantized(QuantizedLayer<Form> &layer, const LinearCall &call, const float *scale) {
    layer.call = call;
    layer.scale = scale;
    layer.view = Form::view(call.index);
    if (call.in > SPARSIFY_MOST_QUANTIZED_IN) return SPARSIFY_BAD_ARGUMENT;
    if (layer.view.header->out != call.out || layer.view.header->in != call.in) return SPARSIFY_BAD_INDEX;
    layer.values = static_cast<const int8_t *>(call.values);
    layer.row_sums = Form::row_sums(layer.view, layer.values);
    // Whole cache lines, an odd number of them: rows a power of two apart would share few sets of the cache.
    layer.row_bytes = ((call.in + 127) / 64 | 1) * 64;
    return SPARSIFY_OK;
}

// Makes x the bytes of token number t.
template <typename Form, typename T>
void quantize_token(const QuantizedLayer<Form> &layer, const T *x, int64_t t, QuantizedTokens &tokens) {
    const int64_t in = layer.call.in;
    uint8_t *row = tokens.rows + t * layer.row_bytes;
    int32_t zero_point;
    quantize_row(x, in, row, tokens.step + t, &zero_point);
    tokens.minus_zero[t] = minus_zero_point(zero_point, in);
    memset(row + in, 0, size_t(layer.row_bytes - in));
}

// The outputs of n tokens, from number `token` on, for some rows of a block. y has the first row of the call for token
// number 0.
template <typename Form, typename T>
void finish_quantized(const QuantizedLayer<Form> &layer, const QuantizedTokens &tokens, const Rows &rows, int64_t token,
                      int64_t n, const int32_t *sums, T *y, int64_t y_stride) {
    const LinearCall &call = layer.call;
    const T *const all_bias = static_cast<const T *>(call.bias);
    for (int64_t row = rows.first; row < rows.first + rows.n; row += WIDTH) {
        const int64_t left = rows.first + rows.n - row;
        const int width = left < WIDTH ? int(left) : WIDTH;
        const OutputRows of_rows =
            output_rows(layer.row_sums + row, layer.scale + row, all_bias ? all_bias + row : nullptr, width, call.in);
        const typename Form::Sums sums_of_rows = Form::sums_of(layer.view, row, width);
        T *to = y + token * y_stride + row - call.first_row;
        for (int64_t t = token; t < token + n; ++t, sums += BLOCK_ROWS, to += y_stride) {
            const Vec out =
                output_of(sums_of_rows.of(sums), of_rows, tokens.minus_zero[t], tokens.step[t], int(call.activation));
            if (width == WIDTH)
                store(to, out);
            else
                store_first(to, out, width);
        }
        sums -= n * BLOCK_ROWS;
    }
}

// Sums of a block on the stack of a task, and what is read past the rows of a token that begin within them.
struct alignas(64) QuantizedSums {
    int32_t of[QUANTIZED_BATCH_TOKENS * BLOCK_ROWS + WIDTH];
};

// The outputs of tokens first_token to end_token - 1 for the rows of a block that the call asks for; y as above.
template <typename Form, typename T>
void multiply_quantized_block(const QuantizedLayer<Form> &layer, const QuantizedTokens &tokens, int64_t block,
                              int64_t first_token, int64_t end_token, QuantizedSums &sums, T *y, int64_t y_stride) {
    const Rows rows = part_of_call(layer.call, block * BLOCK_ROWS, BLOCK_ROWS);
    const int64_t at_once = Form::at_once(end_token - first_token, layer.row_bytes);
    for (int64_t token = first_token; token < end_token; token += at_once) {
        const int64_t left = end_token - token, n = left < at_once ? left : at_once;
        Form::block(layer.view, layer.values, block, n, tokens.rows + token * layer.row_bytes, layer.row_bytes,
                    sums.of);
        finish_quantized<Form, T>(layer, tokens, rows, token, n, sums.of, y, y_stride);
    }
}

template <typename Form>
struct QuantizedBatch {
    QuantizedLayer<Form> layer;
    QuantizedTokens tokens;
    int64_t first_token, n_tokens;
    // Thread i begins with part i of the tasks: with the tokens that it quantised if tiles come first.
    int64_t n_tiles, n_parts;
    int64_t first_block, end_block, blocks_per_part;
};

// Quantises the tokens of a task.
template <typename Form, typename T>
int quantize_tokens(const void *context, int64_t task) {
    QuantizedBatch<Form> &batch = **static_cast<QuantizedBatch<Form> *const *>(context);
    const LinearCall &call = batch.layer.call;
    const int64_t first = task * QUANTIZED_TOKENS_PER_TASK, end = first + QUANTIZED_TOKENS_PER_TASK;
    for (int64_t t = first; t < end && t < batch.n_tokens; ++t)
        quantize_token(batch.layer, static_cast<const T *>(call.x) + (batch.first_token + t) * call.x_stride, t,
                       batch.tokens);
    return SPARSIFY_OK;
}

template <typename Form, typename T>
int run_quantized_blocks(const void *context, int64_t task) {
    const QuantizedBatch<Form> &batch = **static_cast<QuantizedBatch<Form> *const *>(context);
    const LinearCall &call = batch.layer.call;
    QuantizedSums sums;
    const int64_t tile = task / batch.n_parts, part = task % batch.n_parts;
    const int64_t first_token = batch.n_tokens * tile / batch.n_tiles;
    const int64_t end_token = batch.n_tokens * (tile + 1) / batch.n_tiles;
    T *const y = static_cast<T *>(call.y) + batch.first_token * call.y_stride;
    const int64_t begin = batch.first_block + part * batch.blocks_per_part, last = begin + batch.blocks_per_part;
    for (int64_t block = begin; block < last && block < batch.end_block; ++block)
        multiply_quantized_block(batch.layer, batch.tokens, block, first_token, end_token, sums, y, call.y_stride);
    return SPARSIFY_OK;
}

template <typename Form, typename T>
int linear_quantized_blocks(const Int8Call &int8_call) {
    const LinearCall &call = int8_call.linear;
    QuantizedBatch<Form> batch;
    const QuantizedBatch<Form> *const context = &batch;
    if (const int status = open_quantized(batch.layer, call, int8_call.scale)) return status;
    const typename Form::View &view = batch.layer.view;
    batch.first_block = call.first_row / BLOCK_ROWS;
    batch.end_block = (call.end_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t n_blocks = batch.end_block - batch.first_block;
    const double flops = Form::flops(view) * double(call.end_row - call.first_row) / double(call.out);
    for (int64_t first = 0; first < call.tokens; first += QUANTIZED_BATCH_TOKENS) {
        const int64_t left = call.tokens - first;
        batch.first_token = first;
        batch.n_tokens = left < QUANTIZED_BATCH_TOKENS ? left : QUANTIZED_BATCH_TOKENS;
        const int64_t bytes = quantized_rows_bytes(batch.n_tokens, batch.layer.row_bytes);
        batch.tokens.rows = static_cast<uint8_t *>(thread_scratch(size_t(bytes)));
        if (!batch.tokens.rows) return SPARSIFY_NO_MEMORY;
        const int64_t n_quantizing = (batch.n_tokens + QUANTIZED_TOKENS_PER_TASK - 1) / QUANTIZED_TOKENS_PER_TASK;
        const int n_quantizers = worthwhile_threads(8.0 * double(batch.n_tokens * call.in), call.n_threads);
        if (const int status = run_tasks(n_quantizing, n_quantizers, quantize_tokens<Form, T>, &context)) return status;
        const int n_threads = worthwhile_threads(flops * double(1 + batch.n_tokens), call.n_threads);
        batch.n_tiles = Form::n_tiles(view, batch.n_tokens, n_threads);
        const int64_t wanted = n_threads > 1 ? n_threads * QUANTIZED_TASKS_PER_THREAD / batch.n_tiles : 1;
        batch.blocks_per_part = (n_blocks + wanted - 1) / wanted;
        batch.n_parts = (n_blocks + batch.blocks_per_part - 1) / batch.blocks_per_part;
        const int64_t n_tasks = batch.n_tiles * batch.n_parts;
        if (const int status = run_tasks(n_tasks, n_threads, run_quantized_blocks<Form, T>, &context)) return status;
    }
    return SPARSIFY_OK;
}

}  // namespace
