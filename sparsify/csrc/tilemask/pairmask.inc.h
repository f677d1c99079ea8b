// linear for the pairmask form (tilemask/format.h), for the instruction set of the simd/*.h included before. The form
// is made for AMX; elsewhere a plain loop gives right results slowly.
//
// The tokens of a batch are copied first, with zeros for what is not finite; then blocks of 64 output rows are the
// tasks. What is not finite is added to the sums of the rows that keep its input: no removed weight meets it.
#pragma once

#include "few_tokens.inc.h"
#include "runtime/kernels.h"
#include "runtime/threads.h"
#include "simd/scalar.h"
#include "sparsify.h"
#include "tilemask/format.h"
#ifdef __AMX_BF16__
#include "tilemask/amx.inc.h"
#endif

namespace {

using namespace sparsify;

// Copied together: a block is expanded once for all of them, and their sums are on the stack of a task.
constexpr int64_t PAIRMASK_BATCH_TOKENS = 256;
constexpr int64_t PAIRMASK_TASKS_PER_THREAD = 8;
constexpr int64_t PAIRMASK_TOKENS_PER_TASK = 8;  // of those that copy
constexpr int PAIRMASK_PAIRS_PER_SUM = 16;       // as AMX has it: a sum of 32 products, which is added to the total

struct PairmaskBatch {
    const LinearCall *call;
    const TileMaskView<PAIRMASK_GROUP> *view;
    int64_t first_token, n_tokens;
    BFloat16 *rows;  // the copies, stride apart
    int64_t stride;
    bool finite[PAIRMASK_BATCH_TOKENS];
    int64_t first_block, end_block, blocks_per_task;

