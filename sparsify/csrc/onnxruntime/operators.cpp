// Operators for ONNX Runtime: products with packed weights that are constants of the model. Each weight is checked when
// a session is made, and multiplied where it lies, on the session's threads.
#include <stdlib.h>
#include <string.h>

#include "onnxruntime/api.h"
#include "runtime/lent_threads.h"
#include "runtime/processors.h"
#include "sparsify.h"

#define OR_RETURN(CALL) \
    if (Status *failed = CALL) return failed

namespace sparsify::onnxruntime {
namespace {

constexpr size_t MOST_DIMS = 16;

enum Kind { LINEAR, LINEAR_INT8, POINTWISE, CONVOLUTION, N_KINDS };

// An operator: what OrtCustomOp asks of it, and the places of its inputs behind x and index.
struct Described : Operator {
    const char *own_name;
    Kind kind;
    size_t n_given, scale, bias;  // 0: it has none
};

struct Tensor {
    void *data;
    int64_t dims[MOST_DIMS];
    size_t n_dims;
    int64_t n;
    int type;
};

// A weight of a session.
struct Kernel {
    Api api;
    Kind kind;
    int form;
    int64_t kernel[8];  // of a convolution: height and width of kernel, stride, padding, dilation
    const uint8_t *index;
    const void *values;
    const float *scale, *bias;
    int64_t out, in, activation;
};

Status *read(const Api &api, const Value *value, Tensor &tensor) {
    ShapeInfo *info = nullptr;
    OR_RETURN(api.shape_info(value, &info));
    Status *failed = api.n_dims(info, &tensor.n_dims);
    if (!failed && tensor.n_dims <= MOST_DIMS) failed = api.dims(info, tensor.dims, tensor.n_dims);
    if (!failed) failed = api.element_type(info, &tensor.type);
    api.release(info);
    if (failed) return failed;
    if (tensor.n_dims > MOST_DIMS) return api.status(INVALID_ARGUMENT, "sparsify: more than 16 dimensions");
    tensor.n = 1;
    for (size_t i = 0; i < tensor.n_dims; ++i) tensor.n *= tensor.dims[i];
    return api.data(value, &tensor.data);
}

// A constant input; its data is null if it is left out.
Status *read_constant(const Api &api, const KernelInfo *info, size_t place, int type, Tensor &tensor) {
    tensor = Tensor();
    size_t n = 0;
    OR_RETURN(api.n_inputs(info, &n));
    if (place >= n) return nullptr;
    int is_constant = 0;
    const Value *value = nullptr;
    OR_RETURN(api.constant_input(info, place, &is_constant, &value));
    if (!is_constant || !value) return nullptr;
    OR_RETURN(read(api, value, tensor));
    return tensor.type == type ? nullptr : api.status(INVALID_ARGUMENT, "sparsify: a weight of another type");
}

Status *read_weight(const Described &op, const KernelInfo *info, Kernel &kernel) {
    const Api &api = kernel.api;
    Tensor index, values, scale, bias;
    OR_RETURN(read_constant(api, info, 1, UINT8, index));
    OR_RETURN(read_constant(api, info, 2, kernel.kind == LINEAR_INT8 ? INT8 : FLOAT, values));
    if (!index.data || !values.data)
        return api.status(INVALID_ARGUMENT, "sparsify: index and values must be constants of the model");
    OR_RETURN(read_constant(api, info, op.scale ? op.scale : SIZE_MAX, FLOAT, scale));
    OR_RETURN(read_constant(api, info, op.bias ? op.bias : SIZE_MAX, FLOAT, bias));
    if ((scale.data && scale.n != kernel.out) || (bias.data && bias.n != kernel.out) ||
        (kernel.kind == LINEAR_INT8 && !scale.data))
        return api.status(INVALID_ARGUMENT, "sparsify: scale and bias have an entry for each output");
    if (sparsify_form(kernel.form)
            ->check(kernel.out, kernel.in, static_cast<const uint8_t *>(index.data), index.n, values.n))
        return api.status(INVALID_ARGUMENT, "sparsify: the packed index is damaged or of another form or shape");
    kernel.index = static_cast<const uint8_t *>(index.data);
    kernel.values = values.data;
    kernel.scale = static_cast<const float *>(scale.data);
    kernel.bias = static_cast<const float *>(bias.data);
    return nullptr;
}

Status *fill(const Described &op, const KernelInfo *info, Kernel &kernel) {
    const Api &api = kernel.api;
    int64_t interface = 0, form = 0;
    OR_RETURN(api.attribute(info, "interface", &interface));
    if (interface != SPARSIFY_INTERFACE)
        return api.status(FAIL, "sparsify: the model was written for another version of this library; write it again");
    OR_RETURN(api.attribute(info, "form", &form));
    OR_RETURN(api.attribute(info, "out_features", &kernel.out));
    OR_RETURN(api.attribute(info, "in_features", &kernel.in));
    OR_RETURN(api.attribute(info, "activation", &kernel.activation));
    const bool is_plain =
        form == SPARSIFY_PANEL || form == SPARSIFY_BITMASK || form == SPARSIFY_GATHER || form == SPARSIFY_SELL;
    const bool runs = kernel.kind == LINEAR        ? is_plain
                      : kernel.kind == LINEAR_INT8 ? form >= 0 && form < SPARSIFY_N_FORMS && form != SPARSIFY_PAIRMASK
                                                   : form == SPARSIFY_PANEL;
    if (!runs || kernel.out < 0 || kernel.in < 0 || kernel.activation < SPARSIFY_NONE ||
        kernel.activation > SPARSIFY_RELU6)
        return api.status(INVALID_ARGUMENT, "sparsify: an attribute is out of range");
    kernel.form = int(form);
    if (kernel.kind == CONVOLUTION) {
        size_t n = 8;
        OR_RETURN(api.attributes(info, "geometry", kernel.kernel, &n));
        for (size_t i = 0; i < 8; ++i)
            if (n != 8 || kernel.kernel[i] < (i == 4 || i == 5 ? 0 : 1) || kernel.kernel[i] > 1 << 20)
                return api.status(INVALID_ARGUMENT, "sparsify: an attribute is out of range");
        if (kernel.in % (kernel.kernel[0] * kernel.kernel[1]))
            return api.status(INVALID_ARGUMENT, "sparsify: the weight does not fit its kernel");
    }
    return read_weight(op, info, kernel);
}

Status *create(const Operator *op, const void *table, const KernelInfo *info, void **made) {
    const auto &described = *static_cast<const Described *>(op);
    const Api api(table);
    void *memory = calloc(1, sizeof(Kernel));
    if (!memory) return api.status(FAIL, "sparsify: out of memory");
    auto *kernel = static_cast<Kernel *>(memory);
    kernel->api = api;
    kernel->kind = described.kind;
    if (Status *failed = fill(described, info, *kernel)) {
        free(kernel);
        return failed;
    }
    *made = kernel;
    return nullptr;
}

sparsify_linear_call linear_call(const Kernel &kernel, int64_t tokens) {
    sparsify_linear_call call = {};
    call.index = kernel.index;
    call.values = kernel.values;
    call.bias = kernel.bias;
    call.tokens = tokens;
    call.out = call.end_row = kernel.out;
    call.in = kernel.in;
    call.activation = kernel.activation;
    call.n_threads = n_processors();
    return call;
}

Status *multiply(const Kernel &kernel, const Tensor &x, KernelContext *context, int &status) {
    const Api &api = kernel.api;
    if (x.n_dims == 0 || x.dims[x.n_dims - 1] != kernel.in)
        return api.status(INVALID_ARGUMENT, "sparsify: the input has another number of features than the layer");
    int64_t dims[MOST_DIMS], tokens = 1;
    for (size_t i = 0; i + 1 < x.n_dims; ++i) tokens *= dims[i] = x.dims[i];
    dims[x.n_dims - 1] = kernel.out;
    Value *output = nullptr;
    sparsify_linear_call call = linear_call(kernel, tokens);
    OR_RETURN(api.output(context, 0, dims, x.n_dims, &output));
    OR_RETURN(api.data(output, &call.y));
    call.x = x.data;
    call.x_stride = kernel.in;
    call.y_stride = kernel.out;
    const sparsify_int8_call int8 = {call, kernel.scale};
    status = kernel.kind == LINEAR ? sparsify_linear(kernel.form, SPARSIFY_F32, &call)
                                   : sparsify_linear_int8(kernel.form, SPARSIFY_F32, &int8);
    return nullptr;
}

Status *multiply_positions(const Kernel &kernel, const Tensor &x, KernelContext *context, int &status) {
    const Api &api = kernel.api;
    if (x.n_dims != 4 || x.dims[1] != kernel.in)
        return api.status(INVALID_ARGUMENT, "sparsify: the input must be images with the channels of the layer");
    const int64_t dims[4] = {x.dims[0], kernel.out, x.dims[2], x.dims[3]}, positions = dims[2] * dims[3];
    sparsify_pointwise_call call = {linear_call(kernel, positions), dims[0], kernel.in * positions,
                                    kernel.out * positions};
    Value *output = nullptr;
    OR_RETURN(api.output(context, 0, dims, 4, &output));
    OR_RETURN(api.data(output, &call.image.y));
    call.image.x = x.data;
    call.image.x_stride = call.image.y_stride = positions;
    status = sparsify_pointwise(SPARSIFY_F32, &call);
    return nullptr;
}

Status *convolve(const Kernel &kernel, const Tensor &x, KernelContext *context, int &status) {
    const Api &api = kernel.api;
    const int64_t *k = kernel.kernel, channels = kernel.in / (k[0] * k[1]);
    if (x.n_dims != 4 || x.dims[1] != channels)
        return api.status(INVALID_ARGUMENT, "sparsify: the input must be images with the channels of the layer");
    int64_t dims[4] = {x.dims[0], kernel.out, 0, 0};
    for (int i = 0; i < 2; ++i) {
        const int64_t free = x.dims[2 + i] + 2 * k[4 + i] - k[6 + i] * (k[i] - 1) - 1;
        if (free < 0) return api.status(INVALID_ARGUMENT, "sparsify: an image is smaller than the layer's kernel");
        dims[2 + i] = free / k[2 + i] + 1;
    }
    sparsify_convolution_call call = {};
    call.index = kernel.index, call.values = kernel.values, call.scale = kernel.scale, call.bias = kernel.bias;
    call.x = x.data;
    call.x_column_stride = 1, call.x_row_stride = x.dims[3];
    call.x_channel_stride = x.dims[2] * x.dims[3], call.x_image_stride = channels * call.x_channel_stride;
    call.n_images = x.dims[0], call.channels = channels, call.height = x.dims[2], call.width = x.dims[3];
    call.out = kernel.out, call.out_height = dims[2], call.out_width = dims[3];
    call.kernel_height = k[0], call.kernel_width = k[1], call.stride_height = k[2], call.stride_width = k[3];
    call.top = k[4], call.left = k[5], call.dilation_height = k[6], call.dilation_width = k[7];
    call.activation = kernel.activation;
    call.n_threads = n_processors();
    Value *output = nullptr;
    OR_RETURN(api.output(context, 0, dims, 4, &output));
    OR_RETURN(api.data(output, &call.y));
    status = sparsify_convolution(SPARSIFY_F32, &call);
    return nullptr;
}

// The threads of a session, lent to one call.
struct Session {
    const Api &api;
    const KernelContext *context;
    Status *failed = nullptr;

