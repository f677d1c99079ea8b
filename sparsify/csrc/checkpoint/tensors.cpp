#include "checkpoint/tensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "sparsify.h"

namespace sparsify {
namespace {

constexpr int64_t LONGEST_HEADER = 100000000, MOST_DIMS = 64, ALIGNMENT = 64;

const Dtype DTYPES[] = {
    {"F64", 8, true},     {"F32", 4, true},  {"F16", 2, true},  {"BF16", 2, true}, {"F8_E4M3", 1, true},
    {"F8_E5M2", 1, true}, {"I64", 8, false}, {"I32", 4, false}, {"I16", 2, false}, {"I8", 1, false},
    {"U64", 8, false},    {"U32", 4, false}, {"U16", 2, false}, {"U8", 1, false},  {"BOOL", 1, false},
};

int by_name(const void *a, const void *b) {
    return compare(text(static_cast<const Tensor *>(a)->name), text(static_cast<const Tensor *>(b)->name));
}

int by_place(const void *a, const void *b) {
    const auto *one = *static_cast<Tensor *const *>(a), *other = *static_cast<Tensor *const *>(b);
    if (one->begin != other->begin) return one->begin < other->begin ? -1 : 1;
    return one->bytes < other->bytes ? -1 : one->bytes > other->bytes;
}

bool is_integer(const Value *value) { return value && value->kind == Kind::INTEGER && value->integer >= 0; }

// An open file, closed at the end.
struct Open {
    FILE *file;
    ~Open() {
        if (file) fclose(file);
    }
    bool read(void *to, int64_t n) { return n == 0 || fread(to, 1, size_t(n), file) == size_t(n); }
};

// The size of an ordinary file; -1 for anything else: nothing waits for a pipe.
int64_t size_of(const char *path) {
#if defined(_WIN32)
    struct _stat64 found;
    return _stat64(path, &found) == 0 && (found.st_mode & _S_IFMT) == _S_IFREG ? int64_t(found.st_size) : -1;
#else
    struct stat found;
    return stat(path, &found) == 0 && S_ISREG(found.st_mode) ? int64_t(found.st_size) : -1;
#endif
}

// Reads the sizes and the place of a tensor; its data are not yet there.
bool read_place(Arena &arena, const Value &place, Tensor &tensor, Refusal &refusal) {
    const Text name = place.key;
    const Value *dtype = member(&place, "dtype"), *shape = member(&place, "shape");
    const Value *offsets = member(&place, "data_offsets");
    const Value *begin = offsets ? offsets->first : nullptr, *end = begin ? begin->next : nullptr;
    if (place.n != 3 || !dtype || dtype->kind != Kind::TEXT || !shape || shape->kind != Kind::LIST ||
        shape->n > MOST_DIMS || !offsets || offsets->kind != Kind::LIST || offsets->n != 2 || !is_integer(begin) ||
        !is_integer(end))
        return refusal.no("its header is wrong at %.*s: dtype, shape and data_offsets are to be there", shown(name),
                          name.at);
    tensor = {
        join(arena, name, ""), nullptr, arena.take<int64_t>(shape->n), shape->n, begin->integer, 0, nullptr, false};
    if (!tensor.name || !tensor.sizes) return refusal.no_memory();
    for (const Dtype &known : DTYPES)
        if (same(dtype->text, known.name)) tensor.dtype = &known;
    if (!tensor.dtype)
        return refusal.no("tensor %.*s has the dtype %.*s, which is not read", shown(name), name.at,
                          dtype->text.n < 20 ? int(dtype->text.n) : 20, dtype->text.at);
    int64_t n = 1, most = 1, i = 0;
    for (const Value *size = shape->first; size; size = size->next) {
        const int64_t at_least_1 = is_integer(size) && size->integer ? size->integer : 1;
        if (!is_integer(size) || __builtin_mul_overflow(most, at_least_1, &most))
            return refusal.no("tensor %.*s has an impossible shape", shown(name), name.at);
        n *= tensor.sizes[i++] = size->integer;  // no larger than `most`
    }
    if (__builtin_mul_overflow(n, int64_t(tensor.dtype->bytes), &tensor.bytes) ||
        end->integer - begin->integer != tensor.bytes)
        return refusal.no("tensor %.*s has another shape than its %lld bytes", shown(name), name.at,
                          static_cast<long long>(end->integer - begin->integer));
    return true;
}

// Reads the table of the tensors; `bytes` are those behind it.
bool read_table(TensorFile &file, Text json, int64_t bytes, Tensor **&places, Refusal &refusal) {
    const char *why = nullptr;
    const Value *table = parse_json(file.arena, json, &why);
    if (!table || table->kind != Kind::OBJECT) return refusal.no("its header is no JSON object: %s", why ? why : "");
    static const Value nothing;
    file.metadata = member(table, "__metadata__");
    if (!file.metadata) file.metadata = &nothing;
    const bool has_metadata = file.metadata != &nothing;
    if (has_metadata && file.metadata->kind != Kind::OBJECT)
        return refusal.no("its header is wrong at __metadata__: it is no object");
    for (const Value *entry = file.metadata->first; entry; entry = entry->next)
        if (entry->kind != Kind::TEXT) return refusal.no("its header is wrong at __metadata__: not all of it is text");
    file.n_tensors = table->n - has_metadata;
    file.tensors = file.arena.take<Tensor>(file.n_tensors);
    places = file.arena.take<Tensor *>(file.n_tensors);
    if (!file.tensors || !places) return refusal.no_memory();
    int64_t n = 0;
    for (const Value *place = table->first; place; place = place->next) {
        if (place == file.metadata) continue;
        if (!read_place(file.arena, *place, file.tensors[n], refusal)) return false;
        ++n;
    }
    qsort(file.tensors, size_t(n), sizeof(Tensor), by_name);
    for (int64_t i = 0; i < n; ++i) places[i] = file.tensors + i;
    qsort(places, size_t(n), sizeof(Tensor *), by_place);
    int64_t end = 0;
    for (int64_t i = 0; i < n; ++i) {
        const Text name = text(places[i]->name);
        if (places[i]->begin != end)
            return refusal.no("tensor %.*s lies at %lld, expected at %lld", shown(name), name.at,
                              static_cast<long long>(places[i]->begin), static_cast<long long>(end));
        end += places[i]->bytes;  // each is at most the file's size: this cannot overflow before it is too large
        if (end > bytes) break;
    }
    return end == bytes || refusal.no("its tensors take %lld bytes, and it has %lld for them",
                                      static_cast<long long>(end), static_cast<long long>(bytes));
}

}  // namespace

bool read_tensors(const char *path, TensorFile &file, Refusal &refusal) {
    const int64_t size = size_of(path);
    if (size < 0) return refusal.no("there is no such file");
    Open open = {fopen(path, "rb")};
    if (!open.file) return refusal.no("it cannot be opened");
    uint8_t prefix[8];
    if (size < 8 || !open.read(prefix, 8)) return refusal.no("it is cut off: it has %lld bytes", (long long)(size));
    uint64_t n = 0;
    for (int i = 0; i < 8; ++i) n |= uint64_t(prefix[i]) << 8 * i;
    const int64_t most = size - 8 < LONGEST_HEADER ? size - 8 : LONGEST_HEADER;
    if (n > uint64_t(most)) return refusal.no("its header is to have %llu bytes", static_cast<unsigned long long>(n));
    char *json = file.arena.take<char>(int64_t(n));
    if (!json) return refusal.no_memory();
    if (!open.read(json, int64_t(n))) return refusal.no("it changed while it was being read");
    Tensor **places = nullptr;
    if (!read_table(file, {json, int64_t(n)}, size - 8 - int64_t(n), places, refusal)) return false;
    for (int64_t i = 0; i < file.n_tensors; ++i) {
        Tensor &tensor = *places[i];
        uint8_t *data = file.arena.take<uint8_t>(tensor.bytes + ALIGNMENT);
        if (!data) return refusal.no_memory();
        data += -reinterpret_cast<uintptr_t>(data) % ALIGNMENT;
        tensor.data = data;
        if (!open.read(data, tensor.bytes)) return refusal.no("it changed while it was being read");
        bool is_wrong = false;
        if (strcmp(tensor.dtype->name, "BOOL") == 0)
            for (int64_t k = 0; k < tensor.bytes; ++k) is_wrong |= data[k] > 1;
        if (is_wrong) return refusal.no("%s is BOOL, but has bytes that are neither 0 nor 1", tensor.name);
    }
    return true;
}

const Tensor *find_tensor(const TensorFile &file, const char *name) {
    const Tensor wanted = {name, nullptr, nullptr, 0, 0, 0, nullptr, false};
    if (!file.n_tensors) return nullptr;
    return static_cast<const Tensor *>(bsearch(&wanted, file.tensors, size_t(file.n_tensors), sizeof(Tensor), by_name));
}

}  // namespace sparsify
