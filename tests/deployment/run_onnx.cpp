// Runs an ONNX file with our operators from C++, with ONNX Runtime as the Python package has it: without its header.
//
//     run_onnx LIBONNXRUNTIME OUR_LIBRARY MODEL ROWS COLUMNS INPUT OUTPUT
//
// The model has one input x (ROWS, COLUMNS) and one output y, float32; INPUT and OUTPUT hold their bytes.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

namespace {

void *const *api;

template <typename... Arguments>
void call(int place, Arguments... arguments) {
    void *status = reinterpret_cast<void *(*)(Arguments...)>(api[place])(arguments...);
    if (!status) return;
    std::printf("%s\n", reinterpret_cast<const char *(*)(void *)>(api[2])(status));
    std::exit(1);
}

}  // namespace

int main(int, char **arguments) {
    struct Base {
        void *const *(*get_api)(uint32_t);
    };
    void *runtime = dlopen(arguments[1], RTLD_NOW);
    if (!runtime) return std::puts(dlerror()), 1;
    api = reinterpret_cast<const Base *(*)()>(dlsym(runtime, "OrtGetApiBase"))()->get_api(17);
    const int64_t sizes[2] = {std::atoll(arguments[4]), std::atoll(arguments[5])};
    std::vector<float> x(size_t(sizes[0] * sizes[1]));
    std::ifstream(arguments[6], std::ios::binary).read(reinterpret_cast<char *>(x.data()), int64_t(x.size() * 4));

    void *environment, *options, *session, *memory, *input, *output = nullptr, *info, *y;
    call(3, 2, static_cast<const char *>("test"), &environment);                       // CreateEnv
    call(10, &options);                                                                // CreateSessionOptions
    call(24, options, 2);                                                              // SetIntraOpNumThreads
    call(228, options, static_cast<const char *>(arguments[2]));                       // RegisterCustomOpsLibrary_V2
    call(7, environment, static_cast<const char *>(arguments[3]), options, &session);  // CreateSession
    call(69, 0, 0, &memory);                                                           // CreateCpuMemoryInfo
    call(49, memory, static_cast<void *>(x.data()), x.size() * 4, static_cast<const int64_t *>(sizes), size_t(2), 1,
         &input);  // CreateTensorWithDataAsOrtValue
    const char *names[] = {"x", "y"};
    call(9, session, static_cast<void *>(nullptr), names, static_cast<void *const *>(&input), size_t(1), names + 1,
         size_t(1), &output);  // Run
    size_t n = 0;
    call(65, output, &info);  // GetTensorTypeAndShape
    call(64, info, &n);       // GetTensorShapeElementCount
    call(51, output, &y);     // GetTensorMutableData
    std::ofstream(arguments[7], std::ios::binary).write(static_cast<const char *>(y), int64_t(n * 4));
    return 0;
}
