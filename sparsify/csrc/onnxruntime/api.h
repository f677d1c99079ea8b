// The part of ONNX Runtime's C interface that custom operators need, declared here: its header comes with no package
// for Python. OrtApi is a table of functions to which newer versions only add at the end, and OrtCustomOp says by
// `version` how many of its members there are, so that both hold for every ONNX Runtime from 1.17 on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify::onnxruntime {

constexpr uint32_t VERSION = 17;

// Types of ONNX Runtime, known by their address alone.
struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;

enum ElementType { ANY = 0, FLOAT = 1, UINT8 = 2, INT8 = 3 };
enum ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Presence { REQUIRED = 0, OPTIONAL = 1 };

// OrtApi, by the places of its functions.
class Api {
public:
    explicit Api(const void *table) : functions_(static_cast<void *const *>(table)) {}

    Status *status(ErrorCode code, const char *message) const {
        return call<0, Status *, int, const char *>(code, message);
    }
    Status *create_domain(const char *name, Domain **domain) const {
        return call<26, Status *, const char *, Domain **>(name, domain);
    }
    Status *add_operator(Domain *domain, const struct Operator *op) const {
        return call<27, Status *, Domain *, const Operator *>(domain, op);
    }
    Status *add_domain(SessionOptions *options, Domain *domain) const {
        return call<28, Status *, SessionOptions *, Domain *>(options, domain);
    }
    Status *data(const Value *value, void **data) const {
        return call<51, Status *, const Value *, void **>(value, data);
    }
    Status *element_type(const ShapeInfo *info, int *type) const {
        return call<60, Status *, const ShapeInfo *, int *>(info, type);
    }
    Status *n_dims(const ShapeInfo *info, size_t *n) const {
        return call<61, Status *, const ShapeInfo *, size_t *>(info, n);
    }
    Status *dims(const ShapeInfo *info, int64_t *dims, size_t n) const {
        return call<62, Status *, const ShapeInfo *, int64_t *, size_t>(info, dims, n);
    }
    Status *shape_info(const Value *value, ShapeInfo **info) const {
        return call<65, Status *, const Value *, ShapeInfo **>(value, info);
    }
    Status *attribute(const KernelInfo *info, const char *name, int64_t *number) const {
        return call<86, Status *, const KernelInfo *, const char *, int64_t *>(info, name, number);
    }
    Status *input(const KernelContext *context, size_t i, const Value **value) const {
        return call<90, Status *, const KernelContext *, size_t, const Value **>(context, i, value);
    }
    Status *output(KernelContext *context, size_t i, const int64_t *dims, size_t n, Value **value) const {
        return call<91, Status *, KernelContext *, size_t, const int64_t *, size_t, Value **>(context, i, dims, n,
                                                                                              value);
    }
    void release(Status *status) const { call<93, void, Status *>(status); }
    void release(ShapeInfo *info) const { call<99, void, ShapeInfo *>(info); }
    Status *attributes(const KernelInfo *info, const char *name, int64_t *numbers, size_t *n) const {
        return call<163, Status *, const KernelInfo *, const char *, int64_t *, size_t *>(info, name, numbers, n);
    }
    Status *n_inputs(const KernelInfo *info, size_t *n) const {
        return call<230, Status *, const KernelInfo *, size_t *>(info, n);
    }
    Status *constant_input(const KernelInfo *info, size_t i, int *is_constant, const Value **value) const {
        return call<249, Status *, const KernelInfo *, size_t, int *, const Value **>(info, i, is_constant, value);
    }
    Status *parallel_for(const KernelContext *context, void (*body)(void *, size_t), size_t n, size_t n_batches,
                         void *argument) const {
        return call<274, Status *, const KernelContext *, void (*)(void *, size_t), size_t, size_t, void *>(
            context, body, n, n_batches, argument);
    }

private:
    template <int PLACE, typename Result, typename... Arguments>
    Result call(Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(functions_[PLACE])(arguments...);
    }

    void *const *functions_;
};

// OrtApiBase.
struct ApiBase {
    const void *(*get_api)(uint32_t version);
    const char *(*version)();
};

// OrtCustomOp of version 17. The members in brackets of a name there are null or unused here.
struct Operator {
    uint32_t version;
    void *(*create_kernel)(const Operator *, const void *api, const KernelInfo *);
    const char *(*name)(const Operator *);
    const char *(*execution_provider)(const Operator *);
    int (*input_type)(const Operator *, size_t);
    size_t (*n_inputs)(const Operator *);
    int (*output_type)(const Operator *, size_t);
    size_t (*n_outputs)(const Operator *);
    void (*compute)(void *kernel, KernelContext *);
    void (*destroy)(void *kernel);
    int (*input_presence)(const Operator *, size_t);
    int (*output_presence)(const Operator *, size_t);
    int (*input_memory)(const Operator *, size_t);
    int (*variadic_input_least)(const Operator *);
    int (*variadic_input_same)(const Operator *);
    int (*variadic_output_least)(const Operator *);
    int (*variadic_output_same)(const Operator *);
    Status *(*create_kernel_or_status)(const Operator *, const void *api, const KernelInfo *, void **kernel);
    Status *(*compute_or_status)(void *kernel, KernelContext *);
    Status *(*infer_shapes)(const Operator *, void *context);
    int (*first_version)(const Operator *);
    int (*last_version)(const Operator *);
};

}  // namespace sparsify::onnxruntime
