// The gradient of the kept weights (sampled dense-dense product), for the instruction set of the simd/*.h included
// before: y[o][k] = sum over tokens of grad[t][o] * x[t][k] for the kept (o, k) of a CSR matrix.
//
// Tokens are taken SDDMM_TOKENS at a time. Their x and grad are transposed once, so that a kept weight is a product of
// two contiguous rows; then a task takes SDDMM_ROWS rows of y, block of columns by block of columns, so that the
// columns' activations stay in the L2 cache while the rows pass. WIDTH products are added up across their lanes
// together, by one transpose.
#pragma once

#include "runtime/threads.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

constexpr int64_t SDDMM_ROWS = 64, SDDMM_COLUMN_BYTES = 512 * 1024, SDDMM_FEATURES = 256;

struct SddmmPlan {
    sparsify_sddmm_call call;
    int64_t first_token, n_tokens, padded_tokens, n_x_tasks;
    float *x_rows, *grad_rows;  // [in][padded_tokens], [out][padded_tokens]
};

// to[k][t] = from[t][k] for k < n; tokens beyond n_tokens are 0.
inline void transpose_tokens(const float *from, int64_t stride, int64_t n_tokens, int64_t n, float *to,
                             int64_t padded) {
    for (int64_t t = 0; t < padded; t += WIDTH)
        for (int64_t k = 0; k < n; k += WIDTH) {
            const int width = n - k < WIDTH ? int(n - k) : WIDTH;
            Vec r[WIDTH];
            for (int i = 0; i < WIDTH; ++i)
                r[i] = t + i < n_tokens ? load_first(from + (t + i) * stride + k, width) : zero();
            transpose(r);
            for (int i = 0; i < width; ++i) store(to + (k + i) * padded + t, r[i]);
        }
}

inline int transpose_sddmm_task(const void *context, int64_t number) {
    const SddmmPlan &plan = *static_cast<const SddmmPlan *>(context);
    const bool is_x = number < plan.n_x_tasks;
    const int64_t first = (is_x ? number : number - plan.n_x_tasks) * SDDMM_FEATURES;
    const int64_t left = (is_x ? plan.call.in : plan.call.out) - first;
    const int64_t stride = is_x ? plan.call.x_stride : plan.call.grad_stride;
    const float *from = static_cast<const float *>(is_x ? plan.call.x : plan.call.grad);
    transpose_tokens(from + plan.first_token * stride + first, stride, plan.n_tokens,
                     left < SDDMM_FEATURES ? left : SDDMM_FEATURES,
                     (is_x ? plan.x_rows : plan.grad_rows) + first * plan.padded_tokens, plan.padded_tokens);
    return SPARSIFY_OK;
}

// Products of one row of grad with n <= WIDTH rows of x.
inline void sddmm_products(const float *grad, const float *x_rows, int64_t padded, const int32_t *col, int n,
                           float *out) {
    Vec r[WIDTH];
    for (int i = 0; i < n; ++i) {
        const float *x = x_rows + col[i] * padded;
        Vec sum = mul(load(grad), load(x));
        for (int64_t t = WIDTH; t < padded; t += WIDTH) sum = fma(load(grad + t), load(x + t), sum);
        r[i] = sum;
    }
    for (int i = n; i < WIDTH; ++i) r[i] = zero();
    transpose(r);
    Vec total = r[0];
    for (int i = 1; i < WIDTH; ++i) total = add(total, r[i]);
    store(out, total);
}

inline int multiply_sddmm_task(const void *context, int64_t number) {
    const SddmmPlan &plan = *static_cast<const SddmmPlan *>(context);
    const sparsify_sddmm_call &call = plan.call;
    const int64_t first = number * SDDMM_ROWS, left = call.out - first;
    const int64_t n_rows = left < SDDMM_ROWS ? left : SDDMM_ROWS;
    const int64_t n_columns = SDDMM_COLUMN_BYTES / (plan.padded_tokens * int64_t(sizeof(float)));
    float *const y = static_cast<float *>(call.y);
    int32_t next[SDDMM_ROWS];
    for (int64_t row = 0; row < n_rows; ++row) next[row] = call.crow[first + row];
    for (int64_t end = n_columns;; end += n_columns) {
        for (int64_t row = 0; row < n_rows; ++row) {
            const float *grad = plan.grad_rows + (first + row) * plan.padded_tokens;
            float *const to = y + (first + row) * call.in;
            const int32_t stop = call.crow[first + row + 1];
            int32_t i = next[row];
            while (i < stop && call.col[i] < end) {
                int n = 1;
                while (n < WIDTH && i + n < stop && call.col[i + n] < end) ++n;
                float products[WIDTH];
                sddmm_products(grad, plan.x_rows, plan.padded_tokens, call.col + i, n, products);
                for (int j = 0; j < n; ++j) {
                    float &sum = to[call.col[i + j]];
                    sum = plan.first_token ? sum + products[j] : products[j];
                }
                i += n;
            }
            next[row] = i;
        }
        if (end >= call.in) return SPARSIFY_OK;
    }
}

inline int sddmm_f32(const sparsify_sddmm_call &call) {
    SddmmPlan plan;
    plan.call = call;
    plan.n_x_tasks = (call.in + SDDMM_FEATURES - 1) / SDDMM_FEATURES;
    const int64_t n_grad_tasks = (call.out + SDDMM_FEATURES - 1) / SDDMM_FEATURES;
    const double flops = 2.0 * double(call.crow[call.out]) * double(call.tokens);
    const int n_threads = worthwhile_threads(flops, int(call.n_threads));
    for (plan.first_token = 0; plan.first_token < call.tokens; plan.first_token += SPARSIFY_SDDMM_TOKENS) {
        const int64_t left = call.tokens - plan.first_token;
        plan.n_tokens = left < SPARSIFY_SDDMM_TOKENS ? left : SPARSIFY_SDDMM_TOKENS;
        plan.padded_tokens = (plan.n_tokens + WIDTH - 1) / WIDTH * WIDTH;
        plan.x_rows = static_cast<float *>(call.workspace);
        plan.grad_rows = plan.x_rows + call.in * plan.padded_tokens;
        int status = run_tasks(plan.n_x_tasks + n_grad_tasks, n_threads, transpose_sddmm_task, &plan);
        if (!status)
            status = run_tasks((call.out + SDDMM_ROWS - 1) / SDDMM_ROWS, n_threads, multiply_sddmm_task, &plan);
        if (status) return status;
    }
    return SPARSIFY_OK;
}

}  // namespace
