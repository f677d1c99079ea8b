// Packs, unpacks and checks the forms quadmask and pairmask (tilemask/format.h).
#include <stdlib.h>
#include <string.h>

#include "runtime/csr.h"
#include "sparsify.h"
#include "tilemask/format.h"

namespace sparsify {
namespace {

// Calls visit(row, input) for the kept weights of an index in the order of their values, as long as it returns true.
template <int GROUP, typename Visit>
bool for_each_kept(const TileMaskView<GROUP> &view, Visit visit) {
    const TileMaskOf<GROUP> *masks = view.masks;
    for (int64_t block = 0; block < tilemask_n_blocks(view.header->out); ++block)
        for (int64_t group = 0; group < tilemask_n_groups(GROUP, view.header->in); ++group)
            for (int64_t tile = 0; tile < tilemask_n_tiles(view.header->out, block); ++tile) {
                const int64_t first = block * TILEMASK_BLOCK_ROWS + tile * TILEMASK_TILE_ROWS;
                for (uint64_t mask = *masks++; mask; mask &= mask - 1) {
                    const int bit = __builtin_ctzll(mask);
                    if (!visit(first + bit / GROUP, group * GROUP + bit % GROUP)) return false;
                }
            }
    return true;
}

template <int GROUP>
int64_t index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    const int status = check_csr(out, in, crow, col);
    return status ? status : tilemask_index_bytes(GROUP, out, in);
}

template <int GROUP>
int64_t n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    const int status = check_csr(out, in, crow, col);
    return status ? status : tilemask_n_values(GROUP, out, crow[out]);
}

template <int GROUP>
int pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index, int64_t *order) {
    using Mask = TileMaskOf<GROUP>;
    if (const int status = check_csr(out, in, crow, col)) return status;
    int32_t *next = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    if (!next) return SPARSIFY_NO_MEMORY;
    memcpy(next, crow, size_t(out + 1) * sizeof(int32_t));
    memset(index, 0, size_t(tilemask_index_bytes(GROUP, out, in)));
    const TileMaskHeader header = {TILEMASK_MAGIC, GROUP, out, in, crow[out], {0, 0, 0, 0}};
    memcpy(index, &header, sizeof header);
    uint64_t *block_values = reinterpret_cast<uint64_t *>(index + sizeof header);
    Mask *masks = reinterpret_cast<Mask *>(index + tilemask_masks_offset(out));
    for (int64_t block = 0; block < tilemask_n_blocks(out); ++block) {
        const int64_t first = block * TILEMASK_BLOCK_ROWS, n_tiles = tilemask_n_tiles(out, block);
        const int64_t end = first + TILEMASK_BLOCK_ROWS < out ? first + TILEMASK_BLOCK_ROWS : out;
        block_values[block] = uint64_t(crow[first]);
        for (int64_t row = first; row < end; ++row)
            for (int32_t i = crow[row]; i < crow[row + 1]; ++i) {
                const int64_t tile = (row - first) / TILEMASK_TILE_ROWS;
                const int64_t bit = row % TILEMASK_TILE_ROWS * GROUP + col[i] % GROUP;
                masks[col[i] / GROUP * n_tiles + tile] |= Mask(1) << bit;
            }
        masks += n_tiles * tilemask_n_groups(GROUP, in);
    }
    block_values[tilemask_n_blocks(out)] = uint64_t(crow[out]);
    int64_t value = 0;
    for_each_kept(TileMaskView<GROUP>(index), [&](int64_t row, int64_t) {
        order[value++] = next[row]++;
        return true;
    });
    free(next);
    while (value < tilemask_n_values(GROUP, out, crow[out])) order[value++] = -1;
    return SPARSIFY_OK;
}

