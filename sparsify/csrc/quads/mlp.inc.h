// Two linear layers of the quads form with an activation between, as one kernel: a tile of tokens goes through both,
// and what is between never leaves the caches. A token's activations are quantised when all of them are known, so the
// tile is whole between the layers. Every step is that of two calls, and so are the bits.
#pragma once

#include "panel/spread.inc.h"
#include "quads/kernel.inc.h"

namespace {

using namespace sparsify;

struct QuadsMlpPlan {
    QuadsPlan first, second;
    Spread tiles;
};

template <int V, typename T>
int run_quads_mlp_tile(const QuadsMlpPlan &plan, int64_t first_token, int64_t n_tokens) {
    const QuadsPlan &first = plan.first, &second = plan.second;
    const int64_t first_windows = first.sections.n_windows, second_windows = second.sections.n_windows;
    const int64_t first_words = quads_tile_words<V>(first), second_words = quads_tile_words<V>(second);
    const int64_t first_sums = quads_sums_words<V>(first, first_windows),
                  second_sums = quads_sums_words<V>(second, second_windows);
    const int64_t tile_words = first_words > second_words ? first_words : second_words;
    const int64_t sums_words = first_sums > second_sums ? first_sums : second_sums;
    const int64_t longest = first.call.in > second.call.in ? first.call.in : second.call.in;
    const int64_t row = quads_row_bytes(second.call.in);  // activations for a row, and where it can, no power of two
    const size_t words = size_t(tile_words + sums_words) * 4, between_bytes = size_t(V * WIDTH * row) * sizeof(T);
    uint8_t *const memory =
        static_cast<uint8_t *>(thread_scratch(words + between_bytes + size_t(fill_scratch_bytes<V>(longest))));
    if (!memory) return SPARSIFY_NO_MEMORY;
    uint32_t *const tile = reinterpret_cast<uint32_t *>(memory);
    int32_t *const sums = reinterpret_cast<int32_t *>(tile + tile_words);
    T *const between = reinterpret_cast<T *>(memory + words);
    uint8_t *const scratch = memory + words + between_bytes;
    TokenScales tokens;

    const T *x = static_cast<const T *>(first.call.x) + first_token * first.call.x_stride;
    fill_quads_tile<V>(first, x, first.call.x_stride, n_tokens, scratch, tokens, tile);
    multiply_quads_tile<V>(first, tile, tokens, n_tokens, 0, first_windows, sums, between, row);
    fill_quads_tile<V>(second, between, row, n_tokens, scratch, tokens, tile);
    T *y = static_cast<T *>(second.call.y) + first_token * second.call.y_stride;
    multiply_quads_tile<V>(second, tile, tokens, n_tokens, 0, second_windows, sums, y, second.call.y_stride);
    return SPARSIFY_OK;
}

// A tile of n_vecs vectors, at most MOST.
template <int MOST, typename T>
int run_quads_mlp_tile(const QuadsMlpPlan &plan, int64_t first_token, int64_t n_tokens, int64_t n_vecs) {
    if constexpr (MOST > 1)
        if (n_vecs < MOST) return run_quads_mlp_tile<MOST - 1, T>(plan, first_token, n_tokens, n_vecs);
    return run_quads_mlp_tile<MOST, T>(plan, first_token, n_tokens);
}

template <typename T>
int run_quads_mlp_task(const void *context, int64_t tile) {
    const QuadsMlpPlan &plan = *static_cast<const QuadsMlpPlan *>(context);
    const int64_t first_vec = plan.tiles.first_vec(tile), n_vecs = plan.tiles.first_vec(tile + 1) - first_vec;
    const int64_t left = plan.first.call.tokens - first_vec * WIDTH, tokens = n_vecs * WIDTH;
    return run_quads_mlp_tile<QUADS_MAX_VECS, T>(plan, first_vec * WIDTH, left < tokens ? left : tokens, n_vecs);
}

template <typename T>
int mlp_quads(const MlpCall &call) {
    if (!call.first_scale || !call.second_scale) return SPARSIFY_BAD_ARGUMENT;
    QuadsMlpPlan plan;
    if (const int status = open_quads(plan.first, call.first, call.first_scale)) return status;
    if (const int status = open_quads(plan.second, call.second, call.second_scale)) return status;
    const int64_t n_vecs = (call.first.tokens + WIDTH - 1) / WIDTH;
    const int64_t first_width = widest_quads_tile(plan.first), second_width = widest_quads_tile(plan.second);
    const double nnz = double(plan.first.header.nnz + plan.second.header.nnz);
    const int n_threads = worthwhile_threads(2.0 * nnz * double(n_vecs * WIDTH), int(call.first.n_threads));
    plan.tiles = n_vecs < n_threads
                     ? spread_evenly(n_vecs, n_vecs)
                     : spread_widely(n_vecs, first_width < second_width ? first_width : second_width, n_threads);
    return run_tasks(plan.tiles.n_tiles, n_threads, run_quads_mlp_task<T>, &plan);
}

}  // namespace
