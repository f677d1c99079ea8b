// The weights of layers: their tensors found, and checked as sparsify/checkpoint/weight_codec.py does.
#include "checkpoint/header.h"
#include "sparsify.h"

namespace sparsify {
namespace {

constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // below it float32 loses bits

const char *col_dtype(int64_t in) { return in <= 256 ? "U8" : in <= 65536 ? "U16" : "I32"; }

// One part of a weight, NAME.weight.PART; null with the reason if it is missing.
const Tensor *part(Checkpoint &checkpoint, const Layer &layer, const char *name, Refusal &refusal) {
    const char *key = join(checkpoint.file.arena, text(layer.name), "weight", name);
    if (!key) {
        refusal.no_memory();
        return nullptr;
    }
    const Tensor *found = find_tensor(checkpoint.file, key);
    if (!found) {
        refusal.no("%.*s: the tensor %s is missing", shown(text(layer.name)), layer.name, name);
        return nullptr;
    }
    const_cast<Tensor *>(found)->is_part = true;
    return found;
}

bool no(Refusal &refusal, const Layer &layer, const char *why) {
    return refusal.no("%.*s: %s", shown(text(layer.name)), *layer.name ? layer.name : "(root)", why);
}

// The weight at i of n_bytes bytes has a bit set: -0.0 is kept like any other value.
bool any_bit(const uint8_t *data, int64_t i, int n_bytes) {
    uint8_t bits = 0;
    for (int b = 0; b < n_bytes; ++b) bits |= data[i * n_bytes + b];
    return bits != 0;
}

template <typename Column>
bool columns_rise(const int32_t *crow, const void *columns, int64_t out, int64_t in) {
    const auto *col = static_cast<const Column *>(columns);
    for (int64_t row = 0; row < out; ++row)
        for (int64_t k = crow[row], before = -1; k < crow[row + 1]; before = col[k++])
            if (col[k] <= before || col[k] >= in) return false;
    return true;
}

bool check_csr(const Layer &layer, Refusal &refusal) {
    const int64_t n = layer.n_kept;
    if (!is_list(*layer.crow, "I32", layer.out + 1)) return no(refusal, layer, "row pointers must be I32 (out + 1)");
    if (!is_list(*layer.col, col_dtype(layer.in), n) || layer.values->n_dims != 1)
        return no(refusal, layer,
                  "values and column indices must be one list each, of one length, the columns of the narrowest dtype");
    const auto *crow = reinterpret_cast<const int32_t *>(layer.crow->data);
    bool rises = crow[0] == 0 && crow[layer.out] == n;
    for (int64_t row = 0; row < layer.out; ++row) rises &= crow[row] <= crow[row + 1];
    if (!rises) return no(refusal, layer, "row pointers must rise from 0 to the number of values");
    auto *const check = layer.in <= 256     ? columns_rise<uint8_t>
                        : layer.in <= 65536 ? columns_rise<uint16_t>
                                            : columns_rise<int32_t>;
    return check(crow, layer.col->data, layer.out, layer.in) ||
           no(refusal, layer, "columns must lie in the matrix, and be strictly increasing in each row");
}

bool check_bitmask(const Layer &layer, Refusal &refusal) {
    const int64_t n = layer.out * layer.in, n_bytes = (n + 7) / 8;
    if (!is_list(*layer.bits, "U8", n_bytes)) return no(refusal, layer, "a bitmask has a bit for each weight");
    const uint8_t *bits = layer.bits->data;
    if (n % 8 && bits[n_bytes - 1] >> n % 8) return no(refusal, layer, "the padding bits of a bitmask must be 0");
    int64_t n_set = 0;
    for (int64_t i = 0; i < n_bytes; ++i) n_set += __builtin_popcount(bits[i]);
    return (layer.values->n_dims == 1 && n_set == layer.n_kept) ||
           no(refusal, layer, "the bitmask keeps another number of weights than there are values");
}

bool check_dense(Layer &layer, Refusal &refusal) {
    const Tensor &values = *layer.values;
    if (values.n_dims != 2 || values.sizes[0] != layer.out || values.sizes[1] != layer.in)
        return no(refusal, layer, "a dense weight must have the shape of its layer");
    if (strcmp(layer.module, "Embedding") == 0) return true;  // all rows count as kept
    layer.n_kept = 0;
    for (int64_t i = 0; i < layer.out * layer.in; ++i) layer.n_kept += any_bit(values.data, i, values.dtype->bytes);
    return true;
}

bool check_scale(const Layer &layer, Refusal &refusal) {
    if (strcmp(layer.values->dtype->name, "I8") != 0) return no(refusal, layer, "a scale belongs to int8 values");
    if (!is_list(*layer.scale, "F32", layer.out)) return no(refusal, layer, "scales must be F32 (out)");
    const auto *scale = reinterpret_cast<const float *>(layer.scale->data);
    for (int64_t row = 0; row < layer.out; ++row)
        if (!(scale[row] >= SMALLEST_SCALE && scale[row] <= 3.40282347e38f))
            return no(refusal, layer, "scales must be finite and greater than 0");
    for (int64_t i = 0; i < layer.values->bytes; ++i)
        if (layer.values->data[i] == 0x80) return no(refusal, layer, "int8 values must lie in [-127, 127]");
    return true;
}

bool read_weight(Checkpoint &checkpoint, Layer &layer, Refusal &refusal) {
    const bool is_csr = strcmp(layer.format, "csr") == 0, is_bitmask = strcmp(layer.format, "bitmask") == 0;
    if (is_csr && (!(layer.crow = part(checkpoint, layer, "crow", refusal)) ||
                   !(layer.col = part(checkpoint, layer, "col", refusal))))
        return false;
    if (is_bitmask && !(layer.bits = part(checkpoint, layer, "bits", refusal))) return false;
    layer.values = part(checkpoint, layer, is_csr || is_bitmask ? "values" : "", refusal);
    if (!layer.values) return false;
    if (*layer.dequantized && !(layer.scale = part(checkpoint, layer, "scale", refusal))) return false;
    layer.n_kept = layer.values->bytes / layer.values->dtype->bytes;
    if (layer.scale ? !check_scale(layer, refusal) : !layer.values->dtype->floating)
        return layer.scale ? false : no(refusal, layer, "values must be floating");
    return is_csr       ? check_csr(layer, refusal)
           : is_bitmask ? check_bitmask(layer, refusal)
                        : check_dense(layer, refusal);
}

// Every alias that is no layer's is a new name for a tensor outside of all weights, or for the weight of a layer.
bool check_aliases(const Checkpoint &checkpoint, Refusal &refusal) {
    for (const Value *alias = checkpoint.aliases->first; alias; alias = alias->next) {
        const char *key = join(const_cast<Checkpoint &>(checkpoint).file.arena, alias->key, "");
        const char *name = join(const_cast<Checkpoint &>(checkpoint).file.arena, alias->text, "");
        if (!key || !name) return refusal.no_memory();
        const Tensor *taken = find_tensor(checkpoint.file, key), *target = find_tensor(checkpoint.file, name);
        const Layer *owner = find_layer_of(checkpoint, alias->text);
        const bool is_weight = owner && owner->owner == owner;
        if ((taken && !taken->is_part) || !(is_weight || (target && !target->is_part)))
            return refusal.no("the header says %.*s is the same tensor as %.*s, which cannot be", shown(alias->key),
                              key, shown(alias->text), name);
    }
    return true;
}

}  // namespace

bool read_weights(Checkpoint &checkpoint, Refusal &refusal) {
    for (int64_t i = 0; i < checkpoint.n_layers; ++i) {
        Layer &layer = checkpoint.layers[i];
        if (layer.owner == &layer && !read_weight(checkpoint, layer, refusal)) return false;
    }
    for (int64_t i = 0; i < checkpoint.n_layers; ++i) {
        Layer &layer = checkpoint.layers[i];
        const Layer &owner = *layer.owner;
        layer.crow = owner.crow, layer.col = owner.col, layer.bits = owner.bits;
        layer.values = owner.values, layer.scale = owner.scale, layer.n_kept = owner.n_kept;
    }
    return check_aliases(checkpoint, refusal);
}

}  // namespace sparsify
