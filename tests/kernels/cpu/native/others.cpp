// The kernels of kernels.cpp that are no linear layers: images, gradients, masks, factors, roofs.
#include <stdio.h>

#include <map>
#include <string>

#include "cases.h"

namespace {

void demand(bool holds, const char *tested, const char *what, double number) {
    if (holds) return;
    printf("%s: %s: %.9g\n", tested, what, number);
    exit(1);
}

template <typename T>
Guarded random_values(size_t n, uint64_t seed) {
    Random random{seed};
    Guarded made(n * sizeof(T));
    for (size_t i = 0; i < n; ++i) made.data<T>()[i] = from_float<T>(random.around_zero());
    return made;
}

template <typename T>
void compare_arrays(const Guarded &found, const Guarded &wanted, bool exactly, double magnitude, int64_t n_products,
                    const char *tested, const char *what) {
    for (size_t i = 0; i < wanted.size() / sizeof(T); ++i) {
        const double a = to_float(found.data<T>()[i]), b = to_float(wanted.data<T>()[i]);
        const double unit = sizeof(T) == 2 ? 1.0 / 128 : 0;  // two roundings
        const double allowed = exactly ? 0 : 2 * allowed_error(b, magnitude, n_products, unit);
        demand(std::isfinite(b) && fabs(a - b) <= allowed, tested, what, a - b);
    }
}

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
    if (sparsify_convolution(sizeof(T) == 4 ? SPARSIFY_F32 : SPARSIFY_BF16, &call)) abort();
    return y;
}

template <typename T>
Guarded depthwise(const Image &image, const Guarded &kernels, const Guarded &x, const Endings &with, Ending ending,
                  int64_t activation, bool last, int64_t n_threads) {
    Guarded y(outputs_of(image) * sizeof(T));
    sparsify_convolution_call call = image_call<T>(image, x, y, with, ending, activation, last, n_threads);
    call.values = kernels.data();
    if (sparsify_depthwise(sizeof(T) == 4 ? SPARSIFY_F32 : SPARSIFY_BF16, &call)) abort();
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
    if (sparsify_pointwise(sizeof(T) == 4 ? SPARSIFY_F32 : SPARSIFY_BF16, &call)) abort();
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
            demand(fabs(error) <= 2 * allowed_error(wanted, magnitude, csr.in + 6, 0), tested, "ending", error);
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
                const double error = to_float(*value) - sum, unit = sizeof(T) == 2 ? 1.0 / 256 : 0;
                demand(fabs(error) <= 2 * allowed_error(sum, magnitude, taps, unit), tested, "depthwise sum", error);
            }
    }
}

Guarded gradient(const Csr &csr, int64_t tokens) {
    const Guarded grad = random_values<float>(size_t(tokens * csr.out), 8);
    const Guarded x = random_values<float>(size_t(tokens * csr.in), 9);
    Guarded y(size_t(csr.out * csr.in) * sizeof(float));
    memset(y.data(), 0, y.size());
    Guarded workspace(size_t(SPARSIFY_SDDMM_TOKENS * (csr.in + csr.out)) * sizeof(float));
    sparsify_sddmm_call call{grad.data(), csr.out,          x.data(), csr.in,  csr.crow.data(), csr.col.data(),
                             y.data(),    workspace.data(), tokens,   csr.out, csr.in,          2};
    if (sparsify_sddmm(&call)) abort();
    return y;
}

void compare_gradients(const char *tested, bool exactly) {
    for (const int64_t tokens : {1, 3, 40, 300}) {
        Random random{uint64_t(tokens)};
        const Csr csr = random_csr(37, 101, 0.7, random);
        sparsify_set_kernel("portable");
        const Guarded wanted = gradient(csr, tokens);
        sparsify_set_kernel(tested);
        compare_arrays<float>(gradient(csr, tokens), wanted, exactly, double(tokens), tokens, tested, "gradient");
    }
}

