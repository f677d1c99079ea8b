#include "torch/library.h"

#include <stdarg.h>
#include <stdio.h>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace sparsify::torch {
namespace {

#ifdef _WIN32
void *libtorch() { return nullptr; }
void *find(void *, const char *) { return nullptr; }
#else
// The library that this process has already; it is never loaded here.
void *libtorch() {
#ifdef __APPLE__
    return dlopen("libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
#else
    return dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
}
void *find(void *in, const char *name) { return dlsym(in, name); }
#endif

template <typename Function>
bool set(void *in, const char *name, Function &function) {
    function = reinterpret_cast<Function>(find(in, name));
    return function != nullptr;
}

bool fill(Torch &torch) {
    void *in = libtorch();
    if (!in) return false;
    set(in, "torch_delete_stable_ivalue", torch.delete_stable_ivalue);
    return set(in, "aoti_torch_library_init_fragment", torch.make_fragment) &&
           set(in, "aoti_torch_library_init_impl", torch.make_implementation) &&
           set(in, "aoti_torch_library_def", torch.define) && set(in, "aoti_torch_library_impl", torch.implement) &&
           set(in, "aoti_torch_get_data_ptr", torch.get_data_ptr) && set(in, "aoti_torch_get_dim", torch.get_dim) &&
           set(in, "aoti_torch_get_sizes", torch.get_sizes) && set(in, "aoti_torch_get_strides", torch.get_strides) &&
           set(in, "aoti_torch_get_numel", torch.get_numel) && set(in, "aoti_torch_get_dtype", torch.get_dtype) &&
           set(in, "aoti_torch_get_device_type", torch.get_device_type) &&
           set(in, "aoti_torch_empty_strided", torch.empty_strided) && set(in, "aoti_torch_copy_", torch.copy_) &&
           set(in, "aoti_torch_delete_tensor_object", torch.delete_tensor_object) &&
           set(in, "aoti_torch_dtype_float32", torch.dtype_float32) &&
           set(in, "aoti_torch_dtype_bfloat16", torch.dtype_bfloat16) &&
           set(in, "aoti_torch_dtype_float16", torch.dtype_float16) &&
           set(in, "aoti_torch_dtype_int8", torch.dtype_int8) && set(in, "aoti_torch_dtype_uint8", torch.dtype_uint8) &&
           set(in, "aoti_torch_device_type_cpu", torch.device_type_cpu) &&
           set(in, "torch_get_num_threads", torch.get_num_threads);
}

}  // namespace

const Torch *find_torch() {
    static Torch torch;
    static bool found = false;
    if (!found) found = fill(torch);  // twice by two threads is as good as once
    return found ? &torch : nullptr;
}

Failure::Failure(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message_, sizeof message_, format, arguments);
    va_end(arguments);
}

}  // namespace sparsify::torch
