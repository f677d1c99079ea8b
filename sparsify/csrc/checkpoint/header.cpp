#include "checkpoint/header.h"

#include "checkpoint/sha256.h"
#include "sparsify.h"

namespace sparsify {
namespace {

constexpr int64_t NEWEST = 2, INT8_VERSION = 2, MOST = 2147483647;

const char *const MODULES[] = {"SparseLinear", "CSRLinear", "Linear", "Embedding", nullptr};
const char *const FORMATS[] = {"csr", "bitmask", "dense", nullptr};
const char *const DEQUANTIZED[] = {"", "F64", "F32", "F16", "BF16", nullptr};

// The word of a list that a text is, or null.
const char *one_of(const Value *value, const char *const *words) {
    for (; value && value->kind == Kind::TEXT && *words; ++words)
        if (same(value->text, *words)) return *words;
    return nullptr;
}

bool is_object(const Value *value) { return value && value->kind == Kind::OBJECT; }
bool is_text(const Value *value) { return value && value->kind == Kind::TEXT; }
bool is_size(const Value *value) {
    return value && value->kind == Kind::INTEGER && value->integer >= 0 && value->integer <= MOST;
}

bool has_hash(Text bytes, const Value *hash) {
    char found[64];
    Sha256 digest;
    digest.add(bytes.at, bytes.n);
    digest.finish(found);
    return is_text(hash) && same(hash->text, {found, 64});
}

// The SHA-256 over "DTYPE SIZES " and the bytes.
bool has_hash(const Tensor &tensor, Text hash) {
    Sha256 digest;
    digest.add(tensor.dtype->name, int64_t(strlen(tensor.dtype->name)));
    digest.add(" ", 1);
    for (int64_t i = 0; i < tensor.n_dims; ++i) {
        char digits[24], *start = digits + sizeof digits;
        int64_t size = tensor.sizes[i];
        do *--start = char('0' + size % 10);
        while (size /= 10);
        if (i) digest.add(",", 1);
        digest.add(start, digits + sizeof digits - start);
    }
    digest.add(" ", 1);
    digest.add(tensor.data, tensor.bytes);
    char found[64];
    digest.finish(found);
    return same(hash, {found, 64});
}

bool wrong(Refusal &refusal, const char *key, Text name) {
    return refusal.no("the header is wrong at %s.%.*s", key, shown(name), name.at);
}

// Every tensor has its hash, and every hash its tensor.
bool check_tensors(const TensorFile &file, const Value &hashes, Refusal &refusal) {
    for (const Value *hash = hashes.first; hash; hash = hash->next) {
        bool right = is_text(hash) && hash->text.n == 64;
        for (int64_t i = 0; right && i < 64; ++i)
            right = strchr("0123456789abcdef", hash->text.at[i]) && hash->text.at[i];
        if (!right) return wrong(refusal, "tensors", hash->key);
    }
    for (int64_t i = 0; i < file.n_tensors; ++i) {
        const Tensor &tensor = file.tensors[i];
        const Value *hash = member(&hashes, tensor.name);
        if (!hash)
            return refusal.no("the file and its header disagree about the tensor %.*s", shown(text(tensor.name)),
                              tensor.name);
        if (!has_hash(tensor, hash->text))
            return refusal.no("tensor %.*s was altered (its SHA-256 does not match)", shown(text(tensor.name)),
                              tensor.name);
    }
    return hashes.n == file.n_tensors || refusal.no("the file and its header disagree about a tensor");
}

bool read_entry(Arena &arena, const Value &entry, int64_t version, Layer &layer, Refusal &refusal) {
    const Value *out = member(&entry, "out_features"), *in = member(&entry, "in_features");
    const Value *dequantized = member(&entry, "dequantized");
    layer = Layer();
    layer.module = one_of(member(&entry, "module"), MODULES);
    layer.format = one_of(member(&entry, "format"), FORMATS);
    layer.dequantized = dequantized ? one_of(dequantized, DEQUANTIZED) : "";
    if (!layer.module || !layer.format || !layer.dequantized || !is_size(out) || !is_size(in) ||
        entry.n != (dequantized ? 5 : 4))
        return wrong(refusal, "layers", entry.key);
    layer.out = out->integer;
    layer.in = in->integer;
    const bool is_int8 = *layer.dequantized;
    if (strcmp(layer.module, "Embedding") == 0 && (strcmp(layer.format, "dense") != 0 || !is_int8))
        return refusal.no("%.*s: an Embedding has int8 rows, and the format dense", shown(entry.key), entry.key.at);
    if (version < INT8_VERSION && is_int8) return refusal.no("the header is wrong: its version has no int8 values");
    layer.name = join(arena, entry.key, "");
    layer.form = "";
    layer.owner = &layer;
    return layer.name || refusal.no_memory();
}

bool read_choices(Checkpoint &checkpoint, const Value &choices, Refusal &refusal) {
    for (const Value *choice = choices.first; choice; choice = choice->next) {
        const Value *form = member(choice, "form"), *tokens = member(choice, "tokens");
        const Value *times = member(choice, "times_us"), *machine = member(choice, "machine");
        bool right = choice->n == 4 && is_text(form) && tokens && tokens->kind == Kind::INTEGER && is_object(times) &&
                     is_text(machine);
        for (const Value *time = right ? times->first : nullptr; time; time = time->next)
            right &= time->kind == Kind::INTEGER || time->kind == Kind::NUMBER;
        if (!right) return wrong(refusal, "choices", choice->key);
        Layer *layer = find_layer(checkpoint, choice->key);
        if (layer && !(layer->form = join(checkpoint.file.arena, form->text, ""))) return refusal.no_memory();
    }
    return true;
}

// A layer whose weight has an alias shares the tensors of another with the same entry. The other aliases are looked at
// when it is known which tensors belong to weights.
bool share_weights(Checkpoint &checkpoint, Refusal &refusal) {
    for (const Value *alias = checkpoint.aliases->first; alias; alias = alias->next) {
        if (!is_text(alias)) return wrong(refusal, "aliases", alias->key);
        Layer *layer = find_layer_of(checkpoint, alias->key);
        if (!layer) continue;
        const Layer *owner = find_layer_of(checkpoint, alias->text);
        if (!owner || member(checkpoint.aliases, alias->text) || strcmp(owner->module, layer->module) != 0 ||
            strcmp(owner->format, layer->format) != 0 || strcmp(owner->dequantized, layer->dequantized) != 0 ||
            owner->out != layer->out || owner->in != layer->in)
            return refusal.no("the header says %.*s is packed as another layer is, which cannot be", shown(alias->key),
                              alias->key.at);
        layer->owner = owner;
    }
    return true;
}

}  // namespace

Layer *find_layer(const Checkpoint &checkpoint, Text name) {
    const Value *entry = member(checkpoint.entries, name);
    return entry ? checkpoint.layers + entry->integer : nullptr;
}

Layer *find_layer_of(const Checkpoint &checkpoint, Text weight) {
    constexpr int64_t N = 6;  // of "weight"
    if (weight.n < N || memcmp(weight.at + weight.n - N, "weight", N) != 0) return nullptr;
    if (weight.n == N) return find_layer(checkpoint, Text());
    if (weight.n < N + 2 || weight.at[weight.n - N - 1] != '.') return nullptr;
    return find_layer(checkpoint, {weight.at, weight.n - N - 1});
}

bool read_header(Checkpoint &checkpoint, Refusal &refusal) {
    TensorFile &file = checkpoint.file;
    const Value *said = member(file.metadata, "sparsify");
    if (!said) return refusal.no("a safetensors file, but not one written by sparsify.save");
    if (!has_hash(said->text, member(file.metadata, "sha256")))
        return refusal.no("the header was altered (its SHA-256 does not match)");
    const Value *records = member(file.metadata, "records"), *records_hash = member(file.metadata, "records_sha256");
    const char *why = nullptr;
    const Value *header = parse_json(file.arena, said->text, &why);
    if (!is_object(header)) return refusal.no("the header is no JSON object: %s", why ? why : "");
    const Value *version = member(header, "version"), *layers = member(header, "layers");
    const Value *tensors = member(header, "tensors"), *choices = member(header, "choices");
    checkpoint.aliases = member(header, "aliases");
    if (!version || version->kind != Kind::INTEGER || !is_object(layers) || !is_object(tensors) ||
        !is_object(checkpoint.aliases) || (choices && !is_object(choices)) || header->n != (choices ? 5 : 4))
        return refusal.no("the header is wrong: version, layers, aliases and tensors are to be there, and no others");
    if (version->integer < 1 || version->integer > NEWEST)
        return refusal.no("its format version is not 1 to %d, which this library reads", int(NEWEST));
    if (records ? !has_hash(records->text, records_hash) : records_hash != nullptr)
        return refusal.no("the records of its layers were altered (their SHA-256 does not match)");
    if (records && !is_object(parse_json(file.arena, records->text, &why)))
        return refusal.no("the records of its layers are no JSON object");
    checkpoint.layers = file.arena.take<Layer>(layers->n);
    if (!checkpoint.layers) return refusal.no_memory();
    checkpoint.entries = layers;
    for (Value *entry = layers->first; entry; entry = entry->next) {
        entry->integer = checkpoint.n_layers;
        if (!read_entry(file.arena, *entry, version->integer, checkpoint.layers[checkpoint.n_layers++], refusal))
            return false;
    }
    return check_tensors(file, *tensors, refusal) && (!choices || read_choices(checkpoint, *choices, refusal)) &&
           share_weights(checkpoint, refusal);
}

}  // namespace sparsify
