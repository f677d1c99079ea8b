// Into the panel form (panel/format.h).
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "panel/format.h"
#include "panel/pack.h"
#include "runtime/csr.h"
#include "runtime/kernels.h"
#include "sparsify.h"

namespace sparsify {
namespace {

// The share of the weights that is kept.
double density_of(int64_t out, int64_t in, int64_t nnz) {
    return out && in ? double(nnz) / (double(out) * double(in)) : 1;
}

// Blocks of at most so many columns. Measured with 64 tokens on a processor with 32 KB of L1 cache: 128 columns of as
// many tokens as the registers hold are that cache exactly (96 and 192: 1 to 8% slower up to 80% sparsity); the fewer
// weights, the more the sums cost that every block reads and writes (192 against 128: 1.06x at 95%). For longer blocks
// run_panel makes narrower tiles.
int64_t most_columns(double density) { return density > 0.15 ? 128 : density > 0.07 ? 192 : 240; }

struct Layout {
    int64_t k_block, window_rows;
};

// As even as possible: blocks of at most `target` columns, windows of at most 128 rows in whole bundles.
Layout choose_layout(int64_t out, int64_t in, int64_t target) {
    const int64_t window_bundles = 8;
    const int64_t n_blocks = (in + target - 1) / target;
    const int64_t n_bundles = (out + PANEL_BUNDLE_ROWS - 1) / PANEL_BUNDLE_ROWS;
    const int64_t n_windows = (n_bundles + window_bundles - 1) / window_bundles;
    return {n_blocks ? (in + n_blocks - 1) / n_blocks : 1,
            n_windows ? (n_bundles + n_windows - 1) / n_windows * PANEL_BUNDLE_ROWS : PANEL_BUNDLE_ROWS};
}

// How long the runs of a cell should be: a function of its density alone, so that neighbours agree. Each about as long
// as 4 of 5 random cells can fill, given what the longer patterns leave over.
void choose_run_lengths(int64_t kept, int64_t width, PanelCell *cell) {
    const double d = width ? double(kept) / double(PANEL_CELL_ROWS * width) : 0, w = double(width), e = 1 - d;
    const double quads = w * d * d * d * d, triples = w * d * d * d * e, pairs = w * d * d * e * e;
    const auto fillable = [](double mean, double spread) { return mean > spread ? floor(mean - spread) : 0.0; };
    const double q4 = fillable(quads, 0.8 * sqrt(quads));
    const double more_triples = triples + (quads - q4) / 4;
    const double q3 = fillable(more_triples, 0.7 * sqrt(triples));
    const double more_pairs = pairs + (more_triples - q3) * 4 / 6;
    const double q2 = fillable(more_pairs, 0.5 * sqrt(pairs));
    cell->n_quad = uint8_t(q4);
    cell->n_triple = uint8_t(q3);
    cell->n_pair = uint8_t(q2);
}

// Columns by pattern; a column may be listed under several patterns with different rows.
struct Buckets {
    uint8_t columns[16][256];
    int count[16];

    void add(int pattern, uint8_t column) { columns[pattern][count[pattern]++] = column; }
};

// Of `candidates`, the pattern within `rows` that is shortest of its run length.
template <int N>
int neediest(const Buckets &buckets, const int (&candidates)[N], int rows) {
    int best = 0;
    for (const int pattern : candidates)
        if ((pattern & rows) == pattern && (!best || buckets.count[pattern] < buckets.count[best])) best = pattern;
    return best;
}

// Splits columns that exceed the run length of their pattern, longest patterns first.
void fit_to_runs(Buckets &buckets, PanelCell *cell) {
    const auto split = [&](int pattern, int length, auto part_of) {
        while (buckets.count[pattern] > length) {
            const uint8_t column = buckets.columns[pattern][--buckets.count[pattern]];
            const int part = part_of(pattern);
            buckets.add(part, column);
            buckets.add(pattern & ~part, column);
        }
    };
    split(15, cell->n_quad, [&](int rows) {
        const int triple = neediest(buckets, PANEL_TRIPLES, rows);
        return buckets.count[triple] < cell->n_triple ? triple : neediest(buckets, PANEL_PAIRS, rows);
    });
    for (const int triple : PANEL_TRIPLES)
        split(triple, cell->n_triple, [&](int rows) { return neediest(buckets, PANEL_PAIRS, rows); });
    for (const int pair : PANEL_PAIRS) split(pair, cell->n_pair, [](int rows) { return rows & -rows; });
    int longest = 0;
    for (int r = 0; r < PANEL_CELL_ROWS; ++r)
        if (buckets.count[1 << r] > longest) longest = buckets.count[1 << r];
    cell->n_single = uint8_t(longest);
}

// Writes one packed matrix, or only measures it when there is nowhere to write.
struct Writer {
    uint8_t *index;  // may be null
    int64_t *order;
    PanelSections sections;
    uint8_t padding_column;
    bool patterns;  // of several rows
    PanelStart next;
    int64_t n_cells;

    void run_entry(const Buckets &buckets, int pattern, int i, const int32_t (*position)[PANEL_MAX_K_BLOCK]) {
        const bool padding = i >= buckets.count[pattern];
        const uint8_t column = padding ? padding_column : buckets.columns[pattern][i];
        if (index) index[sections.columns + next.column] = column;
        ++next.column;
        for (int r = 0; r < PANEL_CELL_ROWS; ++r) {
            if (!(pattern >> r & 1)) continue;
            if (index) order[next.value] = padding ? -1 : position[r][column];
            ++next.value;
        }
    }

