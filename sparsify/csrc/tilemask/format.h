// The forms quadmask, of int8 values, and pairmask, of bfloat16 ones: one bit per weight, in tiles. What lies where in
// `index`.
//
// A *tile* is 16 output rows times a *group* of neighbouring inputs, as many as a 32-bit lane holds: 4 of int8, 2 of
// bfloat16. A mask says which of its weights are kept, and the kept ones follow each other in `values`: an expand
// instruction puts them back into their places, and one instruction multiplies them with the activations of the group
// and adds them up for each row. Up to four tiles one below the other make a *block*: 64 rows, whose tiles share the
// activations and lie beside each other.
//
//   TileMaskHeader
//   uint64 block_values[n_blocks + 1]            values before each block
//   Mask   masks[n_blocks][n_groups][n_tiles]    bit group r + i: row r of the tile keeps the weight of its input i;
//                                                uint64 in quadmask, uint32 in pairmask
//
// n_tiles is 4, or as many as the last block has rows for.
//
// values: by block, group, tile, bit; zeros up to a multiple of 4; TILEMASK_TAIL zeros, so that a whole register may be
// loaded anywhere. In quadmask int32 row_sums[out] follow, the sums of the weights of each row, with which a kernel
// takes out the zero point of the activations.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

constexpr int TILEMASK_TILE_ROWS = 16;
constexpr int TILEMASK_BLOCK_TILES = 4;
constexpr int TILEMASK_BLOCK_ROWS = TILEMASK_TILE_ROWS * TILEMASK_BLOCK_TILES;
constexpr int TILEMASK_TAIL = 64;
constexpr uint32_t TILEMASK_MAGIC = 0x314b4d54;  // "TMK1"
constexpr int QUADMASK_GROUP = 4, PAIRMASK_GROUP = 2;

struct TileMaskHeader {
    uint32_t magic, group;
    int64_t out, in, nnz;
    int64_t unused[4];
};
static_assert(sizeof(TileMaskHeader) == 64, "the layout of the blob");

template <int GROUP>
struct TileMaskWord;
template <>
struct TileMaskWord<QUADMASK_GROUP> {
    using Mask = uint64_t;
};
template <>
struct TileMaskWord<PAIRMASK_GROUP> {
    using Mask = uint32_t;
};
template <int GROUP>
using TileMaskOf = typename TileMaskWord<GROUP>::Mask;

static inline int64_t tilemask_n_groups(int group, int64_t in) { return (in + group - 1) / group; }
static inline int64_t tilemask_n_blocks(int64_t out) { return (out + TILEMASK_BLOCK_ROWS - 1) / TILEMASK_BLOCK_ROWS; }

// Tiles of a block. All tiles follow each other, so that there are 4 block before it.
static inline int64_t tilemask_n_tiles(int64_t out, int64_t block) {
    const int64_t left = (out + TILEMASK_TILE_ROWS - 1) / TILEMASK_TILE_ROWS - block * TILEMASK_BLOCK_TILES;
    return left < TILEMASK_BLOCK_TILES ? left : TILEMASK_BLOCK_TILES;
}

static inline int64_t tilemask_masks_offset(int64_t out) {
    return int64_t(sizeof(TileMaskHeader)) + 8 * (tilemask_n_blocks(out) + 1);
}

static inline int64_t tilemask_index_bytes(int group, int64_t out, int64_t in) {
    const int64_t n_tiles = (out + TILEMASK_TILE_ROWS - 1) / TILEMASK_TILE_ROWS;
    return tilemask_masks_offset(out) + TILEMASK_TILE_ROWS * group / 8 * n_tiles * tilemask_n_groups(group, in);
}

// Values before the row sums, and all of them.
static inline int64_t tilemask_n_weights(int64_t nnz) { return (nnz + 3) / 4 * 4 + TILEMASK_TAIL; }
static inline int64_t tilemask_n_values(int group, int64_t out, int64_t nnz) {
    return tilemask_n_weights(nnz) + (group == QUADMASK_GROUP ? 4 * out : 0);
}

template <int GROUP>
struct TileMaskView {
    const TileMaskHeader *header;
    const uint64_t *block_values;
    const TileMaskOf<GROUP> *masks;

    TileMaskView() = default;
    explicit TileMaskView(const uint8_t *index)
        : header(reinterpret_cast<const TileMaskHeader *>(index)),
          block_values(reinterpret_cast<const uint64_t *>(index + sizeof(TileMaskHeader))),
          masks(reinterpret_cast<const TileMaskOf<GROUP> *>(index + tilemask_masks_offset(header->out))) {}

    const TileMaskOf<GROUP> *masks_of(int64_t block) const {
        return masks + block * TILEMASK_BLOCK_TILES * tilemask_n_groups(GROUP, header->in);
    }
};

}  // namespace sparsify
