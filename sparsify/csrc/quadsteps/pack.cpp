// Packs, unpacks and checks the forms quadsteps and widesteps (quadsteps/format.h).
#include <stdlib.h>
#include <string.h>

#include "quadsteps/format.h"
#include "runtime/csr.h"
#include "runtime/packs.h"
#include "sparsify.h"

using namespace sparsify;

namespace {

constexpr int LANES = QUADSTEPS_LANES, BLOCK_ROWS = QUADSTEPS_BLOCK_ROWS;
constexpr uint8_t NO_ROW = 255;

// The rows of a block, those that keep most first, of equal ones the upper first; counted from the block's first row.
// Those past the last row are NO_ROW.
void sort_rows(int64_t out, const int32_t *crow, int64_t block, uint8_t (&sorted)[BLOCK_ROWS]) {
    const int64_t first = block * BLOCK_ROWS, n = out - first < BLOCK_ROWS ? out - first : BLOCK_ROWS;
    const auto kept = [&](int row) { return crow[first + row + 1] - crow[first + row]; };
    memset(sorted, NO_ROW, sizeof sorted);
    for (int row = 0; row < n; ++row) {
        int at = row;
        for (; at > 0 && kept(sorted[at - 1]) < kept(row); --at) sorted[at] = sorted[at - 1];
        sorted[at] = uint8_t(row);
    }
}

// The steps of one tile: calls step(start, taken), where taken[lane][i] is the CSR position of what the lane takes, or
// -1. Returns how many there are.
template <typename Step>
int64_t walk_tile(int window, int64_t first_row, const uint8_t *rows, const int32_t *crow, const int32_t *col,
                  Step step) {
    int32_t next[LANES], end[LANES];
    for (int l = 0; l < LANES; ++l) {
        const bool exists = rows[l] != NO_ROW;
        next[l] = exists ? crow[first_row + rows[l]] : 0;
        end[l] = exists ? crow[first_row + rows[l] + 1] : 0;
    }
    for (int64_t n = 0;; ++n) {
        int32_t start = INT32_MAX;
        for (int l = 0; l < LANES; ++l)
            if (next[l] < end[l] && col[next[l]] < start) start = col[next[l]];
        if (start == INT32_MAX) return n;
        start = start / QUADSTEPS_ALIGNED * QUADSTEPS_ALIGNED;
        int32_t taken[LANES][QUADSTEPS_TAKEN];
        for (int l = 0; l < LANES; ++l)
            for (int i = 0; i < QUADSTEPS_TAKEN; ++i) {
                const bool takes = next[l] < end[l] && col[next[l]] < start + window;
                taken[l][i] = takes ? next[l]++ : -1;
            }
        step(start, taken);
    }
}

// Calls tile(number, its 16 sorted rows, first row of its block) for each tile.
template <typename Tile>
void for_each_tile(int64_t out, const int32_t *crow, Tile tile) {
    for (int64_t block = 0; block * BLOCK_ROWS < out; ++block) {
        uint8_t sorted[BLOCK_ROWS];
        sort_rows(out, crow, block, sorted);
        for (int t = 0; t < QUADSTEPS_BLOCK_TILES && block * BLOCK_ROWS + t * LANES < out; ++t)
            tile(block * QUADSTEPS_BLOCK_TILES + t, sorted + t * LANES, block * BLOCK_ROWS);
    }
}

int check_shape(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (in > QUADSTEPS_MOST_IN) return SPARSIFY_BAD_ARGUMENT;
    return check_csr(out, in, crow, col);
}

int64_t count_steps(int window, int64_t out, const int32_t *crow, const int32_t *col) {
    int64_t n_steps = 0;
    for_each_tile(out, crow, [&](int64_t, const uint8_t *rows, int64_t first_row) {
        n_steps +=
            walk_tile(window, first_row, rows, crow, col, [](int32_t, const int32_t (&)[LANES][QUADSTEPS_TAKEN]) {});
    });
    return n_steps;
}

// rows[l]: of lane l of a block, counted from its first, or NO_ROW.
void rows_of_lanes(const QuadstepsView &view, int64_t block, uint8_t (&rows)[BLOCK_ROWS]) {
    const uint8_t *lanes = view.lanes + block * BLOCK_ROWS;
    memset(rows, NO_ROW, sizeof rows);
    for (int64_t row = 0; row < BLOCK_ROWS && block * BLOCK_ROWS + row < view.header->out; ++row)
        rows[lanes[row]] = uint8_t(row);
}

// Calls visit(row, input, place of its value) for what each lane takes, tile by tile, lane by lane and from left to
// right, as long as it returns true; a lane without a row has row -1.
template <typename Visit>
bool for_each_taken(const QuadstepsView &view, Visit visit) {
    uint8_t rows[BLOCK_ROWS];
    for (int64_t tile = 0; tile < quadsteps_n_tiles(view.header->out); ++tile) {
        const int64_t block = tile / QUADSTEPS_BLOCK_TILES, in_block = tile % QUADSTEPS_BLOCK_TILES;
        if (in_block == 0) rows_of_lanes(view, block, rows);
        for (int l = 0; l < LANES; ++l) {
            const uint8_t row = rows[in_block * LANES + l];
            for (uint32_t step = view.tile_steps[tile]; step < view.tile_steps[tile + 1]; ++step)
                for (int i = 0; i < QUADSTEPS_TAKEN; ++i) {
                    const int64_t place = int64_t(step) * QUADSTEPS_BYTES + l * QUADSTEPS_TAKEN + i;
                    const uint8_t input = view.inputs[place];
                    if (input != QUADSTEPS_EMPTY && !visit(row == NO_ROW ? -1 : block * BLOCK_ROWS + row,
                                                           int64_t(view.starts[step]) + input, place))
                        return false;
                }
        }
    }
    return true;
}

// A lane of its own for each row of a block, and none for others.
bool lanes_are_sound(const QuadstepsView &view, int64_t block) {
    const int64_t left = view.header->out - block * BLOCK_ROWS, n_rows = left < BLOCK_ROWS ? left : BLOCK_ROWS;
    const int64_t n_lanes = (n_rows + LANES - 1) / LANES * LANES;
    const uint8_t *lanes = view.lanes + block * BLOCK_ROWS;
    bool seen[BLOCK_ROWS] = {};
    for (int64_t row = 0; row < n_lanes; ++row) {
        if (row >= n_rows) {
            if (lanes[row] != QUADSTEPS_NO_LANE) return false;
        } else {
            if (lanes[row] >= n_lanes || seen[lanes[row]]) return false;
            seen[lanes[row]] = true;
        }
    }
    return true;
}

int64_t index_bytes(const StepsKind &kind, int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (const int status = check_shape(out, in, crow, col)) return status;
    return quadsteps_sections(out, count_steps(kind.window, out, crow, col)).end;
}

int64_t n_values(const StepsKind &kind, int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (const int status = check_shape(out, in, crow, col)) return status;
    return quadsteps_n_values(out, count_steps(kind.window, out, crow, col));
}

int pack(const StepsKind &kind, int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,
         int64_t *order) {
    if (const int status = check_shape(out, in, crow, col)) return status;
    const int64_t n_steps = count_steps(kind.window, out, crow, col);
    const QuadstepsSections s = quadsteps_sections(out, n_steps);
    memset(index, 0, size_t(s.inputs));
    memset(index + s.lanes, QUADSTEPS_NO_LANE, size_t(s.starts - s.lanes));
    const QuadstepsHeader header = {kind.magic, uint32_t(n_steps), out, in, crow[out], {0, 0, 0, 0}};
    memcpy(index, &header, sizeof header);
    uint32_t *tile_steps = reinterpret_cast<uint32_t *>(index + s.tile_steps);
    uint16_t *starts = reinterpret_cast<uint16_t *>(index + s.starts);
    uint8_t *inputs = index + s.inputs;
    int64_t value = 0;
    uint32_t step = 0;
    for_each_tile(out, crow, [&](int64_t tile, const uint8_t *rows, int64_t first_row) {
        for (int l = 0; l < LANES; ++l)
            if (rows[l] != NO_ROW)
                index[s.lanes + first_row + rows[l]] = uint8_t(tile % QUADSTEPS_BLOCK_TILES * LANES + l);
        tile_steps[tile] = step;
        const auto write = [&](int32_t start, const int32_t (&taken)[LANES][QUADSTEPS_TAKEN]) {
            starts[step++] = uint16_t(start);
            for (const auto &lane : taken)
                for (const int32_t position : lane) {
                    inputs[value] = position < 0 ? QUADSTEPS_EMPTY : uint8_t(col[position] - start);
                    order[value++] = position;
                }
        };
        walk_tile(kind.window, first_row, rows, crow, col, write);
    });
    tile_steps[quadsteps_n_tiles(out)] = step;
    while (value < quadsteps_n_values(out, n_steps)) order[value++] = -1;
    return SPARSIFY_OK;
}

int check(const StepsKind &kind, int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in > QUADSTEPS_MOST_IN) return SPARSIFY_BAD_ARGUMENT;
    if (index_bytes < int64_t(sizeof(QuadstepsHeader))) return SPARSIFY_BAD_INDEX;
    QuadstepsHeader header;
    memcpy(&header, index, sizeof header);
    const QuadstepsSections s = quadsteps_sections(out, header.n_steps);
    if (header.magic != kind.magic || header.out != out || header.in != in || index_bytes != s.end || header.nnz < 0 ||
        header.nnz > INT32_MAX || n_values != quadsteps_n_values(out, header.n_steps))
        return SPARSIFY_BAD_INDEX;
    for (const int64_t unused : header.unused)
        if (unused) return SPARSIFY_BAD_INDEX;
    const QuadstepsView view = quadsteps_view(index);
    const int64_t n_tiles = quadsteps_n_tiles(out);
    if (view.tile_steps[0] != 0 || view.tile_steps[n_tiles] != header.n_steps) return SPARSIFY_BAD_INDEX;
    for (int64_t tile = 0; tile < n_tiles; ++tile)
        if (view.tile_steps[tile] > view.tile_steps[tile + 1]) return SPARSIFY_BAD_INDEX;
    for (int64_t block = 0; block * BLOCK_ROWS < out; ++block)
        if (!lanes_are_sound(view, block)) return SPARSIFY_BAD_INDEX;
    for (uint32_t step = 0; step < header.n_steps; ++step)
        if (view.starts[step] >= in) return SPARSIFY_BAD_INDEX;
    int64_t n_taken = 0, last_row = -1, last_input = -1;
    const bool sound = for_each_taken(view, [&](int64_t row, int64_t input, int64_t place) {
        const bool rises = row != last_row || input > last_input;
        last_row = row;
        last_input = input;
        ++n_taken;
        return rises && row >= 0 && input < in && view.inputs[place] < kind.window;
    });
    return sound && n_taken == header.nnz ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
}