template <typename Word>
void check_masks(const char *tested) {
    for (const size_t n : {0, 1, 15, 64, 1001, 70001}) {
        Random random{n};
        std::vector<Word> before(n);
        std::vector<uint8_t> mask(n);
        for (size_t i = 0; i < n; ++i) before[i] = Word(random.next()), mask[i] = random.next() % 3 > 0;
        const Guarded values = guarded(before), masks = guarded(mask);
        const int64_t length = int64_t(n);
        bool hides = false;
        for (size_t i = 0; i < n; ++i) hides |= !mask[i] && before[i];
        const int found = sparsify_hides_values(values.data(), masks.data(), length, sizeof(Word), 2);
        demand(found == (hides ? SPARSIFY_FOUND : SPARSIFY_OK), tested, "hides", double(n));
        if (sparsify_clear_masked(values.data(), masks.data(), length, sizeof(Word), 2)) abort();
        for (size_t i = 0; i < n; ++i)
            demand(values.data<Word>()[i] == (mask[i] ? before[i] : Word(0)), tested, "clear", double(i));
        demand(!sparsify_hides_values(values.data(), masks.data(), length, sizeof(Word), 2), tested, "clears", 0);
    }
}

// L L^T is A but for gamma(n + 1) |L| |L|^T (Higham 2002, theorem 10.3).
void check_factor(const char *tested, int64_t size) {
    const int64_t n = size + 1;  // the last row is not read
    Random random{uint64_t(size)};
    std::vector<double> half(size_t(n * n));
    for (double &value : half) value = random.around_zero();
    Guarded matrix(size_t(n * n) * sizeof(float));
    float *const a = matrix.data<float>();
    for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j < size; ++j) {
            double sum = i == j ? 1 : 0;
            for (int64_t k = 0; k < n; ++k) sum += half[size_t(i * n + k)] * half[size_t(j * n + k)];
            a[i * n + j] = float(sum);
        }
    std::vector<int64_t> order(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) order[size_t(i)] = size - 1 - i;
    Guarded lower(size_t(size * size) * sizeof(float));
    sparsify_factor_call call{a, order.data(), lower.data<float>(), n, 1, size, 1};
    if (sparsify_factor_parts(&call)) abort();
    const float *const l = lower.data<float>();
    for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            double sum = 0, magnitudes = 0;
            for (int64_t k = 0; k <= j; ++k) {
                sum += double(l[i * size + k]) * l[j * size + k];
                magnitudes += fabs(double(l[i * size + k]) * l[j * size + k]);
            }
            const double wanted = a[order[size_t(i)] * n + order[size_t(j)]];
            demand(fabs(sum - wanted) <= 4 * double(size + 1) / (1 << 24) * magnitudes, tested, "factor", sum - wanted);
        }
}

// The call of a layer of the form panel from x to y, with all of its rows.
template <typename W>
sparsify_linear_call layer_call(const Csr &csr, const Packed<W> &packed, const Guarded &bias, const void *x, void *y,
                                int64_t tokens, int64_t activation) {
    return {packed.index.template data<uint8_t>(),
            packed.values.template data<W>(),
            bias.data<uint8_t>(),
            x,
            csr.in,
            y,
            csr.out,
            tokens,
            csr.out,
            csr.in,
            activation,
            3,
            0,
            csr.out};
}

