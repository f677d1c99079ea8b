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

template <typename T>
Guarded convolution(const Image &image, const Packed<T> &packed, const Guarded &x, const Guarded &bias, bool last,
                    int64_t n_threads) {
    const int64_t reach = image.dilation * (image.kernel - 1) + 1;
    const int64_t height = (image.height + 2 * image.padding - reach) / image.stride + 1;
    const int64_t width = (image.width + 2 * image.padding - reach) / image.stride + 1;
    Guarded y(size_t(image.n * image.out * height * width) * sizeof(T));
    sparsify_convolution_call call{};
    call.index = packed.index.data();
    call.values = packed.values.data();
    call.bias = bias.data();
    call.x = x.data();
    const int64_t plane = image.height * image.width;
    call.x_image_stride = image.channels * plane;
    call.x_channel_stride = last ? 1 : plane;
    call.x_row_stride = last ? image.width * image.channels : image.width;
    call.x_column_stride = last ? image.channels : 1;
    call.y = y.data();
    call.y_channels_last = last;
    call.n_images = image.n, call.channels = image.channels, call.height = image.height, call.width = image.width;
    call.out = image.out, call.out_height = height, call.out_width = width;
    call.kernel_height = call.kernel_width = image.kernel;
    call.stride_height = call.stride_width = image.stride;
    call.top = call.left = image.padding;
    call.dilation_height = call.dilation_width = image.dilation;
    call.n_threads = n_threads;
    if (sparsify_convolution(sizeof(T) == 4 ? SPARSIFY_F32 : SPARSIFY_BF16, &call)) abort();
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

template <typename T>
void compare_image(const Image &image, double sparsity, const char *tested, bool exactly) {
    const int64_t in = image.channels * image.kernel * image.kernel;
    Random random{uint64_t(in)};
    const Csr csr = random_csr(image.out, in, sparsity, random);
    const Guarded x = random_values<T>(size_t(image.n * image.channels * image.height * image.width), 5);
    const Guarded bias = random_values<T>(size_t(image.out), 6);
    const double magnitude = double(in) + 1;
    for (const bool last : {false, true}) {
        sparsify_set_kernel("portable");
        const Packed<T> packed = pack<T>(FORMS[0], csr, 7);
        const Guarded wanted = convolution<T>(image, packed, x, bias, last, 1);
        sparsify_set_kernel(tested);
        const Guarded found = convolution<T>(image, pack<T>(FORMS[0], csr, 7), x, bias, last, 3);
        compare_arrays<T>(found, wanted, exactly, magnitude, in, tested, "convolution");
    }
    if (image.kernel > 1) return;
    sparsify_set_kernel("portable");
    const Guarded wanted = pointwise<T>(image, pack<T>(FORMS[0], csr, 7), x, bias);
    sparsify_set_kernel(tested);
    const Guarded found = pointwise<T>(image, pack<T>(FORMS[0], csr, 7), x, bias);
    compare_arrays<T>(found, wanted, exactly, magnitude, in, tested, "pointwise");
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

}  // namespace

void compare_images(const char *tested, bool exactly, std::map<std::string, int> &n_compared) {
    for (const Image &image : IMAGES)
        for (const double sparsity : {0.0, 0.7, 0.95}) {
            compare_image<float>(image, sparsity, tested, exactly);
            compare_image<uint16_t>(image, sparsity, tested, exactly);
            n_compared[std::string("images") + (exactly ? ", bit for bit" : ", within the bound")] += 2;
        }
    compare_gradients(tested, exactly);
    n_compared[std::string("gradients") + (exactly ? ", bit for bit" : ", within the bound")] += 4;
}

void compare_the_rest(const char *tested, std::map<std::string, int> &n_compared) {
    check_masks<uint16_t>(tested);
    check_masks<uint32_t>(tested);
    check_masks<uint64_t>(tested);
    for (const int64_t size : {1, 5, 16, 33, 70}) check_factor(tested, size);
    demand(sparsify_measure_fma_gflops(0.01, 2) > 0, tested, "multiply-adds a second", 0);
    demand(sparsify_measure_read_gbs(0.01, 2, 1 << 20) > 0, tested, "bytes a second", 0);
    n_compared["masks, factors, roofs"] += 3 + 5 + 2;
}