int unpack(const StepsKind &kind, int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values,
           int32_t *crow, int32_t *col, int64_t *order) {
    if (const int status = check(kind, out, in, index, index_bytes, n_values)) return status;
    int32_t *next = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    if (!next) return SPARSIFY_NO_MEMORY;
    const QuadstepsView view = quadsteps_view(index);
    memset(crow, 0, sizeof(int32_t) * size_t(out + 1));
    for_each_taken(view, [&](int64_t row, int64_t, int64_t) {
        ++crow[row + 1];
        return true;
    });
    for (int64_t row = 0; row < out; ++row) crow[row + 1] += crow[row];
    memcpy(next, crow, size_t(out + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < n_values; ++i) order[i] = -1;
    for_each_taken(view, [&](int64_t row, int64_t input, int64_t place) {
        const int32_t position = next[row]++;
        col[position] = int32_t(input);
        order[place] = position;
        return true;
    });
    free(next);
    return SPARSIFY_OK;
}

}  // namespace

extern "C" {

#define STEPS(FORM, KIND)                                                                                         \
    SPARSIFY_PACKS(FORM, KIND)                                                                                    \
    int sparsify_##FORM##_check(int64_t out, int64_t in, const uint8_t *index, int64_t bytes, int64_t n_values) { \
        return check(KIND, out, in, index, bytes, n_values);                                                      \
    }                                                                                                             \
    int64_t sparsify_##FORM##_nnz(const uint8_t *index) { return quadsteps_view(index).header->nnz; }             \
    int sparsify_##FORM##_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t bytes, int64_t n_values,  \
                                 int32_t *crow, int32_t *col, int64_t *order) {                                   \
        return unpack(KIND, out, in, index, bytes, n_values, crow, col, order);                                   \
    }

STEPS(quadsteps, QUADSTEPS_KIND)
STEPS(widesteps, WIDESTEPS_KIND)
}
