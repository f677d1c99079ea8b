// Opens checkpoints written by sparsify.save, packs the weight of each layer into a form of the kernels, and multiplies
// it with two rows of input. Without Python and torch.
//
//     multiply FILE...
//
// Prints a line for each layer: its name, its form, its outputs. Exits with 1 if a file was refused.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "sparsify.h"

namespace {

constexpr int64_t TOKENS = 2;

// A weight in a form: what to keep of a layer for as long as a program multiplies with it.
struct Packed {
    int form;
    int64_t out, in;
    std::vector<uint8_t> index, values;  // the memory of a vector is aligned well enough for both
    std::vector<float> scale;            // of int8 values
};

// The number of the form that `export` chose for a layer if these values can have it, else of one that suits any.
int form_for(const sparsify_stored_layer &layer) {
    const bool is_int8 = std::strcmp(layer.dtype, "I8") == 0;
    for (int form = 0; form < SPARSIFY_N_FORMS; ++form) {
        const sparsify_form_functions &known = *sparsify_form(form);
        const bool fits = form != SPARSIFY_PAIRMASK && (is_int8 || !known.quantizes_inputs);
        if (fits && std::strcmp(layer.form, known.name) == 0) return form;
    }
    return SPARSIFY_PANEL;
}

bool pack(const sparsify_checkpoint *checkpoint, int64_t number, const sparsify_stored_layer &layer, Packed &packed) {
    const size_t size = std::strcmp(layer.dtype, "I8") == 0 ? 1 : 4;
    std::vector<int32_t> crow(layer.out + 1), col(layer.n_kept);
    std::vector<uint8_t> kept(layer.n_kept * size);
    if (sparsify_checkpoint_csr(checkpoint, number, crow.data(), col.data(), kept.data())) return false;

    packed.form = form_for(layer);
    packed.out = layer.out, packed.in = layer.in;
    const sparsify_form_functions &form = *sparsify_form(packed.form);
    const int64_t n_values = form.n_values(layer.out, layer.in, crow.data(), col.data());
    const int64_t index_bytes = form.index_bytes(layer.out, layer.in, crow.data(), col.data());
    if (n_values < 0 || index_bytes < 0) return false;
    std::vector<int64_t> order(n_values);
    packed.index.assign(index_bytes, 0);
    packed.values.assign(n_values * size, 0);
    if (form.pack(layer.out, layer.in, crow.data(), col.data(), packed.index.data(), order.data())) return false;
    for (int64_t i = 0; i < n_values; ++i)
        if (order[i] >= 0) std::memcpy(&packed.values[i * size], &kept[order[i] * size], size);

    if (layer.scale) packed.scale.assign(layer.scale, layer.scale + layer.out);
    for (int64_t row = 0; form.quantizes_inputs && row < layer.out; ++row) {  // the sums of the rows, behind the values
        int32_t sum = 0;
        for (int32_t k = crow[row]; k < crow[row + 1]; ++k) sum += int8_t(kept[k]);
        std::memcpy(&packed.values[n_values - 4 * (layer.out - row)], &sum, sizeof sum);
    }
    return true;
}

int multiply(const Packed &packed, const float *bias, const std::vector<float> &x, std::vector<float> &y) {
    sparsify_linear_call call = {};
    call.index = packed.index.data();
    call.values = packed.values.data();
    call.bias = bias;
    call.x = x.data(), call.x_stride = packed.in;
    call.y = y.data(), call.y_stride = packed.out;
    call.tokens = TOKENS, call.out = packed.out, call.in = packed.in;
    call.activation = SPARSIFY_NONE;
    call.n_threads = 2;
    call.first_row = 0, call.end_row = packed.out;
    if (packed.scale.empty()) return sparsify_linear(packed.form, SPARSIFY_F32, &call);
    const sparsify_int8_call int8 = {call, packed.scale.data()};
    return sparsify_linear_int8(packed.form, SPARSIFY_F32, &int8);
}

const float *find_bias(const sparsify_checkpoint *checkpoint, const sparsify_stored_layer &layer) {
    const std::string name = *layer.name ? std::string(layer.name) + ".bias" : "bias";
    const int64_t number = sparsify_checkpoint_find_tensor(checkpoint, name.c_str());
    sparsify_stored_tensor bias;
    if (number < 0 || sparsify_checkpoint_tensor(checkpoint, number, &bias)) return nullptr;
    const bool fits = bias.n_dims == 1 && bias.sizes[0] == layer.out && std::strcmp(bias.dtype, "F32") == 0;
    return fits ? static_cast<const float *>(bias.data) : nullptr;
}

bool run(const sparsify_checkpoint *checkpoint, int64_t number) {
    sparsify_stored_layer layer;
    sparsify_checkpoint_layer(checkpoint, number, &layer);
    std::printf("%s (%lld x %lld, %lld kept, %s)", *layer.name ? layer.name : "(root)", (long long)layer.out,
                (long long)layer.in, (long long)layer.n_kept, layer.dtype);
    const bool multiplies = std::strcmp(layer.dtype, "F32") == 0 || std::strcmp(layer.dequantized, "F32") == 0;
    if (!multiplies || std::strcmp(layer.module, "Embedding") == 0) {
        std::printf(" not multiplied here\n");
        return true;
    }
    std::vector<float> x(TOKENS * layer.in), y(TOKENS * layer.out);
    for (size_t k = 0; k < x.size(); ++k) x[k] = float(k * 37 % 101) / 50 - 1;
    Packed packed;
    if (!pack(checkpoint, number, layer, packed)) return false;
    const int status = multiply(packed, find_bias(checkpoint, layer), x, y);
    if (status) {
        std::printf(": %s\n", sparsify_status_text(status));
        return false;
    }
    std::printf(" %s:", sparsify_form(packed.form)->name);
    for (size_t i = 0; i < y.size() && i < 16; ++i) std::printf(" %.9g", y[i]);
    std::printf("\n");
    return true;
}

}  // namespace

int main(int n_arguments, char **arguments) {
    int exit_code = 0;
    for (int i = 1; i < n_arguments; ++i) {
        char reason[400];
        sparsify_checkpoint *checkpoint = sparsify_checkpoint_open(arguments[i], reason, sizeof reason, nullptr);
        if (!checkpoint) {
            std::printf("%s: %s\n", arguments[i], reason);
            exit_code = 1;
            continue;
        }
        for (int64_t number = 0; number < sparsify_checkpoint_n_layers(checkpoint); ++number)
            if (!run(checkpoint, number)) exit_code = 1;
        sparsify_checkpoint_close(checkpoint);
    }
    return exit_code;
}
