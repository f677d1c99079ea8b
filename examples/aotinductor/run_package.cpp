// Runs a package of AOTInductor with sparse layers, without Python.
//
//     run_package MODEL.pt2 OUTPUT ROUNDS TYPE:SIZES:FILE...
//
// An input is the bytes of a tensor in a file, with its type (f32 or i64) and its sizes: f32:2x64:x.bin. The bytes of
// the first output are written to the file OUTPUT. With ROUNDS above 0 the median time of a run is printed.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "sparsify.h"

namespace {

at::Tensor read(const std::string &argument) {
    std::istringstream parts(argument);
    std::string type, sizes, path;
    std::getline(parts, type, ':'), std::getline(parts, sizes, ':'), std::getline(parts, path);
    std::vector<int64_t> shape;
    std::istringstream numbers(sizes);
    for (std::string size; std::getline(numbers, size, 'x');) shape.push_back(std::stoll(size));
    at::Tensor tensor = at::empty(shape, type == "i64" ? at::kLong : at::kFloat);
    std::ifstream file(path, std::ios::binary);
    file.read(static_cast<char *>(tensor.data_ptr()), std::streamsize(tensor.nbytes()));
    if (!file) throw std::runtime_error(path + ": shorter than the input " + argument);
    return tensor;
}

double run_ms(torch::inductor::AOTIModelPackageLoader &model, const std::vector<at::Tensor> &inputs) {
    const auto start = std::chrono::steady_clock::now();
    model.run(inputs);
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int n_arguments, char **arguments) {
    if (n_arguments < 5) {
        std::fprintf(stderr, "usage: %s MODEL.pt2 OUTPUT ROUNDS TYPE:SIZES:FILE...\n", arguments[0]);
        return 2;
    }
    if (const int status = sparsify_register_torch()) {
        std::fprintf(stderr, "the operators of sparse layers: %s\n", sparsify_status_text(status));
        return 1;
    }
    const c10::NoGradGuard no_grad;
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    const std::vector<at::Tensor> inputs = [&] {
        std::vector<at::Tensor> tensors;
        for (int i = 4; i < n_arguments; ++i) tensors.push_back(read(arguments[i]));
        return tensors;
    }();
    const at::Tensor output = model.run(inputs)[0].contiguous();
    std::ofstream(arguments[2], std::ios::binary)
        .write(static_cast<const char *>(output.data_ptr()), std::streamsize(output.nbytes()));
    std::vector<double> times(std::stoul(arguments[3]));
    for (double &time : times) time = run_ms(model, inputs);
    if (times.empty()) return 0;
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    std::printf("%.3f ms on %d threads\n", times[times.size() / 2], at::get_num_threads());
    return 0;
}