    static void run(void *self, size_t n, void (*body)(void *, size_t), void *argument) {
        auto &session = *static_cast<Session *>(self);
        session.failed = session.api.parallel_for(session.context, body, n, 0, argument);
    }
};

Status *compute(void *of, KernelContext *context) {
    const Kernel &kernel = *static_cast<const Kernel *>(of);
    const Value *value = nullptr;
    Tensor x;
    OR_RETURN(kernel.api.input(context, 0, &value));
    OR_RETURN(read(kernel.api, value, x));
    Session session = {kernel.api, context};
    const Lender threads = {Session::run, &session};
    int status = SPARSIFY_OK;
    {
        const Lending lending(threads);
        auto *const run = kernel.kind == POINTWISE     ? multiply_positions
                          : kernel.kind == CONVOLUTION ? convolve
                                                       : multiply;
        OR_RETURN(run(kernel, x, context, status));
    }
    if (session.failed) return session.failed;
    return status ? kernel.api.status(FAIL, sparsify_status_text(status)) : nullptr;
}

const Described &described(const Operator *op) { return *static_cast<const Described *>(op); }

Described describe(const char *name, Kind kind, size_t n_inputs, size_t scale, size_t bias) {
    Described op = {};
    op.own_name = name, op.kind = kind, op.n_given = n_inputs, op.scale = scale, op.bias = bias;
    op.Operator::version = VERSION;
    op.name = [](const Operator *self) { return described(self).own_name; };
    op.execution_provider = [](const Operator *) -> const char * { return nullptr; };
    op.input_type = [](const Operator *self, size_t i) -> int {
        return i == 1 ? UINT8 : i == 2 && described(self).kind == LINEAR_INT8 ? INT8 : FLOAT;
    };
    op.n_inputs = [](const Operator *self) { return described(self).n_given; };
    op.output_type = [](const Operator *, size_t) -> int { return FLOAT; };
    op.n_outputs = [](const Operator *) -> size_t { return 1; };
    op.destroy = [](void *kernel) { free(kernel); };
    op.input_presence = [](const Operator *self, size_t i) -> int {
        const bool has_to_be = i < 3 || (described(self).kind == LINEAR_INT8 && i == 3);
        return has_to_be ? REQUIRED : OPTIONAL;
    };
    op.output_presence = [](const Operator *, size_t) -> int { return REQUIRED; };
    op.input_memory = [](const Operator *, size_t) { return 0; };
    op.variadic_input_least = op.variadic_output_least = [](const Operator *) { return 0; };
    op.variadic_input_same = op.variadic_output_same = [](const Operator *) { return 0; };
    op.create_kernel_or_status = create;
    op.compute_or_status = compute;
    op.first_version = [](const Operator *) { return 1; };
    op.last_version = [](const Operator *) { return 0x7fffffff; };
    return op;
}

}  // namespace
}  // namespace sparsify::onnxruntime

using namespace sparsify::onnxruntime;

extern "C" void *RegisterCustomOps(void *options, const void *api_base) {
    static const Described operators[] = {
        describe("Linear", LINEAR, 4, 0, 3),
        describe("LinearInt8", LINEAR_INT8, 5, 3, 4),
        describe("Pointwise", POINTWISE, 4, 0, 3),
        describe("Convolution", CONVOLUTION, 5, 3, 4),
    };
    const void *table = static_cast<const ApiBase *>(api_base)->get_api(VERSION);
    if (!table) {  // an ONNX Runtime before 1.17: every version has the function that makes a status
        const void *oldest = static_cast<const ApiBase *>(api_base)->get_api(1);
        return oldest ? Api(oldest).status(FAIL, "sparsify: its operators need ONNX Runtime 1.17 or newer") : nullptr;
    }
    const Api api(table);
    Domain *domain = nullptr;  // it must outlive every session with these options, and no one tells when those end
    OR_RETURN(api.create_domain("sparsify", &domain));
    for (const Described &op : operators) OR_RETURN(api.add_operator(domain, &op));
    return api.add_domain(static_cast<SessionOptions *>(options), domain);
}
