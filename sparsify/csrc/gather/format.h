// The `gather` and `sell` forms, for few tokens: output rows side by side. What lies where in `index`.
//
// Output rows, the *lanes* of a tile, walk their kept columns from left to right together. A *window* is as many
// consecutive columns of x as a step can choose from. In one *step* each lane may take its next kept column if that
// lies in the window; an activation is fetched for every lane, and one FMA uses them. What it costs is the lanes that
// rest in a step. A tile is one of three, the last of which is the form `sell`, sliced ELLPACK with columns of a byte:
//
//     GatherTile      lanes  window             steps that share a window  lanes that rest in a step, at 50% and 90%
//     GATHER_WIDE     16     32: two registers  6 or 3                     6% and 38%
//     GATHER_NARROW   8      8: one register    1                          15% and 52%
//     GATHER_SELL     8      256                1                          1% and 3%
//
// In `gather` a permute looks activations up in registers, and no gather instruction is ever issued. In `sell` a gather
// instruction, eight loads, fetches them: few instructions for a weight at any sparsity, and fewer in flight until
// memory answers, but processors differ much in what a gather instruction costs.
//
// Wide is for AVX-512. With AVX2 a choice from 32 columns takes four permutes and three blends, more than the steps
// that narrow tiles add: 768x768, one token, Emerald Rapids: 96 us at 50% and 43 us at 90% wide, 38 and 21 narrow.
// Kernels read either tile: their own fast, the other weight by weight.
//
// Some steps make a *group*, and share a 32-bit word per lane. The tiles of 64 consecutive rows make a *block*, whose
// rows lie in the lanes in an order of their own.
//
//   GatherHeader
//   uint64 tile_values[n_tiles + 1]   packed values before each tile
//   uint32 tile_groups[n_tiles + 1]   groups before each tile
//   uint8  rows[n_tiles][lanes]       the row of each lane, counted from its block's first; GATHER_NO_ROW past the last
//   uint32 words[n_groups][lanes]     the column of step s is (word >> column_bits s) % window, from the window's start
//   uint8  taking[n_groups][steps][lanes / 8]   bit l, lowest byte first: lane l takes part in the step
//   uint8  moves[n_groups][steps / S]           how far each window starts right of the one before; the first at 0
//
// values: by step, then lane. `padded` stores all lanes of a step, zeros for those that rest; else only the kept ones.
// GATHER_TAIL zeros follow, so that a whole register may be loaded anywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

struct GatherTile {
    int lanes, window, steps, column_bits;  // steps: per group
};
constexpr GatherTile GATHER_WIDE = {16, 32, 6, 5}, GATHER_NARROW = {8, 8, 10, 3}, GATHER_SELL = {8, 256, 4, 8};

constexpr int GATHER_MAX_LANES = 16;
constexpr int GATHER_TAIL = 16;
constexpr int GATHER_BLOCK_ROWS = 64;
constexpr uint8_t GATHER_NO_ROW = 255;
constexpr uint32_t GATHER_MAGIC = 0x32524847;  // "GHR2"

struct GatherHeader {
    uint32_t magic;
    uint32_t steps_per_window;  // S
    uint32_t padded;            // 0 or 1
    uint32_t n_tiles;
    uint32_t n_groups;
    uint32_t lanes;
    int64_t out, in, nnz;
    int64_t n_values;  // with padding and tail
    int64_t window;    // says which GatherTile
};
static_assert(sizeof(GatherHeader) == 64, "the layout of the blob");

static inline const GatherTile &gather_tile_of(const GatherHeader *h) {
    return h->window == GATHER_SELL.window   ? GATHER_SELL
           : h->window == GATHER_WIDE.window ? GATHER_WIDE
                                             : GATHER_NARROW;
}

// Byte offsets in index. `end` is its size.
struct GatherSections {
    int64_t tile_values, tile_groups, rows, words, taking, moves, end;
};

static inline GatherSections gather_sections(const GatherTile &tile, int64_t n_tiles, int64_t n_groups,
                                             int64_t steps_per_window) {
    GatherSections s;
    s.tile_values = int64_t(sizeof(GatherHeader));
    s.tile_groups = s.tile_values + 8 * (n_tiles + 1);
    s.rows = s.tile_groups + 4 * (n_tiles + 1);
    s.words = (s.rows + tile.lanes * n_tiles + 63) / 64 * 64;
    s.taking = s.words + 4 * tile.lanes * n_groups;
    s.moves = s.taking + tile.lanes / 8 * tile.steps * n_groups;
    s.end = s.moves + tile.steps / steps_per_window * n_groups;
    return s;
}

// Groups whose products are summed before they are added to the total of a lane: about the square root of the steps of
// a tile, in steps. One long chain of additions is 3 to 11 times less accurate than dense torch at 4096 columns.
static inline int64_t gather_groups_per_sum(const GatherHeader *h) {
    const int64_t groups_per_tile = h->n_tiles ? h->n_groups / h->n_tiles : 0;
    int64_t n = 2;
    while (gather_tile_of(h).steps * n * n < groups_per_tile) ++n;
    return n;
}

struct GatherView {
    const GatherHeader *header;
    const uint64_t *tile_values;
    const uint32_t *tile_groups;
    const uint8_t *rows;
    const uint32_t *words;
    const uint8_t *taking, *moves;
};

static inline GatherView gather_view(const uint8_t *index) {
    const GatherHeader *h = reinterpret_cast<const GatherHeader *>(index);
    const GatherSections s = gather_sections(gather_tile_of(h), h->n_tiles, h->n_groups, h->steps_per_window);
    return {h,
            reinterpret_cast<const uint64_t *>(index + s.tile_values),
            reinterpret_cast<const uint32_t *>(index + s.tile_groups),
            index + s.rows,
            reinterpret_cast<const uint32_t *>(index + s.words),
            index + s.taking,
            index + s.moves};
}

// sums[row of the block] = lanes[lane] for the rows of a tile.
static inline void gather_put(const GatherView &view, const GatherTile &tile, int64_t number, const float *lanes,
                              float *sums) {
    const uint8_t *rows = view.rows + number * tile.lanes;
    for (int l = 0; l < tile.lanes && rows[l] != GATHER_NO_ROW; ++l) sums[rows[l]] = lanes[l];
}

// The lanes that take part in a step, a bit each.
static inline unsigned gather_taking(const GatherView &view, const GatherTile &tile, int64_t group, int step) {
    const int n_bytes = tile.lanes / 8;
    const uint8_t *bytes = view.taking + (group * tile.steps + step) * n_bytes;
    return n_bytes == 1 ? bytes[0] : bytes[0] | unsigned(bytes[1]) << 8;
}

}  // namespace sparsify
