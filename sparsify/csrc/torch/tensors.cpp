#include "torch/tensors.h"

namespace sparsify::torch {

void check(Error error, const char *what) {
    if (error) throw Failure("sparsify: torch could not %s", what);
}

Tensor::Tensor(const Torch &torch, TensorHandle *handle) { take(torch, handle); }

Tensor::~Tensor() {
    if (handle_) torch_->delete_tensor_object(handle_);
}

void Tensor::take(const Torch &torch, TensorHandle *handle) {
    if (handle_) torch_->delete_tensor_object(handle_);
    torch_ = &torch;
    handle_ = handle;
    int32_t device = -1;
    int64_t *its_sizes = nullptr, *its_strides = nullptr;
    check(torch.get_device_type(handle, &device) || torch.get_dim(handle, &n_dims) || torch.get_numel(handle, &n) ||
              torch.get_sizes(handle, &its_sizes) || torch.get_strides(handle, &its_strides) ||
              torch.get_dtype(handle, &dtype) || torch.get_data_ptr(handle, &data),
          "describe a tensor");
    sizes = its_sizes, strides = its_strides;
    if (device != torch.device_type_cpu()) throw Failure("sparsify: a layer packed for the CPU has a tensor elsewhere");
}

TensorHandle *Tensor::give() {
    TensorHandle *given = handle_;
    handle_ = nullptr;
    return given;
}

bool Tensor::is_contiguous() const {
    int64_t wanted = 1;
    for (int64_t i = n_dims - 1; i >= 0; --i) {
        if (sizes[i] != 1 && strides[i] != wanted) return n == 0;
        wanted *= sizes[i];
    }
    return true;
}

void Tensor::make_contiguous() {
    if (!handle_ || is_contiguous()) return;
    Tensor copy;
    copy.make(*torch_, n_dims, sizes, nullptr, dtype);
    check(torch_->copy_(copy.handle_, handle_, 0), "copy a tensor");
    take(*torch_, copy.give());
}

void Tensor::make(const Torch &torch, int64_t n, const int64_t *of, const int64_t *by, int32_t type) {
    constexpr int64_t MOST_DIMS = 64;
    int64_t rows[MOST_DIMS], wanted = 1;
    if (n > MOST_DIMS) throw Failure("sparsify: an input has more than 64 dimensions");
    for (int64_t i = n - 1; i >= 0; --i) {
        rows[i] = wanted;
        wanted *= of[i] > 1 ? of[i] : 1;
    }
    TensorHandle *made = nullptr;
    check(torch.empty_strided(n, of, by ? by : rows, type, torch.device_type_cpu(), 0, &made), "make a tensor");
    take(torch, made);
}

void Inputs::tensor(Tensor &to) {
    if (next_ >= n_) throw Failure("sparsify: an operator has another schema than its library");
    to.take(torch_, reinterpret_cast<TensorHandle *>(stack_[next_++]));
}

void Inputs::optional(Tensor &to) {
    if (next_ >= n_) throw Failure("sparsify: an operator has another schema than its library");
    auto *value = reinterpret_cast<Stack *>(stack_[next_++]);
    if (!value) return;
    to.take(torch_, reinterpret_cast<TensorHandle *>(*value));
    if (torch_.delete_stable_ivalue)
        torch_.delete_stable_ivalue(value);
    else
        delete value;
}

int64_t Inputs::number() {
    if (next_ >= n_) throw Failure("sparsify: an operator has another schema than its library");
    return int64_t(stack_[next_++]);
}

}  // namespace sparsify::torch
