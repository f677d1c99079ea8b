// Two linear layers of a form that quantises tokens row by row (few_quantized.inc.h), with an activation between, as
// one kernel: a tile of tokens goes through both, and what is between never leaves the caches. A token is quantised
// when all of its activations are known, so the tile is whole between the layers. Every step is that of two calls, and
// so are the bits.
#pragma once

#include "few_quantized.inc.h"

namespace {

using namespace sparsify;

// Activations between the layers that stay in the L2 cache beside the weights of both.
constexpr int64_t QUANTIZED_MLP_BYTES = 512 * 1024;
// Of fewer, weights are read again for few tokens.
constexpr int64_t QUANTIZED_MLP_FEWEST_TOKENS = 32;

template <typename Form>
struct QuantizedMlp {
    QuantizedLayer<Form> first, second;
    int64_t n_tiles;
};

template <typename Form, typename T>
int run_quantized_mlp_tile(const void *context, int64_t tile) {
    const QuantizedMlp<Form> &mlp = *static_cast<const QuantizedMlp<Form> *>(context);
    const QuantizedLayer<Form> &first = mlp.first, &second = mlp.second;
    const int64_t n_tokens = first.call.tokens;
    const int64_t first_token = n_tokens * tile / mlp.n_tiles, n = n_tokens * (tile + 1) / mlp.n_tiles - first_token;
    // Of a layer's tokens, when those of the one before are done with.
    const int64_t longest = first.row_bytes > second.row_bytes ? first.row_bytes : second.row_bytes;
    const size_t rows_bytes = size_t(quantized_rows_bytes(n, longest));
    const int64_t stride = second.row_bytes;  // enough activations for a row, and no power of two either
    uint8_t *const memory = static_cast<uint8_t *>(thread_scratch(rows_bytes + size_t(n * stride) * sizeof(T)));
    if (!memory) return SPARSIFY_NO_MEMORY;
    T *const between = reinterpret_cast<T *>(memory + rows_bytes);
    QuantizedTokens tokens;
    tokens.rows = memory;
    QuantizedSums sums;

    const T *x = static_cast<const T *>(first.call.x) + first_token * first.call.x_stride;
    for (int64_t t = 0; t < n; ++t) quantize_token(first, x + t * first.call.x_stride, t, tokens);
    for (int64_t block = 0; block * BLOCK_ROWS < first.call.out; ++block)
        multiply_quantized_block(first, tokens, block, 0, n, sums, between, stride);
    for (int64_t t = 0; t < n; ++t) quantize_token(second, between + t * stride, t, tokens);
    T *y = static_cast<T *>(second.call.y) + first_token * second.call.y_stride;
    for (int64_t block = 0; block * BLOCK_ROWS < second.call.out; ++block)
        multiply_quantized_block(second, tokens, block, 0, n, sums, y, second.call.y_stride);
    return SPARSIFY_OK;
}

template <typename Form, typename T>
int mlp_quantized_blocks(const MlpCall &call) {
    if (!call.first_scale || !call.second_scale) return SPARSIFY_BAD_ARGUMENT;
    QuantizedMlp<Form> mlp;
    if (const int status = open_quantized(mlp.first, call.first, call.first_scale)) return status;
    if (const int status = open_quantized(mlp.second, call.second, call.second_scale)) return status;
    const int64_t fitting = QUANTIZED_MLP_BYTES / ((call.second.in + 1) * int64_t(sizeof(T)));
    const int64_t widest = fitting < QUANTIZED_MLP_FEWEST_TOKENS ? QUANTIZED_MLP_FEWEST_TOKENS
                           : fitting > QUANTIZED_BATCH_TOKENS    ? QUANTIZED_BATCH_TOKENS
                                                                 : fitting;
    const int64_t n_tokens = call.first.tokens;
    const double flops = Form::flops(mlp.first.view) + Form::flops(mlp.second.view);
    const int n_threads = worthwhile_threads(flops * double(n_tokens), call.first.n_threads);
    const int64_t round = n_threads * widest;
    mlp.n_tiles = (n_tokens + round - 1) / round * n_threads;  // as many for each thread
    if (mlp.n_tiles > n_tokens) mlp.n_tiles = n_tokens;
    return run_tasks(mlp.n_tiles, n_threads, run_quantized_mlp_tile<Form, T>, &mlp);
}

}  // namespace
