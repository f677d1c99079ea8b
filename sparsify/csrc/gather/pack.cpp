// Packs the gather form (layout: gather/format.h) with the tile of the instruction set in use, and the sell form. The
// way back is in unpack.cpp.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "gather/format.h"
#include "runtime/csr.h"
#include "runtime/kernels.h"
#include "runtime/packs.h"
#include "sparsify.h"

using namespace sparsify;

namespace {

// Steps that share a window. More of them save loads of x, fewer save lanes that rest. Best of 1, 2, 3 and 6 at one
// token, 768x768, Zen 4: from 80% sparsity on 3 beats 2 by 12 to 17% although it needs up to 6% more steps.
uint32_t best_steps_per_window(const GatherTile &tile, double density) {
    return tile.window != GATHER_WIDE.window ? 1 : density >= 0.4 ? 6 : 3;
}

// Padded values save the expand of each step (1.4x faster in cache, wide tiles, Zen 4; 1.6x narrow) and cost their
// bytes. Slots per weight are 1.25 in wide tiles at 80% and 1.6 at 90%, in narrow ones 1.17 at 50% and 1.36 at 70%. The
// limit keeps 90% small, 0.13 of dense and not 0.19, and in narrow tiles 70%: 0.36 and not 0.46. The sell form is
// always padded: 1.01 slots per weight at 50 to 80%, 1.03 at 90% and 1.09 at 95% of 4096 inputs.
constexpr double MAX_PADDING = 1.3;

struct Plan {
    GatherTile tile = {};
    int64_t n_tiles = 0, n_groups = 0, nnz = 0;
    uint32_t steps_per_window = 0;
    bool padded = false;
    uint8_t *rows = nullptr;          // n_tiles x lanes, as in the index
    uint32_t *tile_groups = nullptr;  // groups of each tile

    Plan() = default;
    Plan(const Plan &) = delete;
    ~Plan() {
        free(rows);
        free(tile_groups);
    }
    int64_t n_slots() const { return n_groups * tile.steps * tile.lanes; }
    int64_t index_bytes() const { return gather_sections(tile, n_tiles, n_groups, steps_per_window).end; }
    int64_t n_values() const { return (padded ? n_slots() : nnz) + GATHER_TAIL; }
};

// Calls move(window, distance) for each window of a tile and take(step, lane, CSR position, column - window start) for
// each kept weight; returns the number of windows.
//
// A window starts at the leftmost column that some lane still has to take. It could not start further right, and
// further left it would only reach less far: no other choice of windows needs fewer.
template <class Move, class Take>
int64_t walk(const Plan &plan, int64_t tile, int64_t in, const int32_t *crow, const int32_t *col, Move move,
             Take take) {
    const int steps_per_window = int(plan.steps_per_window), lanes = plan.tile.lanes;
    int32_t next[GATHER_MAX_LANES] = {}, end[GATHER_MAX_LANES] = {};
    for (int l = 0; l < lanes; ++l) {
        const uint8_t row = plan.rows[tile * lanes + l];
        if (row == GATHER_NO_ROW) continue;
        const int32_t *of_row = crow + tile * lanes / GATHER_BLOCK_ROWS * GATHER_BLOCK_ROWS + row;
        next[l] = of_row[0];
        end[l] = of_row[1];
    }
    const int64_t last_start = std::max<int64_t>(in - plan.tile.window, 0);  // no window reaches past the end of x
    int64_t start = 0;
    for (int64_t window = 0;; ++window) {
        int64_t leftmost = INT64_MAX;
        for (int l = 0; l < lanes; ++l)
            if (next[l] < end[l]) leftmost = std::min<int64_t>(leftmost, col[next[l]]);
        if (leftmost == INT64_MAX) return window;
        const int64_t wanted = std::min(leftmost, last_start);
        const int64_t distance = std::min<int64_t>(wanted - start, 255);
        start += distance;
        move(window, uint8_t(distance));
        if (start != wanted) continue;  // more than a byte away: an empty window on the way
        for (int l = 0; l < lanes; ++l)
            for (int s = 0; s < steps_per_window && next[l] < end[l]; ++s, ++next[l]) {
                const int64_t column = col[next[l]] - start;
                if (column >= plan.tile.window) break;
                take(window * steps_per_window + s, l, next[l], uint32_t(column));
            }
    }
}

// The lanes of a tile wait for the longest of their rows, so the rows of a block are dealt to its tiles by length: 2%
// fewer steps for random masks, more where some rows are sparser than others. Not over all rows: threads would share
// the cache lines of the output.
void order_rows(int64_t out, int64_t n_lanes, const int32_t *crow, uint8_t *rows) {
    memset(rows, GATHER_NO_ROW, size_t(n_lanes));
    for (int64_t first = 0; first < out; first += GATHER_BLOCK_ROWS, rows += GATHER_BLOCK_ROWS) {
        const int n_rows = int(std::min<int64_t>(out - first, GATHER_BLOCK_ROWS));
        for (int i = 0; i < n_rows; ++i) rows[i] = uint8_t(i);
        const int32_t *of_block = crow + first;
        std::sort(rows, rows + n_rows, [of_block](uint8_t a, uint8_t b) {
            const int32_t na = of_block[a + 1] - of_block[a], nb = of_block[b + 1] - of_block[b];
            return na != nb ? na > nb : a < b;
        });
    }
}

int make_plan(const GatherTile &tile, int64_t out, int64_t in, const int32_t *crow, const int32_t *col, Plan *plan) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    plan->tile = tile;
    plan->n_tiles = (out + plan->tile.lanes - 1) / plan->tile.lanes;
    plan->nnz = crow[out];
    plan->steps_per_window =
        best_steps_per_window(plan->tile, double(plan->nnz) / std::max(double(out) * double(in), 1.0));
    plan->rows = static_cast<uint8_t *>(malloc(size_t(plan->tile.lanes * plan->n_tiles + 1)));
    plan->tile_groups = static_cast<uint32_t *>(malloc(sizeof(uint32_t) * size_t(plan->n_tiles + 1)));
    if (!plan->rows || !plan->tile_groups) return SPARSIFY_NO_MEMORY;
    order_rows(out, plan->tile.lanes * plan->n_tiles, crow, plan->rows);
    const int64_t windows_per_group = plan->tile.steps / plan->steps_per_window;
    for (int64_t tile = 0; tile < plan->n_tiles; ++tile) {
        const int64_t n_windows =
            walk(*plan, tile, in, crow, col, [](int64_t, uint8_t) {}, [](int64_t, int, int32_t, uint32_t) {});
        plan->tile_groups[tile] = uint32_t((n_windows + windows_per_group - 1) / windows_per_group);
        plan->n_groups += plan->tile_groups[tile];
    }
    plan->padded = tile.window == GATHER_SELL.window || double(plan->n_slots()) <= MAX_PADDING * double(plan->nnz);
    return SPARSIFY_OK;
}

