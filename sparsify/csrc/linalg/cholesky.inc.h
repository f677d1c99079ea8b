// Cholesky's factors of many parts of one symmetric matrix, for the instruction set of the simd/*.h included before.
//
// A task is one part: its rows and columns are gathered into scratch memory, padded to whole blocks by the identity,
// and factorised there, block of columns by block of columns (left-looking). All but the blocks on the diagonal is one
// loop, rows times a panel: sums of CHOLESKY_ROWS rows x CHOLESKY_BLOCK columns in registers. The panel is what the
// rows of the block on the diagonal hold so far, transposed; then, to divide by that block, its inverse, transposed.
#pragma once

#include <math.h>
#include <string.h>

#include "runtime/threads.h"
#include "sparsify.h"

namespace {

using namespace sparsify;

constexpr int64_t CHOLESKY_BLOCK = 32;
constexpr int CHOLESKY_VECS = CHOLESKY_BLOCK / WIDTH, CHOLESKY_ROWS = N_REGISTERS >= 32 ? 8 : 2;

struct CholeskyPlan {
    sparsify_factor_call call;
    int64_t size;  // in whole blocks
};

// With SUBTRACT sums[r][c] -=, otherwise sums[r][c] =, the sum over k < n of rows[r][k] * panel[k][c], for one block of
// columns and CHOLESKY_ROWS rows, `stride` apart. Rows and sums may be the same place: it is written last.
template <bool SUBTRACT>
inline void cholesky_rows(const float *rows, int64_t stride, const float *panel, int64_t n, float *sums) {
    Vec acc[CHOLESKY_ROWS][CHOLESKY_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < CHOLESKY_ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < CHOLESKY_VECS; ++v) acc[r][v] = SUBTRACT ? load(sums + r * stride + v * WIDTH) : zero();
    for (int64_t k = 0; k < n; ++k) {
        Vec p[CHOLESKY_VECS];
#pragma GCC unroll 4
        for (int v = 0; v < CHOLESKY_VECS; ++v) p[v] = load(panel + k * CHOLESKY_BLOCK + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < CHOLESKY_ROWS; ++r) {
            const Vec a = broadcast(rows + r * stride + k);
#pragma GCC unroll 4
            for (int v = 0; v < CHOLESKY_VECS; ++v)
                acc[r][v] = SUBTRACT ? fnma(a, p[v], acc[r][v]) : fma(a, p[v], acc[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < CHOLESKY_ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < CHOLESKY_VECS; ++v) store(sums + r * stride + v * WIDTH, acc[r][v]);
}

// to[c][r] = from[r][c] for CHOLESKY_BLOCK rows r, `stride` apart, and n columns c.
inline void cholesky_transpose(const float *from, int64_t stride, int64_t n, float *to) {
    for (int64_t c = 0; c < n; c += WIDTH)
        for (int64_t first = 0; first < CHOLESKY_BLOCK; first += WIDTH) {
            Vec r[WIDTH];
            for (int i = 0; i < WIDTH; ++i) r[i] = load(from + (first + i) * stride + c);
            transpose(r);
            for (int i = 0; i < WIDTH; ++i) store(to + (c + i) * CHOLESKY_BLOCK + first, r[i]);
        }
}

// The lower factor of one block in place, and its inverse in `inverse`, both [CHOLESKY_BLOCK rows]; above the diagonals
// both are left undefined, and zero. A block that is not positive definite gives NaN, which reaches all that follows.
inline void cholesky_block(float *block, int64_t stride, float *inverse) {
    for (int64_t k = 0; k < CHOLESKY_BLOCK; ++k) {
        float column[CHOLESKY_BLOCK];
        const float root = sqrtf(block[k * stride + k]);
        for (int64_t i = 0; i < CHOLESKY_BLOCK; ++i)
            column[i] = i < k ? 0.0f : i == k ? root : block[i * stride + k] / root;
        for (int64_t i = k; i < CHOLESKY_BLOCK; ++i) block[i * stride + k] = column[i];
        column[k] = 0;  // the columns up to k belong to the factor already
        for (int64_t i = k + 1; i < CHOLESKY_BLOCK; ++i) {
            const Vec a = set1(column[i]);
            for (int v = int(k / WIDTH); v < CHOLESKY_VECS; ++v) {
                float *const to = block + i * stride + v * WIDTH;
                store(to, fnma(a, load(column + v * WIDTH), load(to)));
            }
        }
    }
    for (int64_t i = 0; i < CHOLESKY_BLOCK; ++i) {
        Vec sum[CHOLESKY_VECS];
        float unit[CHOLESKY_BLOCK] = {};
        unit[i] = 1;
        for (int v = 0; v < CHOLESKY_VECS; ++v) sum[v] = load(unit + v * WIDTH);
        for (int64_t d = 0; d < i; ++d) {
            const Vec a = set1(block[i * stride + d]);
            for (int v = 0; v < CHOLESKY_VECS; ++v)
                sum[v] = fnma(a, load(inverse + d * CHOLESKY_BLOCK + v * WIDTH), sum[v]);
        }
        const Vec scale = set1(1 / block[i * stride + i]);
        for (int v = 0; v < CHOLESKY_VECS; ++v) store(inverse + i * CHOLESKY_BLOCK + v * WIDTH, mul(sum[v], scale));
    }
}

inline void gather_part(const sparsify_factor_call &call, const int64_t *order, int64_t size, float *part) {
    for (int64_t i = 0; i < size; ++i) {
        float *const to = part + i * size;
        if (i >= call.size || order[i] == call.n - 1) {  // the identity
            memset(to, 0, size_t(i + 1) * sizeof(float));
            to[i] = 1;
            continue;
        }
        const float *const from = call.matrix + order[i] * call.n;
        for (int64_t j = 0; j <= i; ++j) to[j] = order[j] < call.n - 1 ? from[order[j]] : 0.0f;
    }
}

inline int factor_task(const void *context, int64_t number) {
    const CholeskyPlan &plan = *static_cast<const CholeskyPlan *>(context);
    const sparsify_factor_call &call = plan.call;
    const int64_t size = plan.size;
    float *const part = static_cast<float *>(thread_scratch(size_t(size * (size + CHOLESKY_BLOCK)) * sizeof(float)));
    if (!part) return SPARSIFY_NO_MEMORY;
    float *const panel = part + size * size;
    gather_part(call, call.order + number * call.size, size, part);
    for (int64_t first = 0; first < size; first += CHOLESKY_BLOCK) {
        const int64_t next = first + CHOLESKY_BLOCK;
        cholesky_transpose(part + first * size, size, first, panel);
        for (int64_t row = first; row < size; row += CHOLESKY_ROWS)
            cholesky_rows<true>(part + row * size, size, panel, first, part + row * size + first);
        float inverse[CHOLESKY_BLOCK * CHOLESKY_BLOCK];
        cholesky_block(part + first * size + first, size, inverse);
        cholesky_transpose(inverse, CHOLESKY_BLOCK, CHOLESKY_BLOCK, panel);
        for (int64_t row = next; row < size; row += CHOLESKY_ROWS)
            cholesky_rows<false>(part + row * size + first, size, panel, CHOLESKY_BLOCK, part + row * size + first);
    }
    float *const lower = call.lower + number * call.size * call.size;
    for (int64_t i = 0; i < call.size; ++i) {
        memcpy(lower + i * call.size, part + i * size, size_t(i + 1) * sizeof(float));
        memset(lower + i * call.size + i + 1, 0, size_t(call.size - i - 1) * sizeof(float));
    }
    return SPARSIFY_OK;
}

inline int factor_f32(const sparsify_factor_call &call) {
    const CholeskyPlan plan{call, (call.size + CHOLESKY_BLOCK - 1) / CHOLESKY_BLOCK * CHOLESKY_BLOCK};
    const double size = double(plan.size);
    const int n_threads = worthwhile_threads(size * size * size / 3 * double(call.n_parts), int(call.n_threads));
    return run_tasks(call.n_parts, n_threads, factor_task, &plan);
}

}  // namespace
