// Into and out of the panel form (panel.h), and the check of an index that somebody else wrote.
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "panel.h"
#include "sparsify.h"

namespace sparsify {
namespace {

// Columns per block: as even as possible, at most `target`.
int64_t choose_k_block(int64_t out, int64_t in, int64_t nnz) {
    const double density = out && in ? double(nnz) / (double(out) * double(in)) : 1;
    const int64_t target = density > 0.15 ? 128 : density > 0.07 ? 192 : 240;
    const int64_t n_blocks = (in + target - 1) / target;
    return n_blocks > 0 ? (in + n_blocks - 1) / n_blocks : 1;
}

// The kept weights of one group of 4 rows in one block of columns.
struct Cell {
    uint8_t pattern[PANEL_MAX_K_BLOCK];
    int64_t position[PANEL_GROUP_ROWS][PANEL_MAX_K_BLOCK];  // in CSR, where the pattern has the row's bit
    int64_t width;

    void count(uint8_t counts[16]) const {
        memset(counts, 0, 16);
        for (int64_t k = 0; k < width; ++k)
            if (pattern[k]) ++counts[pattern[k] - 1];
    }
};

// Calls visit(cell) for every (block, bundle, group) in the order of the form. Groups past the last row are empty.
template <typename Visit>
int for_each_cell(int64_t out, int64_t in, int64_t k_block, const int32_t *crow, const int32_t *col, Visit visit) {
    const PanelSections sections = panel_sections(out, in, k_block);
    int32_t *cursor = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    Cell *cell = static_cast<Cell *>(malloc(sizeof(Cell)));
    if (cursor && cell) {
        memcpy(cursor, crow, size_t(out) * sizeof(int32_t));
        for (int64_t block = 0; block < sections.n_blocks; ++block) {
            const int64_t first = block * k_block;
            cell->width = in - first < k_block ? in - first : k_block;
            for (int64_t group = 0; group < sections.n_bundles * PANEL_BUNDLE_GROUPS; ++group) {
                memset(cell->pattern, 0, sizeof cell->pattern);
                for (int r = 0; r < PANEL_GROUP_ROWS; ++r) {
                    const int64_t row = group * PANEL_GROUP_ROWS + r;
                    if (row >= out) break;
                    for (int32_t &i = cursor[row]; i < crow[row + 1] && col[i] < first + cell->width; ++i) {
                        cell->pattern[col[i] - first] |= uint8_t(1 << r);
                        cell->position[r][col[i] - first] = i;
                    }
                }
                visit(*cell);
            }
        }
    }
    const int status = cursor && cell ? SPARSIFY_OK : SPARSIFY_NO_MEMORY;
    free(cursor);
    free(cell);
    return status;
}

// Reads an index cell by cell: visit(block, group, counts, columns of the cell). Stops at the first nonzero result.
template <typename Visit>
int for_each_stored_cell(const PanelHeader &header, const uint8_t *index, Visit visit) {
    const PanelSections sections = panel_sections(header.out, header.in, header.k_block);
    const uint8_t *counts = index + sections.counts, *columns = index + sections.columns;
    for (int64_t block = 0; block < sections.n_blocks; ++block)
        for (int64_t group = 0; group < sections.n_bundles * PANEL_BUNDLE_GROUPS; ++group, counts += 16) {
            if (const int status = visit(block, group, counts, columns)) return status;
            for (int p = 0; p < PANEL_PATTERNS; ++p) columns += counts[p];
        }
    return SPARSIFY_OK;
}

PanelHeader read_header(const uint8_t *index) {
    PanelHeader header;
    memcpy(&header, index, sizeof header);
    return header;
}

PanelStart read_start(const uint8_t *index, int64_t i) {
    PanelStart start;
    memcpy(&start, index + sizeof(PanelHeader) + size_t(i) * sizeof start, sizeof start);
    return start;
}

}  // namespace
}  // namespace sparsify

using namespace sparsify;

extern "C" {

int64_t sparsify_panel_index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    const int64_t k_block = choose_k_block(out, in, crow[out]);
    int64_t n_columns = 0;
    const int status = for_each_cell(out, in, k_block, crow, col, [&](const Cell &cell) {
        for (int64_t k = 0; k < cell.width; ++k) n_columns += cell.pattern[k] != 0;
    });
    return status ? status : panel_sections(out, in, k_block).columns + n_columns;
}

int64_t sparsify_panel_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    const int status = check_csr(out, in, crow, col);
    return status ? status : crow[out];
}

int sparsify_panel_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,
                        int64_t *order) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    const int64_t k_block = choose_k_block(out, in, crow[out]);
    const PanelSections sections = panel_sections(out, in, k_block);
    PanelStart next = {0, 0};
    int64_t cell_number = 0;
    const int status = for_each_cell(out, in, k_block, crow, col, [&](const Cell &cell) {
        if (cell_number % PANEL_BUNDLE_GROUPS == 0)
            memcpy(index + sizeof(PanelHeader) + size_t(cell_number / PANEL_BUNDLE_GROUPS) * sizeof next, &next,
                   sizeof next);
        uint8_t *counts = index + sections.counts + 16 * cell_number++;
        cell.count(counts);
        for (int pattern = 1; pattern <= PANEL_PATTERNS; ++pattern) {
            if (!counts[pattern - 1]) continue;
            for (int64_t k = 0; k < cell.width; ++k) {
                if (cell.pattern[k] != pattern) continue;
                index[sections.columns + next.column++] = uint8_t(k);
                for (int r = 0; r < PANEL_GROUP_ROWS; ++r)
                    if (pattern >> r & 1) order[next.value++] = cell.position[r][k];
            }
        }
    });
    memcpy(index + sizeof(PanelHeader) + size_t(sections.n_starts - 1) * sizeof next, &next, sizeof next);
    const PanelHeader header = {PANEL_MAGIC, uint32_t(k_block), out, in, next.value, next.column, {0, 0, 0}};
    memcpy(index, &header, sizeof header);
    return status;
}

