// Every kernel of an instruction set against the portable ones, without torch and Python:
//
//     kernels               prints the kernels and the team that this processor gets
//     kernels NAME [bits]   "only" instead: says whether it is here
//
// Forms that NAME takes from another set of instructions here are left out: the program is run for that one too.
// Over a table of shapes, sparsities, tokens, dtypes, strides and activations, in memory that ends where arrays end.
// Sums of integers are the same bits; sums of floats too with `bits`, where the order of additions is the same and both
// are fused, else they are within the derived bound of the exact sum. Prints how many cases of each kind it compared.
#include <stdio.h>

#include <map>
#include <string>

#include "cases.h"

namespace {

const char *tested;
bool same_roundings;
std::map<std::string, int> n_compared;

const int64_t SHAPES[][2] = {{3, 0},    {1, 1},     {1, 64},   {3, 5},    {16, 31},   {17, 33},  {64, 32},
                             {65, 101}, {131, 257}, {40, 512}, {97, 769}, {300, 130}, {20, 2500}};
const double SPARSITIES[] = {0, 0.5, 0.92, 1};
const int64_t TOKENS[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 67};

[[noreturn]] void fail(const std::string &what, double found, double wanted, double allowed) {
    printf("%s: %s: %.9g, not %.9g by at most %.3g\n", tested, what.c_str(), found, wanted, allowed);
    exit(1);
}

void use(const char *name) {
    if (sparsify_set_kernel(name)) {
        printf("%s is not here; known: %s\n", name, sparsify_known_kernels());
        exit(3);
    }
}

struct Case {
    int64_t out, in;
    double sparsity;
    int64_t tokens, activation, x_gap, y_gap, n_threads, first_row, end_row;
    bool has_bias, special;
    uint64_t seed;
    std::string text(const char *form) const {
        char line[200];
        snprintf(line, sizeof line, "%s %dx%d sparsity %.2f, %d tokens, activation %d, rows %d to %d, seed %d", form,
                 int(out), int(in), sparsity, int(tokens), int(activation), int(first_row), int(end_row), int(seed));
        return line;
    }
};

template <typename T>
struct Inputs {
    Guarded x, bias, scale;
};

template <typename T>
Inputs<T> inputs_of(const Case &c) {
    Random random{c.seed + 1};
    Inputs<T> made{Guarded(size_t(std::max<int64_t>(c.tokens * (c.in + c.x_gap) - c.x_gap, 0)) * sizeof(T)),
                   Guarded(size_t(c.out) * sizeof(T)), Guarded(size_t(c.out) * sizeof(float))};
    T *const x = made.x.template data<T>();
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t k = 0; k < c.in; ++k) x[t * (c.in + c.x_gap) + k] = from_float<T>(random.around_zero());
    if (c.special && c.in > 0) {  // and a token of zeros
        x[(c.tokens - 1) * (c.in + c.x_gap) + c.in / 2] = from_float<T>(INFINITY);
        x[c.in - 1] = from_float<T>(NAN);
        for (int64_t k = 0; k < c.in && c.tokens > 2; ++k) x[c.in + c.x_gap + k] = T(0);
    }
    for (int64_t o = 0; o < c.out; ++o) {
        made.bias.template data<T>()[o] = from_float<T>(random.around_zero());
        made.scale.template data<float>()[o] = 0.01f + 0.01f * float(random.uniform());
    }
    return made;
}

// y of the kernels in use, [tokens][end_row - first_row + y_gap].
template <typename T, typename W>
Guarded run(const Form &form, const Case &c, const Inputs<T> &from, const Packed<W> &packed) {
    const int64_t width = c.end_row - c.first_row + c.y_gap;
    Guarded y(size_t(std::max<int64_t>(c.tokens * width - c.y_gap, 0)) * sizeof(T));
    sparsify_int8_call call{};
    call.linear = {packed.index.data(),
                   packed.values.data(),
                   c.has_bias ? from.bias.data() : nullptr,
                   from.x.data(),
                   c.in + c.x_gap,
                   y.data(),
                   width,
                   c.tokens,
                   c.out,
                   c.in,
                   c.activation,
                   c.n_threads,
                   c.first_row,
                   c.end_row};
    call.scale = from.scale.template data<float>();
    const int status = sizeof(W) == 1 ? sparsify_linear_int8(form.number, DTYPE<T>, &call)
                                      : sparsify_linear(form.number, DTYPE<T>, &call.linear);
    if (status) fail(c.text(form.name), status, 0, 0);
    return y;
}