    const BFloat16 *x(int64_t token) const {
        return static_cast<const BFloat16 *>(call->x) + (first_token + token) * call->x_stride;
    }
};

inline bool is_finite(BFloat16 a) { return (uint16_t(a) & 0x7f80) != 0x7f80; }

// Copies the tokens of a task.
int copy_tokens(const void *context, int64_t task) {
    PairmaskBatch &batch = **static_cast<PairmaskBatch *const *>(context);
    const int64_t in = batch.call->in, first = task * PAIRMASK_TOKENS_PER_TASK, end = first + PAIRMASK_TOKENS_PER_TASK;
    for (int64_t t = first; t < end && t < batch.n_tokens; ++t) {
        const BFloat16 *x = batch.x(t);
        BFloat16 *row = batch.rows + t * batch.stride;
        unsigned n_finite = 0;
        for (int64_t k = 0; k < in; ++k) {
            row[k] = is_finite(x[k]) ? x[k] : BFloat16(0);
            n_finite += is_finite(x[k]);
        }
        memset(row + in, 0, size_t(batch.stride - in) * sizeof *row);
        batch.finite[t] = n_finite == in;
    }
    return SPARSIFY_OK;
}

// Calls visit(row of the block, input, weight) for the weights of the pairs from `first` to before `end`. Moves past
// what it read.
template <typename Visit>
inline void for_each_weight(const uint32_t *&masks, const BFloat16 *&values, int64_t n_tiles, int64_t first,
                            int64_t end, Visit visit) {
    for (int64_t pair = first; pair < end; ++pair)
        for (int64_t tile = 0; tile < n_tiles; ++tile)
            for (uint32_t mask = *masks++; mask; mask &= mask - 1) {
                const int bit = __builtin_ctz(mask);
                visit(tile * TILEMASK_TILE_ROWS + bit / 2, 2 * pair + bit % 2, to_float(*values++));
            }
}

#ifndef __AMX_BF16__
// sums[row of the block] for one token.
void multiply_block(int64_t n_tiles, const uint32_t *masks, const BFloat16 *values, int64_t n_pairs, const BFloat16 *x,
                    float *sums) {
    memset(sums, 0, TILEMASK_BLOCK_ROWS * sizeof *sums);
    for (int64_t pair = 0; pair < n_pairs; pair += PAIRMASK_PAIRS_PER_SUM) {
        const int64_t end = pair + PAIRMASK_PAIRS_PER_SUM < n_pairs ? pair + PAIRMASK_PAIRS_PER_SUM : n_pairs;
        float part[TILEMASK_BLOCK_ROWS] = {};
        for_each_weight(masks, values, n_tiles, pair, end,
                        [&](int64_t row, int64_t input, float w) { part[row] += w * to_float(x[input]); });
        for (int row = 0; row < TILEMASK_BLOCK_ROWS; ++row) sums[row] += part[row];
    }
}
#endif

// The outputs of a block for some tokens from their sums.
void finish_pairmask(const PairmaskBatch &batch, int64_t block, int64_t first, int64_t n, float *sums) {
    const LinearCall &call = *batch.call;
    const Rows rows = part_of_call(call, block * TILEMASK_BLOCK_ROWS, TILEMASK_BLOCK_ROWS);
    const BFloat16 *bias = call.bias ? static_cast<const BFloat16 *>(call.bias) + rows.first : nullptr;
    BFloat16 *y = static_cast<BFloat16 *>(call.y) + (batch.first_token + first) * call.y_stride;
    for (int64_t t = 0; t < n; ++t) {
        float *const of_token = sums + t * TILEMASK_BLOCK_ROWS;
        if (!batch.finite[first + t]) {
            const BFloat16 *x = batch.x(first + t), *values = static_cast<const BFloat16 *>(call.values);
            const uint32_t *masks = batch.view->masks_of(block);
            values += batch.view->block_values[block];
            for_each_weight(masks, values, tilemask_n_tiles(call.out, block), 0,
                            tilemask_n_groups(PAIRMASK_GROUP, call.in), [&](int64_t row, int64_t input, float w) {
                                if (!is_finite(x[input])) of_token[row] += w * to_float(x[input]);
                            });
        }
        finish_block(of_token + rows.skipped, nullptr, bias, y + t * call.y_stride + rows.first - call.first_row,
                     int(rows.n), int(call.activation));
    }
}

int run_pairmask_task(const void *context, int64_t task) {
    const PairmaskBatch &batch = **static_cast<PairmaskBatch *const *>(context);
    const LinearCall &call = *batch.call;
    const int64_t n_pairs = tilemask_n_groups(PAIRMASK_GROUP, call.in);
    const int64_t first = batch.first_block + task * batch.blocks_per_task;
    for (int64_t block = first; block < first + batch.blocks_per_task && block < batch.end_block; ++block) {
        const int64_t n_tiles = tilemask_n_tiles(call.out, block);
        const uint32_t *masks = batch.view->masks_of(block);
        const BFloat16 *values = static_cast<const BFloat16 *>(call.values) + batch.view->block_values[block];
        // And what is read past the rows of a token that begin within them.
#ifdef __AMX_BF16__
        alignas(64) float sums[PAIRMASK_BATCH_TOKENS * TILEMASK_BLOCK_ROWS + WIDTH];
        multiply_block_amx(n_tiles, batch.n_tokens, masks, values, n_pairs,
                           reinterpret_cast<const uint8_t *>(batch.rows), 2 * batch.stride, sums);
        finish_pairmask(batch, block, 0, batch.n_tokens, sums);
#else
        alignas(64) float sums[TILEMASK_BLOCK_ROWS + WIDTH];
        for (int64_t t = 0; t < batch.n_tokens; ++t) {
            multiply_block(n_tiles, masks, values, n_pairs, batch.rows + t * batch.stride, sums);
            finish_pairmask(batch, block, t, 1, sums);
        }
#endif
    }
    return SPARSIFY_OK;
}

int linear_pairmask(const LinearCall &call) {
    const TileMaskView<PAIRMASK_GROUP> view(call.index);
    if (view.header->out != call.out || view.header->in != call.in) return SPARSIFY_BAD_INDEX;
    PairmaskBatch batch;
    const PairmaskBatch *const context = &batch;
    batch.call = &call;
    batch.view = &view;
    batch.first_block = call.first_row / TILEMASK_BLOCK_ROWS;
    batch.end_block = (call.end_row + TILEMASK_BLOCK_ROWS - 1) / TILEMASK_BLOCK_ROWS;
    const int64_t n_blocks = batch.end_block - batch.first_block;
    // Whole cache lines, an odd number of them: rows a power of two apart would share few sets of the cache.
    batch.stride = ((call.in + 31) / 32 | 1) * 32;
    for (int64_t first = 0; first < call.tokens; first += PAIRMASK_BATCH_TOKENS) {
        const int64_t left = call.tokens - first;
        batch.first_token = first;
        batch.n_tokens = left < PAIRMASK_BATCH_TOKENS ? left : PAIRMASK_BATCH_TOKENS;
        const int64_t padded = (batch.n_tokens + 15) / 16 * 16;
        batch.rows = static_cast<BFloat16 *>(thread_scratch(size_t(padded * batch.stride) * sizeof(BFloat16)));
        if (!batch.rows) return SPARSIFY_NO_MEMORY;
        const int64_t n_copying = (batch.n_tokens + PAIRMASK_TOKENS_PER_TASK - 1) / PAIRMASK_TOKENS_PER_TASK;
        if (const int status = run_tasks(n_copying, call.n_threads, copy_tokens, &context)) return status;
        const double weights = double(n_blocks * TILEMASK_BLOCK_ROWS) * double(call.in);
        const int n_threads = worthwhile_threads(weights / 4 * double(2 + batch.n_tokens), call.n_threads);
        const int64_t n_tasks = n_threads > 1 ? n_threads * PAIRMASK_TASKS_PER_THREAD : 1;
        batch.blocks_per_task = (n_blocks + n_tasks - 1) / n_tasks;
        const int64_t needed = (n_blocks + batch.blocks_per_task - 1) / batch.blocks_per_task;
        if (const int status = run_tasks(needed, n_threads, run_pairmask_task, &context)) return status;
    }
    return SPARSIFY_OK;
}

}  // namespace