int64_t index_bytes(const GatherTile &tile, int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    Plan plan;
    if (const int status = make_plan(tile, out, in, crow, col, &plan)) return status;
    return plan.index_bytes();
}

int64_t n_values(const GatherTile &tile, int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    Plan plan;
    if (const int status = make_plan(tile, out, in, crow, col, &plan)) return status;
    return plan.n_values();
}

int pack(const GatherTile &tile, int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,
         int64_t *order) {
    Plan plan;
    if (const int status = make_plan(tile, out, in, crow, col, &plan)) return status;
    const GatherSections at = gather_sections(plan.tile, plan.n_tiles, plan.n_groups, plan.steps_per_window);
    memset(index, 0, size_t(at.end));
    const int64_t lanes = plan.tile.lanes, steps = plan.tile.steps;
    GatherHeader header = {};
    header.magic = GATHER_MAGIC;
    header.steps_per_window = plan.steps_per_window;
    header.padded = plan.padded;
    header.n_tiles = uint32_t(plan.n_tiles);
    header.n_groups = uint32_t(plan.n_groups);
    header.lanes = uint32_t(lanes);
    header.out = out;
    header.in = in;
    header.nnz = plan.nnz;
    header.n_values = plan.n_values();
    header.window = plan.tile.window;
    memcpy(index, &header, sizeof header);
    memcpy(index + at.rows, plan.rows, size_t(lanes * plan.n_tiles));
    uint64_t *tile_values = reinterpret_cast<uint64_t *>(index + at.tile_values);
    uint32_t *tile_groups = reinterpret_cast<uint32_t *>(index + at.tile_groups);
    uint32_t *words = reinterpret_cast<uint32_t *>(index + at.words);
    uint8_t *taking = index + at.taking, *moves = index + at.moves;

    // Weights come lane by lane within a window and are stored step by step: a tile waits here until it is complete.
    uint32_t most_groups = 0;
    for (int64_t tile = 0; tile < plan.n_tiles; ++tile) most_groups = std::max(most_groups, plan.tile_groups[tile]);
    int32_t *slots =
        static_cast<int32_t *>(malloc(sizeof(int32_t) * (size_t(most_groups) * size_t(steps * lanes) + 1)));
    if (!slots) return SPARSIFY_NO_MEMORY;

    int64_t group = 0, value = 0;
    for (int64_t tile = 0; tile < plan.n_tiles; ++tile) {
        tile_values[tile] = uint64_t(value);
        tile_groups[tile] = uint32_t(group);
        uint32_t *const tile_words = words + group * lanes;
        uint8_t *const tile_taking = taking + group * steps * lanes / 8;
        uint8_t *const tile_moves = moves + group * (steps / plan.steps_per_window);
        walk(
            plan, tile, in, crow, col, [&](int64_t window, uint8_t distance) { tile_moves[window] = distance; },
            [&](int64_t step, int lane, int32_t position, uint32_t column) {
                tile_words[step / steps * lanes + lane] |= column << (plan.tile.column_bits * (step % steps));
                tile_taking[(step * lanes + lane) / 8] |= uint8_t(1u << lane % 8);
                slots[step * lanes + lane] = position;
            });
        const int64_t n_steps = int64_t(plan.tile_groups[tile]) * steps;
        for (int64_t step = 0; step < n_steps; ++step)
            for (int64_t l = 0; l < lanes; ++l) {
                const bool takes = tile_taking[(step * lanes + l) / 8] >> l % 8 & 1;
                if (takes || plan.padded) order[value++] = takes ? slots[step * lanes + l] : -1;
            }
        group += plan.tile_groups[tile];
    }
    tile_values[plan.n_tiles] = uint64_t(value);
    tile_groups[plan.n_tiles] = uint32_t(group);
    for (int i = 0; i < GATHER_TAIL; ++i) order[value++] = -1;
    free(slots);
    return SPARSIFY_OK;
}

}  // namespace

extern "C" {

SPARSIFY_PACKS(gather, kernel_in_use()->gather_tile)
SPARSIFY_PACKS(sell, GATHER_SELL)
}
