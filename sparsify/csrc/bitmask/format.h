// The `bitmask` form, for few tokens and few zeros: one bit per weight. What lies where in `index`.
//
// Sixteen output rows make a tile. For each column a 16-bit mask says which of them keep a weight, and the kept ones
// follow each other in `values`: an expand instruction puts them back into their lanes, one FMA per token multiplies
// them with the activation of the column, and no lane ever has to be summed over.
//
//   BitmaskHeader
//   uint64 tile_values[n_tiles + 1]   values before each tile
//   uint16 masks[n_tiles][in]         bit l: row 16 tile + l keeps its weight in this column
//
// values: by tile, column, row. BITMASK_TAIL zeros follow, so that a whole register may be loaded anywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

constexpr int BITMASK_LANES = 16;
constexpr int BITMASK_TAIL = 16;
constexpr uint32_t BITMASK_MAGIC = 0x314b534d;  // "MSK1"

struct BitmaskHeader {
    uint32_t magic;
    uint32_t n_tiles;
    int64_t out, in, nnz;
    int64_t unused[4];
};
static_assert(sizeof(BitmaskHeader) == 64, "the layout of the blob");

// Columns whose products are summed before they are added to the total of a row, so that a sum has about the square
// root of a row's weights. One long chain of additions is 3 to 11 times less accurate than dense torch at 4096 columns.
static inline int64_t bitmask_columns_per_sum(const BitmaskHeader *h) {
    const int64_t per_row = h->out ? h->nnz / h->out : 0;
    int64_t n_sums = 1;
    while (n_sums * n_sums < per_row) ++n_sums;
    return h->in / n_sums + 1;
}

struct BitmaskView {
    const BitmaskHeader *header;
    const uint64_t *tile_values;
    const uint16_t *masks;
};

static inline int64_t bitmask_masks_offset(int64_t n_tiles) {
    return int64_t(sizeof(BitmaskHeader)) + 8 * (n_tiles + 1);
}

static inline BitmaskView bitmask_view(const uint8_t *index) {
    const BitmaskHeader *h = reinterpret_cast<const BitmaskHeader *>(index);
    return {h, reinterpret_cast<const uint64_t *>(index + sizeof(BitmaskHeader)),
            reinterpret_cast<const uint16_t *>(index + bitmask_masks_offset(h->n_tiles))};
}

}  // namespace sparsify