template <typename T>
bool same(T a, T b) {
    const float left = to_float(a), right = to_float(b);
    return !memcmp(&a, &b, sizeof a) || (left != left && right != right);
}

// The rows of CSR in double.
template <typename T, typename W>
void compare_with_exact(const Form &form, const Csr &csr, const Case &c, const Inputs<T> &from, const Packed<W> &packed,
                        const T *y) {
    const T *const x = from.x.template data<T>();
    const int64_t width = c.end_row - c.first_row + c.y_gap;
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t o = c.first_row; o < c.end_row; ++o) {
            double sum = 0, magnitudes = 0;
            const int32_t first = csr.crow[size_t(o)], end = csr.crow[size_t(o) + 1];
            for (int32_t i = first; i < end; ++i) {
                const double product =
                    double(to_float(packed.of_csr[size_t(i)])) * to_float(x[t * (c.in + c.x_gap) + csr.col[size_t(i)]]);
                sum += product;
                magnitudes += fabs(product);
            }
            const double scale = sizeof(W) == 1 ? from.scale.template data<float>()[o] : 1;
            const double bias = c.has_bias ? to_float(from.bias.template data<T>()[o]) : 0;
            const double exact = activated(sum * scale + bias, c.activation);
            const double allowed = allowed_error<T>(exact, magnitudes * scale + fabs(bias), end - first);
            const double found = to_float(y[t * width + o - c.first_row]);
            if (std::isfinite(exact) ? !(fabs(found - exact) <= allowed)
                                     : std::isnan(exact) != std::isnan(found) || (!std::isnan(exact) && found != exact))
                fail(c.text(form.name), found, exact, allowed);
        }
}

template <typename W>
bool same_bytes(const Packed<W> &a, const Packed<W> &b) {
    const auto same = [](const Guarded &left, const Guarded &right) {
        return left.size() == right.size() && !memcmp(left.data(), right.data(), left.size());
    };
    return same(a.index, b.index) && same(a.values, b.values);
}

template <typename T, typename W>
void compare(const Form &form, const Csr &csr, const Case &c) {
    const bool plain = c.activation == SPARSIFY_NONE || c.activation == SPARSIFY_RELU;
    const bool scaled_and_added = sizeof(W) == 1 && c.has_bias;  // which a compiler may fuse or not
    const bool one_chain = form.number != SPARSIFY_GATHER;       // the others add in the portable order
    const bool exactly = plain && (form.quantizes || (same_roundings && one_chain && !scaled_and_added));
    use("portable");
    const Inputs<T> from = inputs_of<T>(c);
    const Packed<W> by_portable = pack<W>(form, csr, c.seed);
    const Guarded wanted = exactly || form.quantizes ? run<T, W>(form, c, from, by_portable) : Guarded(0);
    use(tested);
    const Packed<W> packed = pack<W>(form, csr, c.seed);
    const Guarded found = run<T, W>(form, c, from, packed);
    const size_t n = wanted.size() / sizeof(T);
    if (exactly)
        for (size_t i = 0; i < n; ++i)
            if (!same(found.data<T>()[i], wanted.data<T>()[i]))
                fail(c.text(form.name) + ", number " + std::to_string(i), to_float(found.data<T>()[i]),
                     to_float(wanted.data<T>()[i]), 0);
    if (!form.quantizes)
        compare_with_exact(form, csr, c, from, packed, found.data<T>());
    else if (!exactly)
        for (size_t i = 0; i < n; ++i) {  // the same number, and two activations
            // GELU by tanh takes e^b of a b of up to 104, rounded four times. GELU is good to a unit of its input,
            // which is at most 6 where the result is small.
            const double roundings = c.activation == SPARSIFY_GELU_TANH ? 16 + 4 * 104 : 16;
            const double of_input = c.activation == SPARSIFY_GELU_ERF ? 4 * 6.0 / (1 << 24) : 0;
            const double a = to_float(found.data<T>()[i]), b = to_float(wanted.data<T>()[i]);
            const double allowed = fabs(b) * (2 * UNIT<T> + roundings / (1 << 24)) + of_input + 2 * SMALLEST<T>;
            if (std::isnan(a) != std::isnan(b) || fabs(a - b) > allowed) fail(c.text(form.name), a, b, allowed);
        }
    // What lies between the rows of y was not written.
    const int64_t width = c.end_row - c.first_row + c.y_gap;
    for (int64_t t = 0; t + 1 < c.tokens; ++t)
        for (int64_t i = width - c.y_gap; i < width; ++i) {
            const T gap = found.data<T>()[t * width + i];
            if (to_float(gap) == to_float(gap)) fail(c.text(form.name) + ", beside the output", to_float(gap), NAN, 0);
        }
    // Another instruction set's packing is multiplied too, where it is another one.
    if (!same_bytes(packed, by_portable)) {
        const Guarded of_other = run<T, W>(form, c, from, by_portable);
        if (!form.quantizes) compare_with_exact(form, csr, c, from, by_portable, of_other.template data<T>());
    }
    ++n_compared[std::string(form.name) +
                 (sizeof(W) == 1              ? " int8"
                  : DTYPE<T> == SPARSIFY_F32  ? " f32"
                  : DTYPE<T> == SPARSIFY_BF16 ? " bf16"
                                              : " f16") +
                 (exactly ? ", bit for bit" : ", within the bound")];
}

