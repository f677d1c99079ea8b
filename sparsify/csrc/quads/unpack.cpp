// Out of the quads form (quads/format.h), and the check of an index that somebody else wrote.
#include <stdlib.h>
#include <string.h>

#include "quads/format.h"
#include "sparsify.h"

namespace sparsify {
namespace {

int32_t input_at(const uint8_t *inputs, int64_t place) {
    int32_t input;
    memcpy(&input, inputs + place * int64_t(sizeof input), sizeof input);
    return input;
}

// Every input in one place, and no other.
int check_inputs(const uint8_t *inputs, int64_t in) {
    uint8_t *seen = static_cast<uint8_t *>(calloc(size_t(in + 1), 1));
    if (!seen) return SPARSIFY_NO_MEMORY;
    int64_t n_seen = 0;
    int status = SPARSIFY_OK;
    for (int64_t place = 0; place < 4 * quads_of(in) && !status; ++place) {
        const int32_t input = input_at(inputs, place);
        if (input == QUADS_NO_INPUT) continue;
        if (input < 0 || input >= in || seen[input])
            status = SPARSIFY_BAD_INDEX;
        else
            n_seen += seen[input] = 1;
    }
    free(seen);
    return status || n_seen == in ? status : SPARSIFY_BAD_INDEX;
}

// What of the used quads is kept: something of each, nothing of padding or where there is no input.
int check_kept(const QuadsHeader &header, const uint8_t *inputs, const uint8_t *kept, const int32_t *quad_of,
               const int64_t *position_of) {
    int64_t nnz = 0;
    for (int64_t value = 0; value < header.n_panel_values; ++value) {
        const int bits = kept[value / 2] >> (value % 2 * 4) & 15;
        const bool padding = position_of[value] < 0;
        if (padding != (bits == 0)) return SPARSIFY_BAD_INDEX;
        for (int i = 0; i < 4 && !padding; ++i) {
            if (!(bits >> i & 1)) continue;
            if (input_at(inputs, 4 * int64_t(quad_of[position_of[value]]) + i) == QUADS_NO_INPUT)
                return SPARSIFY_BAD_INDEX;
            ++nnz;
        }
    }
    const bool tail = header.n_panel_values % 2 && kept[header.n_panel_values / 2] >> 4;
    return nnz == header.nnz && !tail ? SPARSIFY_OK : SPARSIFY_BAD_INDEX;
}

// The quads of a checked panel, as CSR: quad crow, col, and for each value of the panel its position there or -1.
struct UnpackedPanel {
    int32_t *crow, *col;
    int64_t *position_of;
    int status;

    UnpackedPanel(int64_t out, int64_t in, const uint8_t *panel, int64_t panel_bytes, int64_t n_values) {
        crow = static_cast<int32_t *>(malloc(size_t(out + 1) * sizeof(int32_t)));
        col = static_cast<int32_t *>(malloc(size_t(n_values + 1) * sizeof(int32_t)));
        position_of = static_cast<int64_t *>(malloc(size_t(n_values + 1) * sizeof(int64_t)));
        status = crow && col && position_of
                     ? sparsify_panel_unpack(out, quads_of(in), panel, panel_bytes, n_values, crow, col, position_of)
                     : SPARSIFY_NO_MEMORY;
    }
    ~UnpackedPanel() {
        free(crow);
        free(col);
        free(position_of);
    }
    UnpackedPanel(const UnpackedPanel &) = delete;
    UnpackedPanel &operator=(const UnpackedPanel &) = delete;
};

// The weights of one row in rising columns: their places in the packed values.
void unpack_row(int64_t in, const uint8_t *inputs, const uint8_t *kept, const int32_t *quads, const int64_t *values,
                int64_t n_quads, int64_t *of_input, int32_t *col, int64_t *order, int32_t first) {
    for (int64_t q = 0; q < n_quads; ++q) {
        const int64_t value = values[q];
        const int bits = kept[value / 2] >> (value % 2 * 4) & 15;
        for (int i = 0; i < 4; ++i)
            if (bits >> i & 1) of_input[input_at(inputs, 4 * int64_t(quads[q]) + i)] = 4 * value + i + 1;
    }
    for (int64_t k = 0; k < in; ++k) {
        if (!of_input[k]) continue;
        order[of_input[k] - 1] = first;
        col[first++] = int32_t(k);
        of_input[k] = 0;
    }
}

}  // namespace
}  // namespace sparsify