template <int GROUP>
int check(int64_t out, int64_t in, const uint8_t *index, int64_t n_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in >= INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (n_bytes < int64_t(sizeof(TileMaskHeader))) return SPARSIFY_BAD_INDEX;
    TileMaskHeader header;
    memcpy(&header, index, sizeof header);
    if (header.magic != TILEMASK_MAGIC || header.group != GROUP || header.out != out || header.in != in ||
        n_bytes != tilemask_index_bytes(GROUP, out, in) || header.nnz < 0 || header.nnz > INT32_MAX ||
        n_values != tilemask_n_values(GROUP, out, header.nnz))
        return SPARSIFY_BAD_INDEX;
    for (const int64_t unused : header.unused)
        if (unused) return SPARSIFY_BAD_INDEX;
    const TileMaskView<GROUP> view(index);
    const TileMaskOf<GROUP> *masks = view.masks;
    uint64_t value = 0;
    for (int64_t block = 0; block < tilemask_n_blocks(out); ++block) {
        if (view.block_values[block] != value) return SPARSIFY_BAD_INDEX;
        for (int64_t i = 0; i < tilemask_n_groups(GROUP, in) * tilemask_n_tiles(out, block); ++i)
            value += uint64_t(__builtin_popcountll(*masks++));
    }
    if (view.block_values[tilemask_n_blocks(out)] != value || value != uint64_t(header.nnz)) return SPARSIFY_BAD_INDEX;
    const bool exist = for_each_kept(view, [&](int64_t row, int64_t input) {
        return row < out && input < in;  // rows and inputs that do not exist keep nothing
    });
    return exist ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
}

template <int GROUP>
int unpack(int64_t out, int64_t in, const uint8_t *index, int64_t n_bytes, int64_t n_values, int32_t *crow,
           int32_t *col, int64_t *order) {
    if (const int status = check<GROUP>(out, in, index, n_bytes, n_values)) return status;
    int32_t *next = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
    if (!next) return SPARSIFY_NO_MEMORY;
    const TileMaskView<GROUP> view(index);
    memset(crow, 0, sizeof(int32_t) * size_t(out + 1));
    for_each_kept(view, [&](int64_t row, int64_t) {
        ++crow[row + 1];
        return true;
    });
    for (int64_t row = 0; row < out; ++row) crow[row + 1] += crow[row];
    memcpy(next, crow, size_t(out + 1) * sizeof(int32_t));
    int64_t value = 0;
    for_each_kept(view, [&](int64_t row, int64_t input) {
        const int32_t position = next[row]++;
        col[position] = int32_t(input);
        order[value++] = position;
        return true;
    });
    free(next);
    while (value < n_values) order[value++] = -1;
    return SPARSIFY_OK;
}

}  // namespace
}  // namespace sparsify

using namespace sparsify;

#define EXPORT_FORM(FORM, GROUP)                                                                                    \
    int64_t sparsify_##FORM##_index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {       \
        return index_bytes<GROUP>(out, in, crow, col);                                                              \
    }                                                                                                               \
    int64_t sparsify_##FORM##_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {          \
        return n_values<GROUP>(out, in, crow, col);                                                                 \
    }                                                                                                               \
    int sparsify_##FORM##_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,    \
                               int64_t *order) {                                                                    \
        return pack<GROUP>(out, in, crow, col, index, order);                                                       \
    }                                                                                                               \
    int sparsify_##FORM##_check(int64_t out, int64_t in, const uint8_t *index, int64_t n_bytes, int64_t n_values) { \
        return check<GROUP>(out, in, index, n_bytes, n_values);                                                     \
    }                                                                                                               \
    int64_t sparsify_##FORM##_nnz(const uint8_t *index) { return TileMaskView<GROUP>(index).header->nnz; }          \
    int sparsify_##FORM##_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t n_bytes, int64_t n_values,  \
                                 int32_t *crow, int32_t *col, int64_t *order) {                                     \
        return unpack<GROUP>(out, in, index, n_bytes, n_values, crow, col, order);                                  \
    }

extern "C" {
EXPORT_FORM(quadmask, QUADMASK_GROUP)
EXPORT_FORM(pairmask, PAIRMASK_GROUP)
}
