// The operators of exported layers for a torch without Python: those that AOTInductor leaves to the dispatcher.
#include <atomic>

#include "runtime/lent_threads.h"
#include "sparsify.h"
#include "torch/tensors.h"

namespace sparsify::torch {
namespace {

// As sparsify/kernels numbers them: the last forms for the CPU come behind those for GPUs.
constexpr int64_t PAIRMASK_NUMBER = 7, SELL_NUMBER = 8;

int form_of(int64_t number) {
    if (number < SPARSIFY_QUADS) return int(number);
    return number == PAIRMASK_NUMBER ? SPARSIFY_PAIRMASK : number == SELL_NUMBER ? SPARSIFY_SELL : -1;
}

#define SIZES                                                                    \
    "int kernel_height, int kernel_width, int stride_height, int stride_width, " \
    "int padding_height, int padding_width, int dilation_height, int dilation_width"

const char *const SCHEMAS[] = {
    "linear_packed(Tensor x, Tensor index, Tensor values, int form, Tensor? bias, int out_features, int in_features, "
    "int activation, int first=0, int end=-1) -> Tensor",
    "linear_int8(Tensor x, Tensor index, Tensor values, Tensor scale, int form, Tensor? bias, int out_features, "
    "int in_features, int activation, int first=0, int end=-1) -> Tensor",
    "pointwise_packed(Tensor x, Tensor index, Tensor values, Tensor? bias, int out_features, int in_features, "
    "int activation) -> Tensor",
    "convolution_packed(Tensor x, Tensor index, Tensor values, Tensor? scale, Tensor? bias, int out_features, "
    "int in_features, " SIZES ", int activation) -> Tensor",
};

// The indices that have passed: a full check takes longer than most calls. An entry is for a place in memory, and is
// made again when another index comes to the same entry.
struct Passed {
    std::atomic<uint64_t> number{0};
};
Passed passed[4096];

uint64_t number_of(const Tensor &index, int64_t n_values, int form, int64_t out, int64_t in) {
    uint64_t number = reinterpret_cast<uintptr_t>(index.data);
    const auto *bytes = static_cast<const uint8_t *>(index.data);
    const int64_t parts[] = {index.n, n_values, form, out, in};
    for (const int64_t part : parts) number = (number ^ uint64_t(part)) * 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i < index.n; i += i < 64 ? 1 : index.n / 64 + 1) number = (number ^ bytes[i]) * 0x100000001b3u;
    return number | 1;
}

// A weight and what belongs to it.
struct Weight {
    Tensor index, values, scale, bias;
    int form = SPARSIFY_PANEL, dtype = SPARSIFY_F32;
    int64_t out = 0, in = 0, activation = 0;
};

// The number of the dtype of x, or -1 where no kernel takes it.
int dtype_of(const Torch &torch, const Tensor &x) {
    if (x.dtype == torch.dtype_float32()) return SPARSIFY_F32;
    if (x.dtype == torch.dtype_bfloat16()) return SPARSIFY_BF16;
    return x.dtype == torch.dtype_float16() ? SPARSIFY_F16 : -1;
}

void check_weight(const Torch &torch, const Tensor &x, Weight &weight, bool is_int8) {
    weight.dtype = dtype_of(torch, x);
    if (weight.dtype < 0 || weight.values.dtype != (is_int8 ? torch.dtype_int8() : x.dtype) ||
        (weight.bias && weight.bias.dtype != x.dtype) || (weight.scale && weight.scale.dtype != torch.dtype_float32()))
        throw Failure(
            "sparsify: the input, the values and the bias of a layer have to be of one type, float32, "
            "bfloat16 or float16");
    if ((weight.bias && weight.bias.n != weight.out) || (weight.scale && weight.scale.n != weight.out))
        throw Failure("sparsify: bias and scale have an entry for each of the %lld outputs", (long long)weight.out);
    weight.values.make_contiguous();
    weight.bias.make_contiguous();
    weight.scale.make_contiguous();
    if (weight.index.dtype != torch.dtype_uint8() || !weight.index.is_contiguous())
        throw Failure("sparsify: the index of a weight is uint8, without gaps");
    const sparsify_form_functions *form = sparsify_form(weight.form);
    if (!form) throw Failure("sparsify: the form of a weight is not one for the CPU");
    const uint64_t number = number_of(weight.index, weight.values.n, weight.form, weight.out, weight.in);
    std::atomic<uint64_t> &known = passed[(number >> 20) % 4096].number;
    if (known.load(std::memory_order_relaxed) == number) return;
    const auto *bytes = static_cast<const uint8_t *>(weight.index.data);
    if (const int status = form->check(weight.out, weight.in, bytes, weight.index.n, weight.values.n))
        throw Failure("sparsify: the weight of a layer cannot be read: %s", sparsify_status_text(status));
    known.store(number, std::memory_order_relaxed);
}

int threads_of(const Torch &torch) {
    uint32_t n = 1;
    return torch.get_num_threads(&n) || n < 1 ? 1 : int(n);
}

void check_status(int status) {
    if (status) throw Failure("sparsify: %s", sparsify_status_text(status));
}

sparsify_linear_call linear_call(const Torch &torch, const Weight &weight) {
    sparsify_linear_call call = {};
    call.index = static_cast<const uint8_t *>(weight.index.data);
    call.values = weight.values.data;
    call.bias = weight.bias.data;
    call.out = call.end_row = weight.out, call.in = weight.in;
    call.activation = weight.activation;
    call.n_threads = threads_of(torch);
    return call;
}

// x (..., in) to y (..., end - first).
void multiply(const Torch &torch, Tensor &x, const Weight &weight, int64_t first, int64_t end, Tensor &y) {
    end = end == -1 ? weight.out : end;
    if (first < 0 || first > end || end > weight.out)
        throw Failure("sparsify: the layer has rows 0 to %lld, asked for %lld to %lld", (long long)weight.out,
                      (long long)first, (long long)end);
    if (x.n_dims == 0 || x.sizes[x.n_dims - 1] != weight.in)
        throw Failure("sparsify: the layer takes inputs of %lld features", (long long)weight.in);
    x.make_contiguous();
    sparsify_linear_call call = linear_call(torch, weight);
    int64_t sizes[64];
    call.tokens = 1;
    for (int64_t i = 0; i < x.n_dims && i < 64; ++i) sizes[i] = x.sizes[i];
    for (int64_t i = 0; i + 1 < x.n_dims; ++i) call.tokens *= x.sizes[i];
    sizes[(x.n_dims - 1) % 64] = end - first;
    y.make(torch, x.n_dims, sizes, nullptr, x.dtype);
    call.x = x.data, call.x_stride = weight.in;
    call.y = y.data, call.y_stride = end - first;
    call.first_row = first, call.end_row = end;
    const sparsify_int8_call int8 = {call, static_cast<const float *>(weight.scale.data)};
    check_status(weight.scale ? sparsify_linear_int8(weight.form, weight.dtype, &int8)
                              : sparsify_linear(weight.form, weight.dtype, &call));
}

void check_images(const Tensor &x, int64_t channels) {
    if (x.n_dims != 4 || x.sizes[1] != channels)
        throw Failure("sparsify: the layer takes images of %lld channels", (long long)channels);
}

void linear(Stack *stack, uint64_t n, bool is_int8) {
    const Torch &torch = *find_torch();
    Inputs inputs(torch, stack, n);
    Tensor x, y;
    Weight weight;
    inputs.tensor(x), inputs.tensor(weight.index), inputs.tensor(weight.values);
    if (is_int8) inputs.tensor(weight.scale);
    const int64_t form = inputs.number();
    weight.form = is_int8 ? int(form) : form_of(form);
    inputs.optional(weight.bias);
    weight.out = inputs.number(), weight.in = inputs.number(), weight.activation = inputs.number();
    const int64_t first = inputs.number(), end = inputs.number();
    check_weight(torch, x, weight, is_int8);
    multiply(torch, x, weight, first, end, y);
    stack[0] = reinterpret_cast<Stack>(y.give());
}

void linear_packed(Stack *stack, uint64_t n, uint64_t) { linear(stack, n, false); }
void linear_int8(Stack *stack, uint64_t n, uint64_t) { linear(stack, n, true); }

void pointwise_packed(Stack *stack, uint64_t n, uint64_t) {
    const Torch &torch = *find_torch();
    Inputs inputs(torch, stack, n);
    Tensor x, y;
    Weight weight;
    inputs.tensor(x), inputs.tensor(weight.index), inputs.tensor(weight.values), inputs.optional(weight.bias);
    weight.out = inputs.number(), weight.in = inputs.number(), weight.activation = inputs.number();
    check_images(x, weight.in);
    check_weight(torch, x, weight, false);
    x.make_contiguous();
    const int64_t sizes[4] = {x.sizes[0], weight.out, x.sizes[2], x.sizes[3]}, positions = sizes[2] * sizes[3];
    y.make(torch, 4, sizes, nullptr, x.dtype);
    sparsify_pointwise_call call = {linear_call(torch, weight), sizes[0], weight.in * positions,
                                    weight.out * positions};
    call.image.tokens = positions;
    call.image.x = x.data, call.image.y = y.data;
    call.image.x_stride = call.image.y_stride = positions;
    check_status(sparsify_pointwise(weight.dtype, &call));
    stack[0] = reinterpret_cast<Stack>(y.give());
}

void convolution_packed(Stack *stack, uint64_t n, uint64_t) {
    const Torch &torch = *find_torch();
    Inputs inputs(torch, stack, n);
    Tensor x, y;
    Weight weight;
    int64_t k[8];
    inputs.tensor(x), inputs.tensor(weight.index), inputs.tensor(weight.values);
    inputs.optional(weight.scale), inputs.optional(weight.bias);
    weight.out = inputs.number(), weight.in = inputs.number();
    for (int64_t &size : k) size = inputs.number();
    weight.activation = inputs.number();
    for (int i = 0; i < 8; ++i)
        if (k[i] < (i == 4 || i == 5 ? 0 : 1)) throw Failure("sparsify: a size of a kernel is out of range");
    check_images(x, weight.in / (k[0] * k[1]));
    check_weight(torch, x, weight, false);
    const bool last = x.sizes[1] > 1 && x.strides[1] == 1 && !x.is_contiguous();
    if (!last) x.make_contiguous();
    int64_t sizes[4] = {x.sizes[0], weight.out, 0, 0};
    for (int i = 0; i < 2; ++i) {
        sizes[2 + i] = (x.sizes[2 + i] + 2 * k[4 + i] - k[6 + i] * (k[i] - 1) - 1) / k[2 + i] + 1;
        if (x.sizes[2 + i] + 2 * k[4 + i] - k[6 + i] * (k[i] - 1) < 1)
            throw Failure("sparsify: an image is smaller than the layer's kernel");
    }
    const int64_t channels_last[4] = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
    y.make(torch, 4, sizes, last ? channels_last : nullptr, x.dtype);
    sparsify_convolution_call call = {};
    call.index = static_cast<const uint8_t *>(weight.index.data), call.values = weight.values.data;
    call.scale = static_cast<const float *>(weight.scale.data), call.bias = weight.bias.data;
    call.x = x.data, call.y = y.data;
    call.x_image_stride = x.strides[0], call.x_channel_stride = last ? 1 : x.strides[1];
    call.x_row_stride = x.strides[2], call.x_column_stride = last ? x.strides[3] : 1;
    call.y_channels_last = last && !y.is_contiguous();
    call.n_images = sizes[0], call.channels = x.sizes[1], call.height = x.sizes[2], call.width = x.sizes[3];
    call.out = weight.out, call.out_height = sizes[2], call.out_width = sizes[3];
    call.kernel_height = k[0], call.kernel_width = k[1], call.stride_height = k[2], call.stride_width = k[3];
    call.top = k[4], call.left = k[5], call.dilation_height = k[6], call.dilation_width = k[7];
    call.activation = weight.activation, call.n_threads = threads_of(torch);
    check_status(sparsify_convolution(weight.dtype, &call));
    stack[0] = reinterpret_cast<Stack>(y.give());
}

}  // namespace
}  // namespace sparsify::torch

using namespace sparsify::torch;

extern "C" int sparsify_register_torch(void) {
    const Torch *torch = find_torch();
    if (!torch) return SPARSIFY_NOT_FOUND;
    LibraryHandle *names = nullptr, *functions = nullptr;  // kept for as long as the process lives
    if (torch->make_fragment("sparsify", __FILE__, __LINE__, &names)) return SPARSIFY_BAD_ARGUMENT;
    for (const char *schema : SCHEMAS)
        if (torch->define(names, schema)) return SPARSIFY_BAD_ARGUMENT;
    if (torch->make_implementation("sparsify", "CPU", __FILE__, __LINE__, &functions)) return SPARSIFY_BAD_ARGUMENT;
    const bool refused = torch->implement(functions, "linear_packed", linear_packed) ||
                         torch->implement(functions, "linear_int8", linear_int8) ||
                         torch->implement(functions, "pointwise_packed", pointwise_packed) ||
                         torch->implement(functions, "convolution_packed", convolution_packed);
    return refused ? SPARSIFY_BAD_ARGUMENT : SPARSIFY_OK;
}
