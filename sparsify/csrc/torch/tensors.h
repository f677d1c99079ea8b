// Tensors of torch as operators take and return them.
#pragma once

#include "torch/library.h"

namespace sparsify::torch {

void check(Error error, const char *what);

// A tensor in the hands of an operator: its handle is given back at the end.
class Tensor {
public:
    Tensor() = default;
    Tensor(const Torch &torch, TensorHandle *handle);
    ~Tensor();
    Tensor(const Tensor &) = delete;
    Tensor &operator=(const Tensor &) = delete;

    explicit operator bool() const { return handle_ != nullptr; }
    void take(const Torch &torch, TensorHandle *handle);
    TensorHandle *give();  // the handle, not given back any more

    // Makes the elements lie row after row, in a copy if they do not.
    void make_contiguous();
    bool is_contiguous() const;
    // A new tensor of these sizes whose elements lie by `strides`, or row after row if that is null.
    void make(const Torch &torch, int64_t n_dims, const int64_t *sizes, const int64_t *strides, int32_t dtype);

    void *data = nullptr;
    int64_t n_dims = 0, n = 0;
    const int64_t *sizes = nullptr, *strides = nullptr;  // of the tensor itself
    int32_t dtype = -1;

private:
    const Torch *torch_ = nullptr;
    TensorHandle *handle_ = nullptr;
};

// The inputs of a call, taken off its stack one after the other.
class Inputs {
public:
    Inputs(const Torch &torch, Stack *stack, uint64_t n) : torch_(torch), stack_(stack), n_(n) {}
    void tensor(Tensor &to);
    void optional(Tensor &to);  // stays empty for None
    int64_t number();

private:
    const Torch &torch_;
    Stack *stack_;
    uint64_t n_, next_ = 0;
};

}  // namespace sparsify::torch