using namespace sparsify;

extern "C" {

int64_t sparsify_quads_nnz(const uint8_t *index) {
    QuadsHeader header;
    memcpy(&header, index, sizeof header);
    return header.nnz;
}

int sparsify_quads_check(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values) {
    if (out < 0 || in < 0 || out >= INT32_MAX || in >= INT32_MAX) return SPARSIFY_BAD_ARGUMENT;
    if (index_bytes < int64_t(sizeof(QuadsHeader))) return SPARSIFY_BAD_INDEX;
    QuadsHeader header;
    memcpy(&header, index, sizeof header);
    if (header.magic != QUADS_MAGIC || header.unused || header.out != out || header.in != in || header.nnz < 0 ||
        header.nnz > INT32_MAX || header.n_panel_values < 0 || header.n_panel_values > INT64_MAX / 8 - out ||
        n_values != quads_n_values(out, header.n_panel_values) || header.unused2[0] || header.unused2[1] ||
        header.unused2[2])
        return SPARSIFY_BAD_INDEX;
    const QuadsSections sections = quads_sections(in, header.n_panel_values);
    const int64_t panel_bytes = index_bytes - sections.panel;
    if (panel_bytes < int64_t(sizeof(PanelHeader))) return SPARSIFY_BAD_INDEX;
    const uint8_t *inputs = index + sections.inputs, *panel = index + sections.panel;
    for (int64_t i = sections.kept + (header.n_panel_values + 1) / 2; i < sections.panel; ++i)
        if (index[i]) return SPARSIFY_BAD_INDEX;
    if (const int status = check_inputs(inputs, in)) return status;
    if (const int status = sparsify_panel_check(out, quads_of(in), panel, panel_bytes, header.n_panel_values))
        return status;
    const UnpackedPanel quads(out, in, panel, panel_bytes, header.n_panel_values);
    if (quads.status) return quads.status;
    return check_kept(header, inputs, index + sections.kept, quads.col, quads.position_of);
}

int sparsify_quads_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values,
                          int32_t *crow, int32_t *col, int64_t *order) {
    if (index_bytes < int64_t(sizeof(QuadsHeader))) return SPARSIFY_BAD_INDEX;
    QuadsHeader header;
    memcpy(&header, index, sizeof header);
    if (header.out != out || header.in != in || n_values != quads_n_values(out, header.n_panel_values))
        return SPARSIFY_BAD_INDEX;
    const QuadsSections sections = quads_sections(in, header.n_panel_values);
    const UnpackedPanel quads(out, in, index + sections.panel, index_bytes - sections.panel, header.n_panel_values);
    if (quads.status) return quads.status;

    int64_t *value_of = static_cast<int64_t *>(malloc(size_t(header.n_panel_values + 1) * sizeof(int64_t)));
    int64_t *of_input = static_cast<int64_t *>(calloc(size_t(in + 1), sizeof(int64_t)));
    const bool allocated = value_of && of_input;
    if (allocated) {
        for (int64_t i = 0; i < n_values; ++i) order[i] = -1;
        for (int64_t value = 0; value < header.n_panel_values; ++value)
            if (quads.position_of[value] >= 0) value_of[quads.position_of[value]] = value;
        const uint8_t *kept = index + sections.kept;
        crow[0] = 0;
        for (int64_t row = 0; row < out; ++row) {
            const int32_t first = quads.crow[row], n = quads.crow[row + 1] - first;
            int32_t n_kept = 0;
            for (int32_t q = first; q < first + n; ++q)
                n_kept += __builtin_popcount(unsigned(kept[value_of[q] / 2] >> (value_of[q] % 2 * 4) & 15));
            crow[row + 1] = crow[row] + n_kept;
            unpack_row(in, index + sections.inputs, kept, quads.col + first, value_of + first, n, of_input, col, order,
                       crow[row]);
        }
    }
    free(value_of);
    free(of_input);
    return allocated ? SPARSIFY_OK : SPARSIFY_NO_MEMORY;
}
}
