// Packs, unpacks and checks the bitmask form (layout: bitmask/format.h).
#include <stdlib.h>
#include <string.h>

#include "bitmask/format.h"
#include "runtime/csr.h"
#include "sparsify.h"

using namespace sparsify;

namespace {

int64_t tiles_of(int64_t out) { return (out + BITMASK_LANES - 1) / BITMASK_LANES; }

int64_t index_bytes_of(int64_t out, int64_t in) { return bitmask_masks_offset(tiles_of(out)) + 2 * tiles_of(out) * in; }

}  // namespace

extern "C" {

int64_t sparsify_bitmask_index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    return index_bytes_of(out, in);
}

int64_t sparsify_bitmask_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    return int64_t(crow[out]) + BITMASK_TAIL;
}

int sparsify_bitmask_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,
                          int64_t *order) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    memset(index, 0, size_t(index_bytes_of(out, in)));
    BitmaskHeader header = {};
    header.magic = BITMASK_MAGIC;
    header.n_tiles = uint32_t(tiles_of(out));
    header.out = out;
    header.in = in;
    header.nnz = crow[out];
    memcpy(index, &header, sizeof header);
    uint64_t *tile_values = reinterpret_cast<uint64_t *>(index + sizeof header);
    uint16_t *masks = reinterpret_cast<uint16_t *>(index + bitmask_masks_offset(header.n_tiles));

    int64_t value = 0;
    for (int64_t tile = 0; tile < header.n_tiles; ++tile, masks += in) {
        tile_values[tile] = uint64_t(value);
        const int64_t first = tile * BITMASK_LANES;
        const int n_rows = int(out - first < BITMASK_LANES ? out - first : BITMASK_LANES);
        int32_t next[BITMASK_LANES];
        for (int l = 0; l < n_rows; ++l) {
            next[l] = crow[first + l];
            for (int32_t i = crow[first + l]; i < crow[first + l + 1]; ++i) masks[col[i]] |= uint16_t(1u << l);
        }
        for (int64_t k = 0; k < in; ++k)
            for (unsigned mask = masks[k]; mask; mask &= mask - 1) order[value++] = next[__builtin_ctz(mask)]++;
    }
    tile_values[header.n_tiles] = uint64_t(value);
    for (int i = 0; i < BITMASK_TAIL; ++i) order[value++] = -1;
    return SPARSIFY_OK;
}

int sparsify_bitmask_check(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in >= INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (index_bytes < int64_t(sizeof(BitmaskHeader))) return SPARSIFY_BAD_INDEX;
    BitmaskHeader header;
    memcpy(&header, index, sizeof header);
    if (header.magic != BITMASK_MAGIC || header.out != out || header.in != in || header.n_tiles != tiles_of(out) ||
        index_bytes != index_bytes_of(out, in) || header.nnz < 0 || header.nnz > INT32_MAX ||
        n_values != header.nnz + BITMASK_TAIL)
        return SPARSIFY_BAD_INDEX;
    const BitmaskView view = bitmask_view(index);
    uint64_t value = 0;
    for (int64_t tile = 0; tile < header.n_tiles; ++tile) {
        if (view.tile_values[tile] != value) return SPARSIFY_BAD_INDEX;
        const int64_t n_rows = out - tile * BITMASK_LANES;
        const unsigned beyond = n_rows < BITMASK_LANES ? ~0u << n_rows : 0;  // rows that do not exist keep nothing
        for (int64_t k = 0; k < in; ++k) {
            const unsigned mask = view.masks[tile * in + k];
            if (mask & beyond) return SPARSIFY_BAD_INDEX;
            value += uint64_t(__builtin_popcount(mask));
        }
    }
    return view.tile_values[header.n_tiles] == value && value == uint64_t(header.nnz) ? SPARSIFY_OK
                                                                                      : SPARSIFY_BAD_INDEX;
}

int64_t sparsify_bitmask_nnz(const uint8_t *index) { return bitmask_view(index).header->nnz; }

int sparsify_bitmask_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values,
                            int32_t *crow, int32_t *col, int64_t *order) {
    if (const int status = sparsify_bitmask_check(out, in, index, index_bytes, n_values)) return status;
    const BitmaskView view = bitmask_view(index);
    memset(crow, 0, sizeof(int32_t) * size_t(out + 1));
    const int64_t n_tiles = view.header->n_tiles;
    for (int64_t tile = 0; tile < n_tiles; ++tile)
        for (int64_t k = 0; k < in; ++k)
            for (unsigned mask = view.masks[tile * in + k]; mask; mask &= mask - 1)
                ++crow[tile * BITMASK_LANES + __builtin_ctz(mask) + 1];
    for (int64_t row = 0; row < out; ++row) crow[row + 1] += crow[row];
    int64_t value = 0;
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
        int32_t next[BITMASK_LANES] = {};
        for (int l = 0; l < BITMASK_LANES && tile * BITMASK_LANES + l < out; ++l)
            next[l] = crow[tile * BITMASK_LANES + l];
        for (int64_t k = 0; k < in; ++k)
            for (unsigned mask = view.masks[tile * in + k]; mask; mask &= mask - 1) {
                const int32_t position = next[__builtin_ctz(mask)]++;
                col[position] = int32_t(k);
                order[value++] = position;
            }
    }
    for (int i = 0; i < BITMASK_TAIL; ++i) order[value++] = -1;
    return SPARSIFY_OK;
}
}
