// A safetensors file in memory: its tensors by name, and the texts beside them.
#pragma once

#include "checkpoint/json.h"

namespace sparsify {

struct Dtype {
    const char *name;
    int bytes;
    bool floating;
};

struct Tensor {
    const char *name;
    const Dtype *dtype;
    int64_t *sizes;
    int64_t n_dims, begin, bytes;
    const uint8_t *data;  // at a multiple of 64 bytes
    bool is_part;         // of the weight of a layer
};

// What was read: the tensors in the order of their names, as `compare` has it.
struct TensorFile {
    Arena arena;
    Tensor *tensors = nullptr;
    int64_t n_tensors = 0;
    const Value *metadata = nullptr;  // an object of texts
};

// Reads a file into memory, all of it or nothing. Returns false with the reason for anything but a whole safetensors
// file of the dtypes that docs/formats.md allows.
bool read_tensors(const char *path, TensorFile &file, Refusal &refusal);

const Tensor *find_tensor(const TensorFile &file, const char *name);

// Whether a tensor has this dtype and one dimension of n elements.
inline bool is_list(const Tensor &tensor, const char *dtype, int64_t n) {
    return strcmp(tensor.dtype->name, dtype) == 0 && tensor.n_dims == 1 && tensor.sizes[0] == n;
}

}  // namespace sparsify