// One call for two layers gives what two calls give.
template <typename T, typename W>
void compare_mlp(int64_t in, int64_t between, int64_t out, double sparsity, int64_t tokens, const char *tested) {
    Random random{3};
    const Csr first = random_csr(between, in, sparsity, random), second = random_csr(out, between, sparsity, random);
    const Packed<W> of_first = pack<W>(FORMS[0], first, 5), of_second = pack<W>(FORMS[0], second, 6);
    const Guarded x = random_values<T>(size_t(tokens * in), 1), bias = random_values<T>(size_t(between), 2),
                  other = random_values<T>(size_t(out), 3), scale = random_values<float>(size_t(between), 4),
                  other_scale = random_values<float>(size_t(out), 5);
    Guarded passed(size_t(tokens * between) * sizeof(T)), wanted(size_t(tokens * out) * sizeof(T)),
        found(size_t(tokens * out) * sizeof(T));
    const int dtype = sizeof(T) == 4 ? SPARSIFY_F32 : SPARSIFY_BF16;
    sparsify_int8_call a = {layer_call(first, of_first, bias, x.data<T>(), passed.data<T>(), tokens, SPARSIFY_GELU_ERF),
                            scale.data<float>()};
    sparsify_int8_call b = {
        layer_call(second, of_second, other, passed.data<T>(), wanted.data<T>(), tokens, SPARSIFY_SILU),
        other_scale.data<float>()};
    const bool int8 = sizeof(W) == 1;
    for (const sparsify_int8_call *call : {&a, &b})
        if (int8 ? sparsify_linear_int8(SPARSIFY_PANEL, dtype, call)
                 : sparsify_linear(SPARSIFY_PANEL, dtype, &call->linear))
            abort();
    sparsify_mlp_call both = {a.linear, b.linear, int8 ? a.scale : nullptr, int8 ? b.scale : nullptr};
    both.first.y = nullptr, both.second.x = nullptr, both.second.y = found.data<T>();
    if (sparsify_mlp(dtype, &both)) abort();
    for (int64_t i = 0; i < tokens * out; ++i) {
        const double difference = double(to_float(found.data<T>()[i])) - to_float(wanted.data<T>()[i]);
        demand(difference == 0, tested, "two layers in one call differ from two calls by", difference);
    }
}

void compare_mlps(const char *tested, std::map<std::string, int> &n_compared) {
    const int64_t sizes[][3] = {{0, 3, 5},     {7, 0, 4},      {3, 5, 0},      {1, 1, 1},
                                {96, 384, 96}, {250, 700, 33}, {33, 1300, 129}};
    const int64_t tokens[] = {1, 7, 64, 131, 40, 100, 67};
    for (int i = 0; i < 7; ++i)
        for (const double sparsity : {0.0, 0.5, 0.93}) {
            compare_mlp<float, float>(sizes[i][0], sizes[i][1], sizes[i][2], sparsity, tokens[i], tested);
            compare_mlp<uint16_t, uint16_t>(sizes[i][0], sizes[i][1], sizes[i][2], sparsity, tokens[i], tested);
            compare_mlp<float, int8_t>(sizes[i][0], sizes[i][1], sizes[i][2], sparsity, tokens[i], tested);
            compare_mlp<uint16_t, int8_t>(sizes[i][0], sizes[i][1], sizes[i][2], sparsity, tokens[i], tested);
            n_compared["two layers in one call"] += 4;
        }
}

}  // namespace

void compare_images(const char *tested, bool exactly, std::map<std::string, int> &n_compared) {
    for (const Image &image : IMAGES)
        for (const double sparsity : {0.0, 0.7, 0.95}) {
            compare_image<float>(image, sparsity, tested, exactly);
            compare_image<uint16_t>(image, sparsity, tested, exactly);
            n_compared[std::string("images") + (exactly ? ", bit for bit" : ", within the bound")] += 12 + 8;
        }
    for (const Image &image : DEPTHWISE) {
        compare_depthwise<float>(image, tested, exactly);
        compare_depthwise<uint16_t>(image, tested, exactly);
        n_compared[std::string("depthwise") + (exactly ? ", bit for bit" : ", within the bound")] += 4 + 2;
    }
    compare_gradients(tested, exactly);
    n_compared[std::string("gradients") + (exactly ? ", bit for bit" : ", within the bound")] += 4;
}

void compare_the_rest(const char *tested, std::map<std::string, int> &n_compared) {
    compare_mlps(tested, n_compared);
    check_masks<uint16_t>(tested);
    check_masks<uint32_t>(tested);
    check_masks<uint64_t>(tested);
    for (const int64_t size : {1, 5, 16, 33, 70}) check_factor(tested, size);
    demand(sparsify_measure_fma_gflops(0.01, 2) > 0, tested, "multiply-adds a second", 0);
    demand(sparsify_measure_read_gbs(0.01, 2, 1 << 20) > 0, tested, "bytes a second", 0);
    n_compared["masks, factors, roofs"] += 3 + 5 + 2;
}
