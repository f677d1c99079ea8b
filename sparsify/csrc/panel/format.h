// The panel form, for many tokens. What lies where in `index`, shared by the packer and the kernels.
//
// Columns are taken in blocks of k_block, rows in windows of window_rows. Within a (block, window) the rows are sorted
// by how many weights they keep there and taken four at a time: a *cell*. A cell's weights are split into runs by
// *pattern*, which of its 4 rows share the column:
//
//     all 4 rows      n_quad columns
//     3 of 4          n_triple columns for each of the 4 patterns
//     2 of 4          n_pair columns for each of the 6 patterns
//     1 row           n_single columns for each of the 4 rows
//
// A run is interleaved: one column of each of its patterns, then the next ones. So a kernel is four small loops, and
// even with one vector of tokens has several sums to add to, whose additions need not wait for one another. An
// activation that is loaded once serves every row of the pattern. With a tile of more vectors than the registers have
// sums for (panel/cell.inc.h), a kernel goes through the cell twice, for two rows each, or four times, for one: at each
// step a row finds its weights and columns at fixed places. What costs most is a loop that ends when the branch
// predictor did not expect it (3072x768, 16 tokens, 50%: 1.7x). Therefore the counts are few, depend only on how dense
// a cell is, and change slowly from one cell to the next. Columns that do not fit the counts are split, a triple into a
// pair and a single for example; where a run is short of columns it is padded with column k_block, whose activations
// are zero, and the value zero. Very sparse weights, and all of them for AVX2, have singles alone
// (PANEL_PATTERN_DENSITY in panel/cell.inc.h).
//
//   PanelHeader
//   PanelStart starts[n_blocks * n_windows + 1]    where the values and columns of a (block, window) begin
//   PanelCell  cells[n_blocks][padded_rows / 4]
//   uint8_t    columns[n_columns]                  relative to the block, run by run in the order above
//
// Blocks are the outer order, so that a tile of activations (k_block x tokens) stays in the L1 cache while all rows
// pass. values: for each column in this order, one weight for each row of its pattern, first row first.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

constexpr int PANEL_CELL_ROWS = 4;
constexpr int PANEL_BUNDLE_ROWS = 16;         // rows are padded to whole bundles, which are transposed on the way out
constexpr int PANEL_MAX_K_BLOCK = 240;        // columns and counts are bytes
constexpr int PANEL_MAX_WINDOW_ROWS = 256;    // rows of a cell are bytes
constexpr uint32_t PANEL_MAGIC = 0x314c4e50;  // "PNL1"

// The patterns of each run, in order: a pair is followed by the other two rows.
constexpr int PANEL_QUADS[1] = {15};
constexpr int PANEL_TRIPLES[4] = {7, 11, 13, 14};
constexpr int PANEL_PAIRS[6] = {3, 12, 5, 10, 6, 9};
constexpr int PANEL_SINGLES[4] = {1, 2, 4, 8};

struct PanelHeader {
    uint32_t magic;
    uint16_t k_block, window_rows;
    int64_t out, in, nnz, n_columns, n_values;
    int64_t unused[2];
};
static_assert(sizeof(PanelHeader) == 64, "the layout of the blob");

struct PanelStart {
    int64_t value, column;
};

struct PanelCell {
    uint8_t n_quad, n_triple, n_pair, n_single;
    uint8_t rows[PANEL_CELL_ROWS];  // within the window
};
static_assert(sizeof(PanelCell) == 8, "the layout of the blob");
constexpr int PANEL_MAX_CELL_VALUES = 255 * (4 + 4 * 3 + 6 * 2 + 4);

struct PanelSections {
    int64_t n_blocks, n_windows, padded_rows;
    int64_t cells, columns;  // byte offsets in index; starts follow the header
};

static inline PanelSections panel_sections(int64_t out, int64_t in, int64_t k_block, int64_t window_rows) {
    PanelSections s;
    s.n_blocks = in > 0 ? (in + k_block - 1) / k_block : 1;  // one, so that every output is written
    s.n_windows = (out + window_rows - 1) / window_rows;
    s.padded_rows = (out + PANEL_BUNDLE_ROWS - 1) / PANEL_BUNDLE_ROWS * PANEL_BUNDLE_ROWS;
    s.cells = int64_t(sizeof(PanelHeader)) + (s.n_blocks * s.n_windows + 1) * int64_t(sizeof(PanelStart));
    s.columns = s.cells + s.n_blocks * s.padded_rows / PANEL_CELL_ROWS * int64_t(sizeof(PanelCell));
    return s;
}

}  // namespace sparsify
