// The part of torch's stable C interface that operators need, found at run time in the libtorch of the process: this
// library neither needs torch's headers nor depends on torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>

namespace sparsify::torch {

using Stack = uint64_t;  // StableIValue: a number, a handle, or a pointer to another one
using Error = int32_t;   // 0 is success
struct TensorHandle;     // AtenTensorHandle
struct LibraryHandle;    // TorchLibraryHandle
using Boxed = void (*)(Stack *stack, uint64_t n_inputs, uint64_t n_outputs);

// Functions of the names "aoti_torch_" and the member's, unless library.cpp has another.
struct Torch {
    Error (*make_fragment)(const char *name, const char *file, uint32_t line, LibraryHandle **made);
    Error (*make_implementation)(const char *name, const char *key, const char *file, uint32_t line,
                                 LibraryHandle **made);
    Error (*define)(LibraryHandle *, const char *schema);
    Error (*implement)(LibraryHandle *, const char *name, Boxed function);
    Error (*get_data_ptr)(TensorHandle *, void **data);
    Error (*get_dim)(TensorHandle *, int64_t *n);
    Error (*get_sizes)(TensorHandle *, int64_t **sizes);
    Error (*get_strides)(TensorHandle *, int64_t **strides);
    Error (*get_numel)(TensorHandle *, int64_t *n);
    Error (*get_dtype)(TensorHandle *, int32_t *dtype);
    Error (*get_device_type)(TensorHandle *, int32_t *device);
    Error (*empty_strided)(int64_t n_dims, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,
                           int32_t device_index, TensorHandle **made);
    Error (*copy_)(TensorHandle *to, TensorHandle *from, int32_t non_blocking);
    Error (*delete_tensor_object)(TensorHandle *);
    int32_t (*dtype_float32)();
    int32_t (*dtype_bfloat16)();
    int32_t (*dtype_float16)();
    int32_t (*dtype_int8)();
    int32_t (*dtype_uint8)();
    int32_t (*device_type_cpu)();
    Error (*get_num_threads)(uint32_t *n);          // from torch 2.10 on
    Error (*delete_stable_ivalue)(Stack *pointer);  // null before torch 2.13
};

// The functions of the loaded libtorch; null if none is loaded, or if it lacks one of them.
const Torch *find_torch();

// The reason for which an operator cannot run, thrown through torch to the caller.
class Failure : public std::exception {
public:
    explicit Failure(const char *format, ...) __attribute__((format(printf, 2, 3)));
    const char *what() const noexcept override { return message_; }

private:
    char message_[240];
};

}  // namespace sparsify::torch
