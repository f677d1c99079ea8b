// The C interface of checkpoints.
#include <new>

#include "checkpoint/header.h"
#include "sparsify.h"

using namespace sparsify;

struct sparsify_checkpoint {
    Checkpoint contents;
};

namespace {

template <typename Column>
void copy_columns(const void *from, int64_t n, int32_t *col) {
    for (int64_t k = 0; k < n; ++k) col[k] = int32_t(static_cast<const Column *>(from)[k]);
}

void csr_of_csr(const Layer &layer, int32_t *crow, int32_t *col) {
    memcpy(crow, layer.crow->data, size_t(layer.out + 1) * sizeof(int32_t));
    auto *const copy = layer.in <= 256     ? copy_columns<uint8_t>
                       : layer.in <= 65536 ? copy_columns<uint16_t>
                                           : copy_columns<int32_t>;
    copy(layer.col->data, layer.n_kept, col);
}

template <typename IsKept>
void csr_of_mask(const Layer &layer, int32_t *crow, int32_t *col, IsKept is_kept) {
    int64_t n = 0;
    crow[0] = 0;
    for (int64_t row = 0; row < layer.out; ++row) {
        for (int64_t k = 0; k < layer.in; ++k)
            if (is_kept(row * layer.in + k)) col[n++] = int32_t(k);
        crow[row + 1] = int32_t(n);
    }
}

}  // namespace

extern "C" {

sparsify_checkpoint *sparsify_checkpoint_open(const char *path, char *message, int64_t message_bytes, int *status) {
    Refusal refusal = {message, message_bytes, SPARSIFY_OK};
    if (message && message_bytes > 0) *message = 0;
    auto *checkpoint = new (std::nothrow) sparsify_checkpoint;
    bool right = checkpoint ? read_tensors(path, checkpoint->contents.file, refusal) : refusal.no_memory();
    right = right && read_header(checkpoint->contents, refusal) && read_weights(checkpoint->contents, refusal);
    if (status) *status = refusal.status;
    if (right) return checkpoint;
    delete checkpoint;
    return nullptr;
}

void sparsify_checkpoint_close(sparsify_checkpoint *checkpoint) { delete checkpoint; }

int64_t sparsify_checkpoint_n_layers(const sparsify_checkpoint *checkpoint) { return checkpoint->contents.n_layers; }

int64_t sparsify_checkpoint_n_tensors(const sparsify_checkpoint *checkpoint) {
    return checkpoint->contents.file.n_tensors;
}

int64_t sparsify_checkpoint_find_layer(const sparsify_checkpoint *checkpoint, const char *name) {
    const Layer *found = find_layer(checkpoint->contents, text(name));
    return found ? found - checkpoint->contents.layers : int64_t(SPARSIFY_NOT_FOUND);
}

int64_t sparsify_checkpoint_find_tensor(const sparsify_checkpoint *checkpoint, const char *name) {
    const Checkpoint &contents = checkpoint->contents;
    const Value *alias = member(contents.aliases, name);
    const Tensor *found = find_tensor(contents.file, name);
    for (int64_t i = 0; alias && i < contents.file.n_tensors; ++i)
        if (same(alias->text, contents.file.tensors[i].name)) found = contents.file.tensors + i;
    return found ? found - contents.file.tensors : int64_t(SPARSIFY_NOT_FOUND);
}

int sparsify_checkpoint_layer(const sparsify_checkpoint *checkpoint, int64_t number, sparsify_stored_layer *layer) {
    if (number < 0 || number >= checkpoint->contents.n_layers) return SPARSIFY_BAD_ARGUMENT;
    const Layer &of = checkpoint->contents.layers[number];
    *layer = {of.name,        of.module,
              of.format,      of.values->dtype->name,
              of.dequantized, of.form,
              of.out,         of.in,
              of.n_kept,      of.scale ? reinterpret_cast<const float *>(of.scale->data) : nullptr};
    return SPARSIFY_OK;
}

int sparsify_checkpoint_tensor(const sparsify_checkpoint *checkpoint, int64_t number, sparsify_stored_tensor *tensor) {
    if (number < 0 || number >= checkpoint->contents.file.n_tensors) return SPARSIFY_BAD_ARGUMENT;
    const Tensor &of = checkpoint->contents.file.tensors[number];
    *tensor = {of.name, of.dtype->name, of.n_dims, of.sizes, of.data, of.bytes};
    return SPARSIFY_OK;
}

int sparsify_checkpoint_csr(const sparsify_checkpoint *checkpoint, int64_t number, int32_t *crow, int32_t *col,
                            void *values) {
    if (number < 0 || number >= checkpoint->contents.n_layers) return SPARSIFY_BAD_ARGUMENT;
    const Layer &layer = checkpoint->contents.layers[number];
    const int n_bytes = layer.values->dtype->bytes;
    const uint8_t *stored = layer.values->data;
    auto *kept = static_cast<uint8_t *>(values);
    if (layer.n_kept > 2147483647) return SPARSIFY_BAD_CSR;
    if (layer.crow) {
        csr_of_csr(layer, crow, col);
    } else if (layer.bits) {
        const uint8_t *bits = layer.bits->data;
        csr_of_mask(layer, crow, col, [=](int64_t i) { return bits[i / 8] >> i % 8 & 1; });
    } else {
        const bool all = strcmp(layer.module, "Embedding") == 0;
        csr_of_mask(layer, crow, col, [&](int64_t i) {
            uint8_t set = all;
            for (int b = 0; b < n_bytes; ++b) set |= stored[i * n_bytes + b];
            if (set) memcpy(kept, stored + i * n_bytes, size_t(n_bytes)), kept += n_bytes;
            return set;
        });
        return SPARSIFY_OK;
    }
    memcpy(values, stored, size_t(layer.values->bytes));
    return SPARSIFY_OK;
}
}