// Whether the tested kernels run a form by code of their own.
bool has_own(const Form &form, int quantized) {
    return !strcmp(sparsify_kernel_origin(tested, form.number, quantized), tested);
}

void compare_all_linear() {
    uint64_t number = 0;
    for (const auto &shape : SHAPES)
        for (const double sparsity : SPARSITIES) {
            if (same_roundings && sparsity == 0 && shape[0] * shape[1] > 20000) continue;  // half the time of emulation
            Random random{number};
            const Csr csr = random_csr(shape[0], shape[1], sparsity, random);
            for (const Form &form : FORMS) {
                for (int turn = 0; turn < 2; ++turn, ++number) {
                    Case c{};
                    c.out = csr.out, c.in = csr.in, c.sparsity = sparsity;
                    c.tokens = TOKENS[number % std::size(TOKENS)];
                    c.activation = turn ? 0 : int64_t(number / 2 % 5);
                    c.has_bias = number % 3 != 0;
                    c.x_gap = int64_t(number % 4);
                    c.y_gap = int64_t(number % 5);
                    c.n_threads = 1 + int64_t(number % 3);
                    c.first_row = number % 7 == 0 ? csr.out / 3 : 0;
                    c.end_row = number % 11 == 0 ? csr.out - csr.out / 4 : csr.out;
                    c.special = number % 5 == 0 && c.activation <= SPARSIFY_RELU;
                    c.seed = number;
                    if (form.number == SPARSIFY_PAIRMASK) {
                        if (has_own(form, 0)) compare<BFloat16, BFloat16>(form, csr, c);
                        continue;
                    }
                    if (has_own(form, 1)) {
                        compare<float, int8_t>(form, csr, c);
                        compare<BFloat16, int8_t>(form, csr, c);
                        compare<Float16, int8_t>(form, csr, c);
                    }
                    if (form.quantizes || !has_own(form, 0)) continue;
                    compare<float, float>(form, csr, c);
                    compare<BFloat16, BFloat16>(form, csr, c);
                    compare<Float16, Float16>(form, csr, c);
                }
            }
        }
}

}  // namespace

void compare_images(const char *tested, bool same_roundings, std::map<std::string, int> &n_compared);
void compare_the_rest(const char *tested, bool same_roundings, std::map<std::string, int> &n_compared);

int main(int n_arguments, char **arguments) {
    if (n_arguments < 2) return printf("%s %s\n", sparsify_kernel(), sparsify_threads()) < 0;
    tested = arguments[1];
    const std::string how = n_arguments > 2 ? arguments[2] : "";
    same_roundings = how == "bits";
    use(tested);
    if (how == "only") return 0;
    compare_all_linear();
    compare_images(tested, same_roundings, n_compared);
    compare_the_rest(tested, same_roundings, n_compared);
    printf("%s, threads %s\n", tested, sparsify_threads());
    for (const auto &[kind, n] : n_compared) printf("%s: %d\n", kind.c_str(), n);
    return 0;
}
