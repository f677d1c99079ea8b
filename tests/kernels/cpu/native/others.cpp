// The kernels of kernels.cpp and images.cpp left out: gradients, masks, factors, roofs, two layers in one call.
#include "compare.h"

namespace {

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

// The call of a layer from x to y, with all of its rows.
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

struct MlpCase {
    int64_t in, between, out, tokens;
    double sparsity;
};

// One call for two layers gives what two calls give.
template <typename T, typename W>
void compare_mlp(const MlpCase &of, int form, const char *tested) {
    const auto [in, between, out, tokens, sparsity] = of;
    Random random{3};
    const Csr first = random_csr(between, in, sparsity, random), second = random_csr(out, between, sparsity, random);
    const Packed<W> of_first = pack<W>(FORMS[form], first, 5), of_second = pack<W>(FORMS[form], second, 6);
    const Guarded x = random_values<T>(size_t(tokens * in), 1), bias = random_values<T>(size_t(between), 2),
                  other = random_values<T>(size_t(out), 3), scale = random_values<float>(size_t(between), 4),
                  other_scale = random_values<float>(size_t(out), 5);
    for (const Guarded *of : {&scale, &other_scale})  // as of weights of about 1: float16 ends at 65504
        for (size_t i = 0; i < of->size() / sizeof(float); ++i) of->data<float>()[i] /= 127;
    Guarded passed(size_t(tokens * between) * sizeof(T)), wanted(size_t(tokens * out) * sizeof(T)),
        found(size_t(tokens * out) * sizeof(T));
    sparsify_int8_call a = {layer_call(first, of_first, bias, x.data<T>(), passed.data<T>(), tokens, SPARSIFY_GELU_ERF),
                            scale.data<float>()};
    sparsify_int8_call b = {
        layer_call(second, of_second, other, passed.data<T>(), wanted.data<T>(), tokens, SPARSIFY_SILU),
        other_scale.data<float>()};
    const bool int8 = sizeof(W) == 1;
    for (const sparsify_int8_call *call : {&a, &b})
        if (int8 ? sparsify_linear_int8(form, DTYPE<T>, call) : sparsify_linear(form, DTYPE<T>, &call->linear)) abort();
    sparsify_mlp_call both = {a.linear, b.linear, int8 ? a.scale : nullptr, int8 ? b.scale : nullptr};
    both.first.y = nullptr, both.second.x = nullptr, both.second.y = found.data<T>();
    if (sparsify_mlp(form, DTYPE<T>, &both)) abort();
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
            const MlpCase of = {sizes[i][0], sizes[i][1], sizes[i][2], tokens[i], sparsity};
            compare_mlp<float, float>(of, SPARSIFY_PANEL, tested);
            compare_mlp<BFloat16, BFloat16>(of, SPARSIFY_PANEL, tested);
            compare_mlp<Float16, Float16>(of, SPARSIFY_PANEL, tested);
            for (const int form : {SPARSIFY_PANEL, SPARSIFY_QUADS, SPARSIFY_QUADMASK, SPARSIFY_QUADSTEPS}) {
                compare_mlp<float, int8_t>(of, form, tested);
                compare_mlp<BFloat16, int8_t>(of, form, tested);
                compare_mlp<Float16, int8_t>(of, form, tested);
            }
            n_compared["two layers in one call"] += 15;
        }
}

}  // namespace

void compare_the_rest(const char *tested, bool exactly, std::map<std::string, int> &n_compared) {
    compare_gradients(tested, exactly);
    n_compared[std::string("gradients") + (exactly ? ", bit for bit" : ", within the bound")] += 4;
    compare_mlps(tested, n_compared);
    check_masks<uint16_t>(tested);
    check_masks<uint32_t>(tested);
    check_masks<uint64_t>(tested);
    for (const int64_t size : {1, 5, 16, 33, 70}) check_factor(tested, size);
    demand(sparsify_measure_fma_gflops(0.01, 2) > 0, tested, "multiply-adds a second", 0);
    demand(sparsify_measure_read_gbs(0.01, 2, 1 << 20) > 0, tested, "bytes a second", 0);
    n_compared["masks, factors, roofs"] += 3 + 5 + 2;
}
