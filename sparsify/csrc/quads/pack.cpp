// Into the quads form (quads/format.h).
#include <stdlib.h>
#include <string.h>

#include "panel/pack.h"
#include "quads/format.h"
#include "quads/order.h"
#include "runtime/csr.h"
#include "sparsify.h"

namespace sparsify {
namespace {

// Memory of a call of pack, freed at its end.
template <typename T>
struct Array {
    T *data;
    explicit Array(int64_t n) : data(static_cast<T *>(calloc(size_t(n > 0 ? n : 1), sizeof(T)))) {}
    ~Array() { free(data); }
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
    T &operator[](int64_t i) { return data[i]; }
};

// The used quads of a matrix, as a CSR matrix whose columns are quads, and the weights in each.
struct Quads {
    Array<int32_t> inputs, crow, col;
    Array<int32_t> positions;  // [used quad][4]: in the CSR matrix of weights, or -1
    Quads(int64_t out, int64_t in, int64_t nnz)
        : inputs(4 * quads_of(in)), crow(out + 1), col(nnz), positions(4 * nnz) {}
    bool allocated() const { return inputs.data && crow.data && col.data && positions.data; }
};

// The order of a matrix is asked for three times in a row, by both sizes and by pack, and takes most of the time: the
// last one is kept. Any order is right for any matrix, so that a hash is enough to know the matrix again.
struct LastOrder {
    int32_t *inputs = nullptr;
    int64_t in = -1;
    uint64_t hash = 0;
    ~LastOrder() { free(inputs); }
};
thread_local LastOrder last_order;

uint64_t hash_of(int64_t out, const int32_t *crow, const int32_t *col) {
    uint64_t hash = uint64_t(out);
    const auto mix = [&](int32_t a) { hash = (hash ^ uint64_t(uint32_t(a))) * 0x9e3779b97f4a7c15u + (hash >> 32); };
    for (int64_t row = 0; row <= out; ++row) mix(crow[row]);
    for (int64_t i = 0; i < crow[out]; ++i) mix(col[i]);
    return hash;
}

int order_of(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, int32_t *inputs) {
    const size_t bytes = size_t(16 * quads_of(in));
    const uint64_t hash = hash_of(out, crow, col);
    if (last_order.in != in || last_order.hash != hash) {
        if (const int status = order_inputs(out, in, crow, col, inputs)) return status;
        free(last_order.inputs);
        last_order.inputs = static_cast<int32_t *>(malloc(bytes + 1));
        last_order.in = last_order.inputs ? in : -1;
        last_order.hash = hash;
        if (last_order.inputs) memcpy(last_order.inputs, inputs, bytes);
        return SPARSIFY_OK;
    }
    memcpy(inputs, last_order.inputs, bytes);
    return SPARSIFY_OK;
}

int find_quads(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, Quads &quads) {
    if (const int status = order_of(out, in, crow, col, quads.inputs.data)) return status;
    const int64_t n_quads = quads_of(in);
    Array<int32_t> place(in), of_row(4 * n_quads);  // of each input; position + 1 of the row's weights by place
    if (!place.data || !of_row.data) return SPARSIFY_NO_MEMORY;
    for (int64_t i = 0; i < 4 * n_quads; ++i)
        if (quads.inputs[i] != QUADS_NO_INPUT) place[quads.inputs[i]] = int32_t(i);
    int32_t n_used = 0;
    for (int64_t row = 0; row < out; ++row) {
        for (int32_t i = crow[row]; i < crow[row + 1]; ++i) of_row[place[col[i]]] = i + 1;
        for (int64_t quad = 0; quad < n_quads; ++quad) {
            int32_t *four = of_row.data + 4 * quad;
            if (!(four[0] | four[1] | four[2] | four[3])) continue;
            for (int i = 0; i < 4; ++i) {
                quads.positions[4 * int64_t(n_used) + i] = four[i] - 1;
                four[i] = 0;
            }
            quads.col[n_used++] = int32_t(quad);
        }
        quads.crow[row + 1] = n_used;
    }
    return SPARSIFY_OK;
}

// Packs, or measures when index is null.
int pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index, int64_t *order,
         PanelHeader *panel) {
    if (const int status = check_csr(out, in, crow, col)) return status;
    Quads quads(out, in, crow[out]);
    if (!quads.allocated()) return SPARSIFY_NO_MEMORY;
    if (const int status = find_quads(out, in, crow, col, quads)) return status;
    const auto pack_quads = [&](uint8_t *to, int64_t *its_order) {
        return pack_panel(out, quads_of(in), quads.crow.data, quads.col.data, 0, to, its_order, panel);
    };
    if (const int status = pack_quads(nullptr, nullptr)) return status;
    if (!index) return SPARSIFY_OK;

    Array<int64_t> panel_order(panel->n_values);
    if (!panel_order.data) return SPARSIFY_NO_MEMORY;
    const QuadsSections sections = quads_sections(in, panel->n_values);
    memset(index, 0, size_t(sections.panel));
    if (const int status = pack_quads(index + sections.panel, panel_order.data)) return status;
    const QuadsHeader header = {QUADS_MAGIC, 0, out, in, crow[out], panel->n_values, {0, 0, 0}};
    memcpy(index, &header, sizeof header);
    memcpy(index + sections.inputs, quads.inputs.data, size_t(16 * quads_of(in)));
    for (int64_t value = 0; value < panel->n_values; ++value) {
        const int64_t quad = panel_order[value];
        int kept = 0;
        for (int i = 0; i < 4; ++i) {
            const int64_t position = quad < 0 ? -1 : quads.positions[4 * quad + i];
            order[4 * value + i] = position;
            kept |= (position >= 0) << i;
        }
        index[sections.kept + value / 2] |= uint8_t(kept << (value % 2 * 4));
    }
    for (int64_t i = 4 * panel->n_values; i < quads_n_values(out, panel->n_values); ++i) order[i] = -1;
    return SPARSIFY_OK;
}

}  // namespace
}  // namespace sparsify

using namespace sparsify;

extern "C" {

int64_t sparsify_quads_index_bytes(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    PanelHeader panel;
    if (const int status = pack(out, in, crow, col, nullptr, nullptr, &panel)) return status;
    return quads_sections(in, panel.n_values).panel +
           panel_sections(out, quads_of(in), panel.k_block, panel.window_rows).columns + panel.n_columns;
}

int64_t sparsify_quads_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col) {
    PanelHeader panel;
    const int status = pack(out, in, crow, col, nullptr, nullptr, &panel);
    return status ? status : quads_n_values(out, panel.n_values);
}

int sparsify_quads_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index,
                        int64_t *order) {
    PanelHeader panel;
    return pack(out, in, crow, col, index, order, &panel);
}
}
