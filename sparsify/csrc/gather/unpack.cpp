// Checks and unpacks the gather and sell forms (layout: gather/format.h).
#include <string.h>

#include "gather/format.h"
#include "sparsify.h"

using namespace sparsify;

namespace {

// Calls visit(output row, column, value index) for each kept weight of a tile, in packed order; moved(start) for each
// window. Either may return an error, which ends the walk.
template <class Moved, class Visit>
int walk(const GatherView &view, int64_t tile, Moved moved, Visit visit) {
    const GatherTile &size = gather_tile_of(view.header);
    const int steps_per_window = int(view.header->steps_per_window);
    int64_t value = int64_t(view.tile_values[tile]), start = 0;
    const uint8_t *move = view.moves + int64_t(view.tile_groups[tile]) * (size.steps / steps_per_window);
    for (int64_t group = view.tile_groups[tile]; group < view.tile_groups[tile + 1]; ++group)
        for (int s = 0; s < size.steps; ++s) {
            if (s % steps_per_window == 0) {
                start += *move++;
                if (const int status = moved(start)) return status;
            }
            const unsigned taking = gather_taking(view, size, group, s);
            for (int l = 0; l < size.lanes; ++l) {
                const uint32_t word = view.words[group * size.lanes + l] >> (size.column_bits * s);
                if (taking >> l & 1)
                    if (const int status = visit(l, start + word % unsigned(size.window), value)) return status;
                value += view.header->padded || (taking >> l & 1);
            }
        }
    return SPARSIFY_OK;
}

int64_t row_of(const GatherView &view, int64_t tile, int lane) {
    const int64_t slot = tile * view.header->lanes + lane;
    return slot / GATHER_BLOCK_ROWS * GATHER_BLOCK_ROWS + view.rows[slot];
}

// Each row of a block is in one lane; the lanes that are left are the last.
bool rows_are_valid(const GatherView &view, int64_t out) {
    for (int64_t first = 0; first < out; first += GATHER_BLOCK_ROWS) {
        const int64_t n_rows = out - first < GATHER_BLOCK_ROWS ? out - first : GATHER_BLOCK_ROWS;
        uint64_t seen = 0;
        for (int64_t i = 0; i < n_rows; ++i) {
            const uint8_t row = view.rows[first + i];
            if (row >= n_rows || seen >> row & 1) return false;
            seen |= uint64_t(1) << row;
        }
    }
    for (int64_t i = out; i < int64_t(view.header->n_tiles) * view.header->lanes; ++i)
        if (view.rows[i] != GATHER_NO_ROW) return false;
    return true;
}

// A kernel of the sell form reads an activation for the lanes that rest, too: the first one of the window.
bool resting_lanes_are_valid(const GatherView &view, int64_t in) {
    const GatherHeader &header = *view.header;
    if (in == 0) return header.n_groups == 0;
    for (int64_t group = 0; group < header.n_groups; ++group)
        for (int s = 0; s < GATHER_SELL.steps; ++s)
            for (int l = 0; l < GATHER_SELL.lanes; ++l) {
                const uint32_t word = view.words[group * GATHER_SELL.lanes + l] >> (GATHER_SELL.column_bits * s);
                if (!(gather_taking(view, GATHER_SELL, group, s) >> l & 1) && word % unsigned(GATHER_SELL.window))
                    return false;
            }
    return true;
}

// The number of values of a tile whose groups are in range, or an error.
int64_t check_tile(const GatherView &view, int64_t tile, int64_t in) {
    const GatherTile &size = gather_tile_of(view.header);
    const int64_t last_start = in > size.window ? in - size.window : 0;
    int64_t last_column[GATHER_MAX_LANES], kept = 0;
    for (int l = 0; l < size.lanes; ++l)
        last_column[l] = view.rows[tile * size.lanes + l] == GATHER_NO_ROW ? in : -1;  // no row, no column
    const int status = walk(
        view, tile, [&](int64_t start) { return start <= last_start ? SPARSIFY_OK : SPARSIFY_BAD_INDEX; },
        [&](int lane, int64_t column, int64_t) {
            const bool good = column > last_column[lane] && column < in;
            last_column[lane] = column;
            ++kept;
            return good ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
        });
    return status ? status : kept;
}

int check(bool sell, int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in >= INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (index_bytes < int64_t(sizeof(GatherHeader))) return SPARSIFY_BAD_INDEX;
    GatherHeader header;
    memcpy(&header, index, sizeof header);
    const uint32_t s = header.steps_per_window, lanes = header.lanes;
    const bool wide = header.window == GATHER_WIDE.window, narrow = header.window == GATHER_NARROW.window;
    const bool known = sell ? header.window == GATHER_SELL.window && s == 1 && header.padded == 1
                            : (wide && (s == 3 || s == 6)) || (narrow && s == 1);
    if (header.magic != GATHER_MAGIC || !known || lanes != uint32_t(gather_tile_of(&header).lanes) ||
        header.padded > 1 || header.out != out || header.in != in || header.n_tiles != (out + lanes - 1) / lanes ||
        header.nnz < 0 || header.nnz > INT32_MAX || header.n_values != n_values ||
        index_bytes != gather_sections(gather_tile_of(&header), header.n_tiles, header.n_groups, s).end)
        return SPARSIFY_BAD_INDEX;
    const GatherView view = gather_view(index);
    if (!rows_are_valid(view, out) || (sell && !resting_lanes_are_valid(view, in))) return SPARSIFY_BAD_INDEX;
    const uint32_t *groups = view.tile_groups;
    if (groups[0] != 0 || groups[header.n_tiles] != header.n_groups) return SPARSIFY_BAD_INDEX;
    const int64_t slots_per_group = gather_tile_of(&header).steps * gather_tile_of(&header).lanes;
    int64_t kept = 0, value = 0;
    for (int64_t tile = 0; tile < header.n_tiles; ++tile) {
        if (groups[tile + 1] < groups[tile] || groups[tile + 1] > header.n_groups ||
            view.tile_values[tile] != uint64_t(value))
            return SPARSIFY_BAD_INDEX;
        const int64_t of_tile = check_tile(view, tile, in);
        if (of_tile < 0) return SPARSIFY_BAD_INDEX;
        kept += of_tile;
        value += header.padded ? int64_t(groups[tile + 1] - groups[tile]) * slots_per_group : of_tile;
    }
    const bool good =
        view.tile_values[header.n_tiles] == uint64_t(value) && kept == header.nnz && n_values == value + GATHER_TAIL;
    return good ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
}

int unpack(bool sell, int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values,
           int32_t *crow, int32_t *col, int64_t *order) {
    if (const int status = check(sell, out, in, index, index_bytes, n_values)) return status;
    const GatherView view = gather_view(index);
    const auto anywhere = [](int64_t) { return 0; };
    memset(crow, 0, sizeof(int32_t) * size_t(out + 1));
    for (int64_t tile = 0; tile < view.header->n_tiles; ++tile)
        walk(view, tile, anywhere, [&](int lane, int64_t, int64_t) {
            ++crow[row_of(view, tile, lane) + 1];
            return 0;
        });
    for (int64_t row = 0; row < out; ++row) crow[row + 1] += crow[row];
    for (int64_t i = 0; i < n_values; ++i) order[i] = -1;
    for (int64_t tile = 0; tile < view.header->n_tiles; ++tile) {
        const int lanes = int(view.header->lanes);
        int32_t next[GATHER_MAX_LANES];
        for (int l = 0; l < lanes; ++l) {
            const bool none = view.rows[tile * lanes + l] == GATHER_NO_ROW;
            next[l] = none ? 0 : crow[row_of(view, tile, l)];
        }
        walk(view, tile, anywhere, [&](int lane, int64_t column, int64_t value) {
            const int32_t position = next[lane]++;
            col[position] = int32_t(column);
            order[value] = position;
            return 0;
        });
    }
    return SPARSIFY_OK;
}

}  // namespace

extern "C" {

#define UNPACKS(FORM, SELL)                                                                                            \
    int64_t sparsify_##FORM##_nnz(const uint8_t *index) { return gather_view(index).header->nnz; }                     \
    int sparsify_##FORM##_check(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes,                    \
                                int64_t n_values) {                                                                    \
        return check(SELL, out, in, index, index_bytes, n_values);                                                     \
    }                                                                                                                  \
    int sparsify_##FORM##_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values, \
                                 int32_t *crow, int32_t *col, int64_t *order) {                                        \
        return unpack(SELL, out, in, index, index_bytes, n_values, crow, col, order);                                  \
    }

UNPACKS(gather, false)
UNPACKS(sell, true)
}
