// The kernels of images: convolutions with what follows them, pointwise and depthwise ones.
#include "compare.h"

namespace {

struct Image {
    int64_t n, channels, height, width, out, kernel, stride, padding, dilation;
};
const Image IMAGES[] = {{1, 1, 1, 1, 1, 1, 1, 0, 1},    {2, 3, 7, 9, 5, 3, 1, 1, 1},  {1, 17, 12, 13, 33, 3, 2, 1, 1},
                        {1, 5, 20, 31, 70, 5, 1, 2, 1}, {3, 8, 9, 9, 16, 3, 1, 2, 2}, {1, 40, 14, 14, 24, 1, 2, 0, 1}};
// For depthwise: every kernel with a path of its own, and one without.
const Image DEPTHWISE[] = {{1, 1, 1, 1, 1, 1, 1, 0, 1},    {2, 70, 15, 9, 0, 3, 1, 1, 1},
                           {1, 17, 12, 13, 0, 3, 2, 1, 1}, {1, 5, 20, 31, 0, 5, 1, 2, 1},
                           {3, 16, 9, 9, 0, 5, 2, 2, 1},   {1, 33, 14, 14, 0, 7, 1, 3, 1},
                           {1, 20, 11, 16, 0, 3, 1, 2, 2}, {1, 8, 6, 6, 0, 2, 3, 1, 1}};

// What follows the sums of a convolution.
enum class Ending { BIAS, SCALE, NORM, RESIDUAL, SCALE_AND_RESIDUAL, NORM_AND_RESIDUAL };
bool scales(Ending ending) { return ending == Ending::SCALE || ending == Ending::SCALE_AND_RESIDUAL; }
bool normalizes(Ending ending) { return ending == Ending::NORM || ending == Ending::NORM_AND_RESIDUAL; }
bool adds(Ending ending) { return ending >= Ending::RESIDUAL; }

// Numbers of each output, and of each number of y: as in a trained layer, scales from 0.5 to 1.5.
struct Endings {
    Guarded bias, scale, mean, variance, residual;
    template <typename T>
    static Endings random(int64_t out, size_t outputs) {
        const size_t n = static_cast<size_t>(out);
        Endings made{random_values<T>(n, 6), random_values<float>(n, 7), random_values<float>(n, 8),
                     random_values<float>(n, 9), random_values<T>(outputs, 10)};
        for (size_t i = 0; i < n; ++i) made.scale.data<float>()[i] = 1 + made.scale.data<float>()[i] / 2;
        for (size_t i = 0; i < n; ++i) made.variance.data<float>()[i] = 1 + made.variance.data<float>()[i] / 2;
        return made;
    }
};

int64_t reach_of(const Image &image) { return image.dilation * (image.kernel - 1) + 1; }
int64_t height_of(const Image &image) {
    return (image.height + 2 * image.padding - reach_of(image)) / image.stride + 1;
}
int64_t width_of(const Image &image) { return (image.width + 2 * image.padding - reach_of(image)) / image.stride + 1; }
size_t outputs_of(const Image &image) { return size_t(image.n * image.out * height_of(image) * width_of(image)); }

// The call of a convolution of images x, without its weight.
template <typename T>
sparsify_convolution_call image_call(const Image &image, const Guarded &x, const Guarded &y, const Endings &with,
                                     Ending ending, int64_t activation, bool last, int64_t n_threads) {
    sparsify_convolution_call call{};
    call.bias = with.bias.data();
    if (scales(ending)) call.scale = with.scale.data<float>();
    if (normalizes(ending)) {
        call.norm_mean = with.mean.data<float>(), call.norm_variance = with.variance.data<float>();
        call.norm_weight = with.scale.data<float>(), call.norm_bias = with.mean.data<float>();
        call.norm_eps = 1e-5;
    }
    if (adds(ending)) call.residual = with.residual.data();
    call.activation = activation;
    call.x = x.data();
    const int64_t plane = image.height * image.width;
    call.x_image_stride = image.channels * plane;
    call.x_channel_stride = last ? 1 : plane;
    call.x_row_stride = last ? image.width * image.channels : image.width;
    call.x_column_stride = last ? image.channels : 1;
    call.y = y.data();
    call.y_channels_last = last;
    call.n_images = image.n, call.channels = image.channels, call.height = image.height, call.width = image.width;
    call.out = image.out, call.out_height = height_of(image), call.out_width = width_of(image);
    call.kernel_height = call.kernel_width = image.kernel;
    call.stride_height = call.stride_width = image.stride;
    call.top = call.left = image.padding;
    call.dilation_height = call.dilation_width = image.dilation;
    call.n_threads = n_threads;
    return call;
}

template <typename T>
Guarded convolution(const Image &image, const Packed<T> &packed, const Guarded &x, const Endings &with, Ending ending,
                    int64_t activation, bool last, int64_t n_threads) {
    Guarded y(outputs_of(image) * sizeof(T));
    sparsify_convolution_call call = image_call<T>(image, x, y, with, ending, activation, last, n_threads);
    call.index = packed.index.data();
    call.values = packed.values.data();
    if (sparsify_convolution(DTYPE<T>, &call)) abort();
    return y;
}

template <typename T>
Guarded depthwise(const Image &image, const Guarded &kernels, const Guarded &x, const Endings &with, Ending ending,
                  int64_t activation, bool last, int64_t n_threads) {
    Guarded y(outputs_of(image) * sizeof(T));
    sparsify_convolution_call call = image_call<T>(image, x, y, with, ending, activation, last, n_threads);
    call.values = kernels.data();
    if (sparsify_depthwise(DTYPE<T>, &call)) abort();
    return y;
}

template <typename T>
Guarded pointwise(const Image &image, const Packed<T> &packed, const Guarded &x, const Guarded &bias) {
    const int64_t plane = image.height * image.width;
    Guarded y(size_t(image.n * image.out * plane) * sizeof(T));
    sparsify_pointwise_call call{};
    call.image = {packed.index.data(), packed.values.data(), bias.data(),   x.data(), plane, y.data(), plane, plane,
                  image.out,           image.channels,       SPARSIFY_NONE, 2,        0,     image.out};
    call.n_images = image.n;
    call.x_image_stride = image.channels * plane;
    call.y_image_stride = image.out * plane;
    if (sparsify_pointwise(DTYPE<T>, &call)) abort();
    return y;
}

// What each ending makes of the plain sums, in double: all kernels could have the same mistake.
void check_endings(const Image &image, const Csr &csr, const Guarded &x, const Endings &with, const char *tested) {
    const Packed<float> packed = pack<float>(FORMS[0], csr, 7);
    const Guarded plain = convolution<float>(image, packed, x, with, Ending::BIAS, SPARSIFY_NONE, false, 2);
    const double magnitude = 2.2 * double(csr.in) + 4;  // scales are at most 1.5 / sqrt(0.5)
    for (int i = 1; i <= int(Ending::NORM_AND_RESIDUAL); ++i) {
        const Ending ending = Ending(i);
        const Guarded found = convolution<float>(image, packed, x, with, ending, SPARSIFY_RELU, false, 2);
        const size_t n = outputs_of(image), plane = size_t(height_of(image) * width_of(image));
        for (size_t at = 0; at < n; ++at) {
            const size_t o = at / plane % size_t(image.out);
            const double bias = with.bias.data<float>()[o], scale = with.scale.data<float>()[o];
            const double mean = with.mean.data<float>()[o], spread = sqrt(with.variance.data<float>()[o] + 1e-5);
            double wanted = plain.data<float>()[at];
            if (scales(ending)) wanted = (wanted - bias) * scale + bias;
            if (normalizes(ending)) wanted = (wanted - mean) / spread * scale + mean;
            if (adds(ending)) wanted += with.residual.data<float>()[at];
            wanted = wanted > 0 ? wanted : 0;
            const double error = found.data<float>()[at] - wanted;
            demand(fabs(error) <= 2 * allowed_error<float>(wanted, magnitude, csr.in + 6), tested, "ending", error);
        }
    }
}

template <typename T>
void compare_image(const Image &image, double sparsity, const char *tested, bool exactly) {
    const int64_t in = image.channels * image.kernel * image.kernel;
    Random random{uint64_t(in)};
    const Csr csr = random_csr(image.out, in, sparsity, random);
    const Guarded x = random_values<T>(size_t(image.n * image.channels * image.height * image.width), 5);
    const Endings with = Endings::random<T>(image.out, outputs_of(image));
    const double magnitude = 2.2 * double(in) + 4;  // scales are at most 1.5 / sqrt(0.5)
    for (int i = 0; i < 12; ++i) {
        const Ending ending = Ending(i / 2);
        if (normalizes(ending) && sizeof(T) == 2) continue;
        const bool last = i % 2, fused = scales(ending) || normalizes(ending);  // a sum and its scale, or not
        const int64_t activation = i % 3 ? SPARSIFY_NONE : SPARSIFY_RELU;
        sparsify_set_kernel("portable");
        const Packed<T> packed = pack<T>(FORMS[0], csr, 7);
        const Guarded wanted = convolution<T>(image, packed, x, with, ending, activation, last, 1);
        sparsify_set_kernel(tested);
        const Guarded found = convolution<T>(image, pack<T>(FORMS[0], csr, 7), x, with, ending, activation, last, 3);
        compare_arrays<T>(found, wanted, exactly && !fused, magnitude, in + 6, tested, "convolution");
    }
    if constexpr (sizeof(T) == 4) check_endings(image, csr, x, with, tested);
    if (image.kernel > 1) return;
    sparsify_set_kernel("portable");
    const Guarded wanted = pointwise<T>(image, pack<T>(FORMS[0], csr, 7), x, with.bias);
    sparsify_set_kernel(tested);
    const Guarded found = pointwise<T>(image, pack<T>(FORMS[0], csr, 7), x, with.bias);
    compare_arrays<T>(found, wanted, exactly, magnitude, in, tested, "pointwise");
}

// Channels of an image each with a kernel of its own: equal to the portable sums, and to those in double.
template <typename T>
void compare_depthwise(Image image, const char *tested, bool exactly) {
    image.out = image.channels;
    const int64_t taps = image.kernel * image.kernel;
    const Guarded x = random_values<T>(size_t(image.n * image.channels * image.height * image.width), 15);
    const Guarded kernels = random_values<T>(size_t(image.channels * taps), 16);
    const Endings with = Endings::random<T>(image.out, outputs_of(image));
    const double magnitude = 2.2 * double(taps) + 4;
    for (int i = 0; i < 4; ++i) {
        const Ending ending = i / 2 ? Ending::NORM : Ending::BIAS;
        if (normalizes(ending) && sizeof(T) == 2) continue;
        const bool last = i % 2;
        sparsify_set_kernel("portable");
        const Guarded wanted = depthwise<T>(image, kernels, x, with, ending, SPARSIFY_HARDSWISH, last, 1);
        sparsify_set_kernel(tested);
        const Guarded found = depthwise<T>(image, kernels, x, with, ending, SPARSIFY_HARDSWISH, last, 3);
        compare_arrays<T>(found, wanted, false, magnitude, taps + 6, tested, "depthwise, hardswish");
        const Guarded plain = depthwise<T>(image, kernels, x, with, Ending::BIAS, SPARSIFY_NONE, last, 2);
        sparsify_set_kernel("portable");
        const Guarded sums = depthwise<T>(image, kernels, x, with, Ending::BIAS, SPARSIFY_NONE, last, 1);
        compare_arrays<T>(plain, sums, exactly, magnitude, taps, tested, "depthwise");
    }
    const Guarded found = depthwise<T>(image, kernels, x, with, Ending::BIAS, SPARSIFY_NONE, false, 1);
    const T *value = found.data<T>();
    for (int64_t plane = 0; plane < image.n * image.channels; ++plane) {
        const int64_t channel = plane % image.channels;
        for (int64_t row = 0; row < height_of(image); ++row)
            for (int64_t column = 0; column < width_of(image); ++column, ++value) {
                double sum = to_float(with.bias.data<T>()[channel]);
                for (int64_t tap = 0; tap < taps; ++tap) {
                    const int64_t i = row * image.stride - image.padding + tap / image.kernel * image.dilation;
                    const int64_t j = column * image.stride - image.padding + tap % image.kernel * image.dilation;
                    if (i < 0 || i >= image.height || j < 0 || j >= image.width) continue;
                    sum += double(to_float(kernels.data<T>()[channel * taps + tap])) *
                           to_float(x.data<T>()[(plane * image.height + i) * image.width + j]);
                }
                const double error = to_float(*value) - sum;
                demand(fabs(error) <= 2 * allowed_error<T>(sum, magnitude, taps), tested, "depthwise sum", error);
            }
    }
}

}  // namespace

void compare_images(const char *tested, bool exactly, std::map<std::string, int> &n_compared) {
    for (const Image &image : IMAGES)
        for (const double sparsity : {0.0, 0.7, 0.95}) {
            compare_image<float>(image, sparsity, tested, exactly);
            compare_image<BFloat16>(image, sparsity, tested, exactly);
            compare_image<Float16>(image, sparsity, tested, exactly);
            n_compared[std::string("images") + (exactly ? ", bit for bit" : ", within the bound")] += 12 + 8 + 8;
        }
    for (const Image &image : DEPTHWISE) {
        compare_depthwise<float>(image, tested, exactly);
        compare_depthwise<BFloat16>(image, tested, exactly);
        compare_depthwise<Float16>(image, tested, exactly);
        n_compared[std::string("depthwise") + (exactly ? ", bit for bit" : ", within the bound")] += 4 + 2 + 2;
    }
}
