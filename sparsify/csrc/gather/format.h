// The `gather` form, for few tokens: columns are looked up in registers. What lies where in `index`.
//
// Sixteen output rows, the *lanes* of a tile, walk their kept columns from left to right together. A *window* is 32
// consecutive columns of x: two registers of 16. In one *step* each lane may take its next kept column if that lies in
// the window; one two-register permute then fetches sixteen activations, and one FMA uses them. What it costs is the
// lanes that rest in a step (6% of them at 50% sparsity, 38% at 90%); no gather instruction is ever issued.
// Three or six steps share a window. Six steps share a 32-bit word per lane: 5 bits of column each.
// Four tiles make a *block*, 64 consecutive rows that lie in the lanes in an order of their own.
//
//   GatherHeader
//   uint64 tile_values[n_tiles + 1]   packed values before each tile
//   uint32 tile_groups[n_tiles + 1]   groups of six steps before each tile
//   uint8  rows[n_tiles][16]          the row of each lane, counted from its block's first; GATHER_NO_ROW past the last
//   uint32 words[n_groups][16]        the column of step s is (word >> 5 s) % 32, counted from the window's start
//   uint16 lanes[n_groups][6]         bit l: lane l takes part in the step
//   uint8  moves[n_groups][6 / S]     how far each window starts right of the one before; a tile begins at column 0
//
// values: by step, then lane. `padded` stores all 16 of a step, zeros for the lanes that rest; else only the kept ones.
// GATHER_TAIL zeros follow, so that a whole register may be loaded anywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

constexpr int GATHER_LANES = 16;
constexpr int GATHER_WINDOW = 32;
constexpr int GATHER_STEPS = 6;  // per group
constexpr int GATHER_COLUMN_BITS = 5;
constexpr int GATHER_TAIL = 16;
constexpr int GATHER_BLOCK_TILES = 4;
constexpr int GATHER_BLOCK_ROWS = GATHER_BLOCK_TILES * GATHER_LANES;
constexpr uint8_t GATHER_NO_ROW = 255;
constexpr uint32_t GATHER_MAGIC = 0x31524847;  // "GHR1"

struct GatherHeader {
    uint32_t magic;
    uint32_t steps_per_window;  // S
    uint32_t padded;            // 0 or 1
    uint32_t n_tiles;
    uint32_t n_groups;
    uint32_t unused;
    int64_t out, in, nnz;
    int64_t n_values;  // with padding and tail
    int64_t unused2;
};
static_assert(sizeof(GatherHeader) == 64, "the layout of the blob");

// Byte offsets in index. `end` is its size.
struct GatherSections {
    int64_t tile_values, tile_groups, rows, words, lanes, moves, end;
};

static inline GatherSections gather_sections(int64_t n_tiles, int64_t n_groups, int64_t steps_per_window) {
    GatherSections s;
    s.tile_values = int64_t(sizeof(GatherHeader));
    s.tile_groups = s.tile_values + 8 * (n_tiles + 1);
    s.rows = s.tile_groups + 4 * (n_tiles + 1);
    s.words = (s.rows + GATHER_LANES * n_tiles + 63) / 64 * 64;
    s.lanes = s.words + 4 * GATHER_LANES * n_groups;
    s.moves = s.lanes + 2 * GATHER_STEPS * n_groups;
    s.end = s.moves + GATHER_STEPS / steps_per_window * n_groups;
    return s;
}

// Groups whose products are summed before they are added to the total of a lane: about the square root of the steps of
// a tile, in steps. One long chain of additions is 3 to 11 times less accurate than dense torch at 4096 columns.
static inline int64_t gather_groups_per_sum(const GatherHeader *h) {
    const int64_t groups_per_tile = h->n_tiles ? h->n_groups / h->n_tiles : 0;
    int64_t n = 2;
    while (GATHER_STEPS * n * n < groups_per_tile) ++n;
    return n;
}

struct GatherView {
    const GatherHeader *header;
    const uint64_t *tile_values;
    const uint32_t *tile_groups;
    const uint8_t *rows;
    const uint32_t *words;
    const uint16_t *lanes;
    const uint8_t *moves;
};

static inline GatherView gather_view(const uint8_t *index) {
    const GatherHeader *h = reinterpret_cast<const GatherHeader *>(index);
    const GatherSections s = gather_sections(h->n_tiles, h->n_groups, h->steps_per_window);
    return {h,
            reinterpret_cast<const uint64_t *>(index + s.tile_values),
            reinterpret_cast<const uint32_t *>(index + s.tile_groups),
            index + s.rows,
            reinterpret_cast<const uint32_t *>(index + s.words),
            reinterpret_cast<const uint16_t *>(index + s.lanes),
            index + s.moves};
}

}  // namespace sparsify