    void start() {
        if (index) memcpy(index + sizeof(PanelHeader) + size_t(n_starts++) * sizeof next, &next, sizeof next);
    }
    int64_t n_starts;

    void write(const PanelCell &cell, const Buckets &buckets, const int32_t (*position)[PANEL_MAX_K_BLOCK]) {
        if (index) memcpy(index + sections.cells + size_t(n_cells) * sizeof cell, &cell, sizeof cell);
        ++n_cells;
        const auto run = [&](int length, const auto &patterns) {
            for (int i = 0; i < length; ++i)
                for (const int pattern : patterns) run_entry(buckets, pattern, i, position);
        };
        run(cell.n_quad, PANEL_QUADS);
        run(cell.n_triple, PANEL_TRIPLES);
        run(cell.n_pair, PANEL_PAIRS);
        run(cell.n_single, PANEL_SINGLES);
    }
};

// One block of one window: rows sorted by how many weights they keep, most first, cells written in that order.
void pack_window(int64_t first_row, int64_t n_rows, int64_t out, int64_t first_column, int64_t width, int32_t *cursor,
                 const int32_t *crow, const int32_t *col, Writer &writer) {
    int32_t begin[PANEL_MAX_WINDOW_ROWS], kept[PANEL_MAX_WINDOW_ROWS];
    int of_count[PANEL_MAX_K_BLOCK + 2] = {};
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = first_row + r;
        begin[r] = kept[r] = 0;
        if (row < out) {
            begin[r] = cursor[row];
            while (cursor[row] < crow[row + 1] && col[cursor[row]] < first_column + width) ++cursor[row];
            kept[r] = cursor[row] - begin[r];
        }
        ++of_count[width - kept[r] + 1];
    }
    for (int64_t i = 0; i <= width; ++i) of_count[i + 1] += of_count[i];
    uint8_t sorted[PANEL_MAX_WINDOW_ROWS];
    for (int64_t r = 0; r < n_rows; ++r) sorted[of_count[width - kept[r]]++] = uint8_t(r);

    writer.start();
    Buckets buckets;
    int32_t position[PANEL_CELL_ROWS][PANEL_MAX_K_BLOCK];
    for (int64_t first = 0; first < n_rows; first += PANEL_CELL_ROWS) {
        uint8_t pattern[PANEL_MAX_K_BLOCK] = {};
        PanelCell cell = {};
        int64_t total = 0;
        for (int r = 0; r < PANEL_CELL_ROWS; ++r) {
            const int row = cell.rows[r] = sorted[first + r];
            for (int32_t i = begin[row]; i < begin[row] + kept[row]; ++i) {
                pattern[col[i] - first_column] |= uint8_t(1 << r);
                position[r][col[i] - first_column] = i;
            }
            total += kept[row];
        }
        memset(buckets.count, 0, sizeof buckets.count);
        for (int64_t k = 0; k < width; ++k) buckets.add(pattern[k], uint8_t(k));
        if (writer.patterns) choose_run_lengths(total, width, &cell);
        fit_to_runs(buckets, &cell);
        writer.write(cell, buckets, position);
    }
}

int pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index, int64_t *order,
         PanelHeader *header) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    return pack_panel(out, in, crow, col, kernel_in_use()->pattern_density, index, order, header);
}

}  // namespace

int pack_panel(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, double pattern_density, uint8_t *index,
               int64_t *order, PanelHeader *header) {
    const double density = density_of(out, in, crow[out]);
    const Layout layout = choose_layout(out, in, most_columns(density));
    const PanelSections sections = panel_sections(out, in, layout.k_block, layout.window_rows);
    int32_t *cursor = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    if (!cursor) return SPARSIFY_NO_MEMORY;
    memcpy(cursor, crow, size_t(out + 1) * sizeof(int32_t));
    Writer writer = {index, order, sections, uint8_t(layout.k_block), density >= pattern_density, {0, 0}, 0, 0};
    for (int64_t block = 0; block < sections.n_blocks; ++block) {
        const int64_t first_column = block * layout.k_block;
        const int64_t width = in - first_column < layout.k_block ? in - first_column : layout.k_block;
        for (int64_t row = 0; row < out; row += layout.window_rows) {
            const int64_t left = sections.padded_rows - row;
            pack_window(row, left < layout.window_rows ? left : layout.window_rows, out, first_column, width, cursor,
                        crow, col, writer);
        }
    }
    writer.start();
    free(cursor);
    *header = {PANEL_MAGIC,
               uint16_t(layout.k_block),
               uint16_t(layout.window_rows),
               out,
               in,
               crow[out],
               writer.next.column,
               writer.next.value,
               {0, 0}};
    if (index) memcpy(index, header, sizeof *header);
    return SPARSIFY_OK;
}

}  // namespace sparsify

using namespace sparsify;

extern "C" {

int64_t sparsify_panel_index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    PanelHeader header;
    if (const int status = pack(out, in, crow, col, nullptr, nullptr, &header)) return status;
    return panel_sections(out, in, header.k_block, header.window_rows).columns + header.n_columns;
}

int64_t sparsify_panel_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    PanelHeader header;
    const int status = pack(out, in, crow, col, nullptr, nullptr, &header);
    return status ? status : header.n_values;
}

int sparsify_panel_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,
                        int64_t *order) {
    PanelHeader header;
    return pack(out, in, crow, col, index, order, &header);
}
}