int64_t sparsify_panel_nnz(const uint8_t *index) { return read_header(index).nnz; }

int sparsify_panel_check(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out > INT32_MAX || in > INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (index_bytes < int64_t(sizeof(PanelHeader))) return SPARSIFY_BAD_INDEX;
    const PanelHeader header = read_header(index);
    if (header.magic != PANEL_MAGIC || header.out != out || header.in != in || header.k_block < 1 ||
        header.k_block > PANEL_MAX_K_BLOCK || header.nnz != n_values || n_values < 0 || n_values > INT32_MAX ||
        header.n_columns < 0 || header.n_columns > n_values)
        return SPARSIFY_BAD_INDEX;
    for (const int64_t unused : header.unused)
        if (unused) return SPARSIFY_BAD_INDEX;
    const PanelSections sections = panel_sections(out, in, header.k_block);
    if (index_bytes != sections.columns + header.n_columns) return SPARSIFY_BAD_INDEX;

    PanelStart next = {0, 0};
    int64_t cell_number = 0;
    const int status = for_each_stored_cell(
        header, index, [&](int64_t block, int64_t group, const uint8_t *counts, const uint8_t *columns) -> int {
            if (cell_number % PANEL_BUNDLE_GROUPS == 0) {
                const PanelStart start = read_start(index, cell_number / PANEL_BUNDLE_GROUPS);
                if (start.value != next.value || start.column != next.column) return SPARSIFY_BAD_INDEX;
            }
            ++cell_number;
            if (counts[15]) return SPARSIFY_BAD_INDEX;
            const int64_t first = block * header.k_block;
            const int64_t width = in - first < header.k_block ? in - first : header.k_block;
            bool seen[256] = {};
            for (int pattern = 1; pattern <= PANEL_PATTERNS; ++pattern) {
                const int n = counts[pattern - 1];
                if (!n) continue;
                if (next.column + n > header.n_columns) return SPARSIFY_BAD_INDEX;
                for (int i = 0; i < n; ++i) {
                    const uint8_t k = columns[i];
                    if (k >= width || seen[k] || (i && columns[i - 1] >= k)) return SPARSIFY_BAD_INDEX;
                    seen[k] = true;
                }
                for (int r = 0; r < PANEL_GROUP_ROWS; ++r)
                    if ((pattern >> r & 1) && group * PANEL_GROUP_ROWS + r >= out) return SPARSIFY_BAD_INDEX;
                columns += n;
                next.column += n;
                next.value += n * __builtin_popcount(unsigned(pattern));
            }
            return SPARSIFY_OK;
        });
    if (status) return status;
    const PanelStart last = read_start(index, sections.n_starts - 1);
    const bool complete = next.value == header.nnz && next.column == header.n_columns && last.value == next.value &&
                          last.column == next.column;
    return complete ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
}

int sparsify_panel_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values,
                          int32_t *crow, int32_t *col, int64_t *order) {
    const PanelHeader header = read_header(index);
    if (header.out != out || header.in != in || header.nnz != n_values || index_bytes < int64_t(sizeof header))
        return SPARSIFY_BAD_INDEX;
    memset(crow, 0, size_t(out + 1) * sizeof *crow);
    for_each_stored_cell(header, index, [&](int64_t, int64_t group, const uint8_t *counts, const uint8_t *) {
        for (int pattern = 1; pattern <= PANEL_PATTERNS; ++pattern)
            for (int r = 0; r < PANEL_GROUP_ROWS; ++r)
                if ((pattern >> r & 1) && counts[pattern - 1])
                    crow[group * PANEL_GROUP_ROWS + r + 1] += counts[pattern - 1];
        return 0;
    });
    for (int64_t row = 0; row < out; ++row) crow[row + 1] += crow[row];

    int32_t *cursor = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    if (!cursor) return SPARSIFY_NO_MEMORY;
    memcpy(cursor, crow, size_t(out + 1) * sizeof *crow);
    int64_t value = 0;
    for_each_stored_cell(
        header, index, [&](int64_t block, int64_t group, const uint8_t *counts, const uint8_t *columns) {
            uint8_t pattern_of[256] = {};
            int64_t value_of[256];
            for (int pattern = 1; pattern <= PANEL_PATTERNS; ++pattern)
                for (int i = 0; i < counts[pattern - 1]; ++i, ++columns) {
                    pattern_of[*columns] = uint8_t(pattern);
                    value_of[*columns] = value;
                    value += __builtin_popcount(unsigned(pattern));
                }
            for (int k = 0; k < 256; ++k) {
                int64_t from = value_of[k];
                for (int r = 0; r < PANEL_GROUP_ROWS; ++r) {
                    if (!(pattern_of[k] >> r & 1)) continue;
                    const int32_t to = cursor[group * PANEL_GROUP_ROWS + r]++;
                    col[to] = int32_t(block * header.k_block + k);
                    order[from++] = to;
                }
            }
            return 0;
        });
    free(cursor);
    return SPARSIFY_OK;
}
}
