// The header of a checkpoint, docs/formats.md: its layers and names, with every hash checked.
#pragma once

#include "checkpoint/tensors.h"

namespace sparsify {

struct Layer {
    const char *name, *module, *format, *dequantized, *form;
    int64_t out, in;
    const Layer *owner;                                // whose tensors this one shares, mostly itself
    const Tensor *crow, *col, *bits, *values, *scale;  // null for those that its format has not
    int64_t n_kept;
};

struct Checkpoint {
    TensorFile file;
    Layer *layers = nullptr;
    int64_t n_layers = 0;
    const Value *entries = nullptr, *aliases = nullptr;  // of the header: objects by layer name, and by state name
};

// The layer of a name, or whose weight has this name; null if there is none.
Layer *find_layer(const Checkpoint &checkpoint, Text name);
Layer *find_layer_of(const Checkpoint &checkpoint, Text weight);

// Reads the header of a file, and compares it with the tensors. The weights of the layers are not looked at.
bool read_header(Checkpoint &checkpoint, Refusal &refusal);

// Finds the tensors of all layers and checks them against the table in docs/formats.md.
bool read_weights(Checkpoint &checkpoint, Refusal &refusal);

}  // namespace sparsify
