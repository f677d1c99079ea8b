// Out of the panel form (panel/format.h), and the check of an index that somebody else wrote.
#include <stdlib.h>
#include <string.h>

#include "panel/format.h"
#include "sparsify.h"

namespace sparsify {
namespace {

template <typename T>
T read(const uint8_t *from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

int64_t n_cell_columns(const PanelCell &cell) {
    return cell.n_quad + 4 * cell.n_triple + 6 * cell.n_pair + PANEL_CELL_ROWS * cell.n_single;
}

int64_t n_cell_values(const PanelCell &cell) {
    return 4 * cell.n_quad + 3 * 4 * cell.n_triple + 2 * 6 * cell.n_pair + PANEL_CELL_ROWS * cell.n_single;
}

// Calls visit(pattern, column) for the entries of a cell in stored order until it returns a nonzero status.
template <typename Visit>
int for_each_entry(const PanelCell &cell, const uint8_t *columns, Visit visit) {
    int status = 0;
    const auto run = [&](int length, const auto &patterns) {
        for (int i = 0; i < length; ++i)
            for (const int pattern : patterns) {
                if (status) return;
                status = visit(pattern, *columns++);
            }
    };
    run(cell.n_quad, PANEL_QUADS);
    run(cell.n_triple, PANEL_TRIPLES);
    run(cell.n_pair, PANEL_PAIRS);
    run(cell.n_single, PANEL_SINGLES);
    return status;
}

// Calls visit(block, first row of the window, rows in it, its cells) for each (block, window) until nonzero.
template <typename Visit>
int for_each_window(const PanelHeader &header, const PanelSections &sections, const uint8_t *index, Visit visit) {
    const uint8_t *cells = index + sections.cells;
    for (int64_t block = 0; block < sections.n_blocks; ++block)
        for (int64_t row = 0; row < header.out; row += header.window_rows) {
            const int64_t left = sections.padded_rows - row;
            const int64_t n_rows = left < header.window_rows ? left : header.window_rows;
            if (const int status = visit(block, row, n_rows, cells)) return status;
            cells += n_rows / PANEL_CELL_ROWS * int64_t(sizeof(PanelCell));
        }
    return SPARSIFY_OK;
}

int check_cell(const PanelHeader &header, int64_t first_row, int64_t block, const PanelCell &cell,
               const uint8_t *columns) {
    const int64_t left = header.in - block * header.k_block, width = left < header.k_block ? left : header.k_block;
    uint8_t seen[256] = {};
    return for_each_entry(cell, columns, [&](int pattern, uint8_t column) -> int {
        if (column == header.k_block) return SPARSIFY_OK;
        if (column >= width || (seen[column] & pattern)) return SPARSIFY_BAD_INDEX;
        seen[column] |= uint8_t(pattern);
        for (int r = 0; r < PANEL_CELL_ROWS; ++r)
            if ((pattern >> r & 1) && first_row + cell.rows[r] >= header.out) return SPARSIFY_BAD_INDEX;
        return SPARSIFY_OK;
    });
}

}  // namespace
}  // namespace sparsify

using namespace sparsify;

extern "C" {

int64_t sparsify_panel_nnz(const uint8_t *index) { return read<PanelHeader>(index).nnz; }

int sparsify_panel_check(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in >= INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (index_bytes < int64_t(sizeof(PanelHeader))) return SPARSIFY_BAD_INDEX;
    const PanelHeader header = read<PanelHeader>(index);
    if (header.magic != PANEL_MAGIC || header.out != out || header.in != in || header.k_block < 1 ||
        header.k_block > PANEL_MAX_K_BLOCK || header.window_rows < PANEL_BUNDLE_ROWS ||
        header.window_rows > PANEL_MAX_WINDOW_ROWS || header.window_rows % PANEL_BUNDLE_ROWS ||
        header.n_values != n_values || header.n_columns < 0 || header.n_columns > n_values || header.nnz < 0 ||
        header.nnz > n_values || header.nnz > INT32_MAX || header.unused[0] || header.unused[1])
        return SPARSIFY_BAD_INDEX;
    const PanelSections sections = panel_sections(out, in, header.k_block, header.window_rows);
    if (index_bytes - header.n_columns != sections.columns) return SPARSIFY_BAD_INDEX;

    PanelStart next = {0, 0};
    int64_t kept = 0;
    const uint8_t *starts = index + sizeof(PanelHeader);
    const auto at_start = [&] {
        const PanelStart start = read<PanelStart>(starts);
        starts += sizeof start;
        return start.value == next.value && start.column == next.column;
    };
    const int status = for_each_window(
        header, sections, index, [&](int64_t block, int64_t row, int64_t n_rows, const uint8_t *cells) -> int {
            if (!at_start()) return SPARSIFY_BAD_INDEX;
            bool used[PANEL_MAX_WINDOW_ROWS] = {};
            for (int64_t c = 0; c < n_rows / PANEL_CELL_ROWS; ++c) {
                const PanelCell cell = read<PanelCell>(cells + c * int64_t(sizeof(PanelCell)));
                for (const uint8_t r : cell.rows) {
                    if (r >= n_rows || used[r]) return SPARSIFY_BAD_INDEX;
                    used[r] = true;
                }
                const int64_t column = next.column;
                next.column += n_cell_columns(cell);
                next.value += n_cell_values(cell);
                if (next.column > header.n_columns || next.value > n_values) return SPARSIFY_BAD_INDEX;
                const uint8_t *columns = index + sections.columns + column;
                if (const int status = check_cell(header, row, block, cell, columns)) return status;
                for_each_entry(cell, columns, [&](int pattern, uint8_t k) {
                    if (k != header.k_block) kept += __builtin_popcount(unsigned(pattern));
                    return 0;
                });
            }
            return SPARSIFY_OK;
        });
    if (status) return status;
    const bool complete = at_start() && next.value == n_values && next.column == header.n_columns && kept == header.nnz;
    return complete ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
}

int sparsify_panel_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values,
                          int32_t *crow, int32_t *col, int64_t *order) {
    if (index_bytes < int64_t(sizeof(PanelHeader))) return SPARSIFY_BAD_INDEX;
    const PanelHeader header = read<PanelHeader>(index);
    if (header.out != out || header.in != in || header.n_values != n_values) return SPARSIFY_BAD_INDEX;
    const PanelSections sections = panel_sections(out, in, header.k_block, header.window_rows);
    int32_t *cursor = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    if (!cursor) return SPARSIFY_NO_MEMORY;

    // Twice over the cells: how many weights each row keeps, then where each goes.
    const auto for_each_cell = [&](auto visit) {
        const uint8_t *columns = index + sections.columns;
        for_each_window(header, sections, index, [&](int64_t block, int64_t row, int64_t n_rows, const uint8_t *cells) {
            for (int64_t c = 0; c < n_rows / PANEL_CELL_ROWS; ++c) {
                const PanelCell cell = read<PanelCell>(cells + c * int64_t(sizeof(PanelCell)));
                visit(block, row, cell, columns);
                columns += n_cell_columns(cell);
            }
            return 0;
        });
    };
    memset(crow, 0, size_t(out + 1) * sizeof *crow);
    for_each_cell([&](int64_t, int64_t first_row, const PanelCell &cell, const uint8_t *columns) {
        for_each_entry(cell, columns, [&](int pattern, uint8_t column) {
            for (int r = 0; r < PANEL_CELL_ROWS && column != header.k_block; ++r)
                if (pattern >> r & 1) ++crow[first_row + cell.rows[r] + 1];
            return 0;
        });
    });
    for (int64_t row = 0; row < out; ++row) crow[row + 1] += crow[row];
    memcpy(cursor, crow, size_t(out + 1) * sizeof *crow);

    int64_t value = 0;
    for_each_cell([&](int64_t block, int64_t first_row, const PanelCell &cell, const uint8_t *columns) {
        uint8_t rows_of[256] = {};
        int64_t value_of[PANEL_CELL_ROWS][256];
        for_each_entry(cell, columns, [&](int pattern, uint8_t column) {
            const bool padding = column == header.k_block;
            for (int r = 0; r < PANEL_CELL_ROWS; ++r) {
                if (!(pattern >> r & 1)) continue;
                value_of[r][column] = value;
                order[value++] = -1;
            }
            if (!padding) rows_of[column] |= uint8_t(pattern);
            return 0;
        });
        for (int column = 0; column < header.k_block; ++column)
            for (int r = 0; r < PANEL_CELL_ROWS; ++r) {
                if (!(rows_of[column] >> r & 1)) continue;
                const int32_t to = cursor[first_row + cell.rows[r]]++;
                col[to] = int32_t(block * header.k_block + column);
                order[value_of[r][column]] = to;
            }
    });
    free(cursor);
    return SPARSIFY_OK;
}
}
