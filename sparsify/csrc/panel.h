// The panel form, for many tokens. What lies where in `index`, shared by the packer and the kernels.
//
// Rows are taken in groups of 4 and columns in blocks of k_block. Within a (block, group) the columns are sorted by
// *pattern*: which of the 4 rows keep a weight there, 15 possibilities (a column kept by none is not stored). The kernel
// then runs one small loop per pattern, in which an activation that is loaded once serves every row of the pattern.
//
//   PanelHeader
//   PanelStart starts[n_blocks * n_bundles + 1]          where a bundle (4 groups, 16 rows) of a block begins
//   uint8_t    counts[n_blocks][n_bundles][4][16]        columns per pattern; [p - 1] for pattern p, the last is unused
//   uint8_t    columns[n_columns]                        relative to the block, by pattern, ascending within a pattern
//
// Blocks are the outer order, so that a tile of activations (k_block x tokens) stays in the L1 cache while all rows
// pass. values: for each column in this order, the kept weights of the 4 rows from top to bottom. No padding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

constexpr int PANEL_GROUP_ROWS = 4;
constexpr int PANEL_BUNDLE_GROUPS = 4;
constexpr int PANEL_BUNDLE_ROWS = PANEL_GROUP_ROWS * PANEL_BUNDLE_GROUPS;
constexpr int PANEL_PATTERNS = 15;
constexpr int PANEL_MAX_K_BLOCK = 240;  // columns and counts are bytes
constexpr uint32_t PANEL_MAGIC = 0x314c4e50;  // "PNL1"

struct PanelHeader {
    uint32_t magic;
    uint32_t k_block;
    int64_t out, in, nnz, n_columns;
    int64_t unused[3];
};
static_assert(sizeof(PanelHeader) == 64, "the layout of the blob");

struct PanelStart {
    int64_t value, column;
};

struct PanelSections {
    int64_t n_blocks, n_bundles, n_starts;
    int64_t counts, columns;  // byte offsets in index; starts follow the header
};

static inline PanelSections panel_sections(int64_t out, int64_t in, int64_t k_block) {
    PanelSections s;
    s.n_blocks = (in + k_block - 1) / k_block;
    s.n_bundles = (out + PANEL_BUNDLE_ROWS - 1) / PANEL_BUNDLE_ROWS;
    s.n_starts = s.n_blocks * s.n_bundles + 1;
    s.counts = int64_t(sizeof(PanelHeader)) + s.n_starts * int64_t(sizeof(PanelStart));
    s.columns = s.counts + s.n_blocks * s.n_bundles * PANEL_BUNDLE_GROUPS * 16;
    return s;
}

}  // namespace sparsify
