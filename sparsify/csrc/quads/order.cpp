// The order of inputs in which quads are full: inputs that the same rows keep are put together, first in pairs, then
// pairs of pairs. Each time the densest that is left takes the partner with which it has most rows in common: on masks
// pruned by ALPS at 80% this leaves .50 of the quads where the order of the layer leaves .57. Taking time, not memory:
// for each pair of columns all bits are counted. Therefore columns look for partners among MOST_COLUMNS neighbours,
// and of more than MOST_ROWS rows a part speaks for all: packing 4096x4096 takes .5 s at 95% and 1.4 s at 50%.
#include "quads/order.h"

#include <stdlib.h>
#include <string.h>

#include "quads/format.h"
#include "sparsify.h"

namespace sparsify {
namespace {

constexpr int64_t MOST_COLUMNS = 4096, MOST_ROWS = 1024, WORDS = MOST_ROWS / 64;

struct Columns {
    uint64_t (*rows)[WORDS];  // of each, the bits of the rows that keep it
    int32_t *kept, *partner, *by_density;
};

// sum + 2 carry = a + b + c, bit by bit.
struct Added {
    uint64_t carry, sum;
};
Added add_bits(uint64_t a, uint64_t b, uint64_t c) { return {(a & b) | ((a ^ b) & c), a ^ b ^ c}; }

// How many rows keep both. Bits are added up before they are counted: compilers have no instruction to count them that
// every processor has.
int32_t in_common(const uint64_t *a, const uint64_t *b) {
    static_assert(WORDS == 16, "two halves of eight");
    uint64_t ones = 0, twos = 0, fours = 0, eights = 0, sixteens = 0;
    for (int half = 0; half < 16; half += 8) {
        const auto both = [&](int i) { return a[half + i] & b[half + i]; };
        const Added p = add_bits(ones, both(0), both(1)), q = add_bits(p.sum, both(2), both(3));
        const Added r = add_bits(q.sum, both(4), both(5)), s = add_bits(r.sum, both(6), both(7));
        const Added t = add_bits(twos, p.carry, q.carry), u = add_bits(t.sum, r.carry, s.carry);
        const Added v = add_bits(fours, t.carry, u.carry);
        ones = s.sum, twos = u.sum, fours = v.sum;
        sixteens |= eights & v.carry;
        eights ^= v.carry;
    }
    return __builtin_popcountll(ones) + 2 * __builtin_popcountll(twos) + 4 * __builtin_popcountll(fours) +
           8 * __builtin_popcountll(eights) + 16 * __builtin_popcountll(sixteens);
}

// kept[c], and by_density: most kept first, equal ones in their order.
void sort_by_density(Columns &columns, int64_t n) {
    int32_t starts[MOST_ROWS + 2] = {};
    for (int64_t c = 0; c < n; ++c) {
        columns.kept[c] = in_common(columns.rows[c], columns.rows[c]);
        ++starts[MOST_ROWS - columns.kept[c] + 1];
    }
    for (int64_t i = 0; i <= MOST_ROWS; ++i) starts[i + 1] += starts[i];
    for (int64_t c = 0; c < n; ++c) columns.by_density[starts[MOST_ROWS - columns.kept[c]]++] = int32_t(c);
}

// partner[c] for n columns, of an odd number one is its own.
void pair_columns(Columns &columns, int64_t n) {
    sort_by_density(columns, n);
    int32_t *left = columns.by_density;
    while (n > 0) {
        const int32_t one = left[0];
        int64_t best = 0;
        int32_t most = -1;
        for (int64_t i = 1; i < n; ++i) {
            if (columns.kept[left[i]] <= most) break;  // nor can any that follows have more in common
            const int32_t common = in_common(columns.rows[one], columns.rows[left[i]]);
            if (common > most) most = common, best = i;
        }
        const int32_t other = left[best];
        columns.partner[one] = other;
        columns.partner[other] = one;
        int64_t n_left = 0;
        for (int64_t i = 1; i < n; ++i)
            if (i != best) left[n_left++] = left[i];
        n = n_left;
    }
}

// Orders n columns from `first` on.
void order_some(int64_t out, int64_t first, int64_t n, const int32_t *crow, const int32_t *col, int32_t *inputs,
                Columns &columns) {
    memset(columns.rows, 0, size_t(n) * sizeof *columns.rows);
    const int64_t n_rows = out < MOST_ROWS ? out : MOST_ROWS;
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = r * out / n_rows;
        for (int32_t i = crow[row]; i < crow[row + 1]; ++i)
            if (col[i] >= first && col[i] < first + n) columns.rows[col[i] - first][r / 64] |= uint64_t(1) << r % 64;
    }
    pair_columns(columns, n);
    int32_t *const pairs = inputs;  // [n / 2][2] at first, where they are needed no longer than each is moved away
    int64_t n_pairs = 0;
    for (int32_t c = 0; c < n; ++c) {
        const int32_t other = columns.partner[c];
        if (other < c) continue;
        pairs[2 * n_pairs] = c;
        pairs[2 * n_pairs + 1] = other > c ? other : QUADS_NO_INPUT;
        for (int64_t w = 0; w < WORDS; ++w) columns.rows[n_pairs][w] = columns.rows[c][w] | columns.rows[other][w];
        ++n_pairs;
    }
    int32_t *const copy = columns.by_density + MOST_COLUMNS;
    memcpy(copy, pairs, size_t(2 * n_pairs) * sizeof *copy);
    pair_columns(columns, n_pairs);
    int32_t *to = inputs;
    const auto put = [&](int32_t pair) {
        for (int i = 0; i < 2; ++i) {
            const int32_t input = pair < 0 ? QUADS_NO_INPUT : copy[2 * pair + i];
            *to++ = input == QUADS_NO_INPUT ? input : int32_t(first + input);
        }
    };
    int32_t alone = -1;
    for (int32_t pair = 0; pair < n_pairs; ++pair) {
        const int32_t other = columns.partner[pair];
        if (other == pair) alone = pair;
        if (other <= pair) continue;
        put(pair);
        put(other);
    }
    if (alone >= 0) {
        put(alone);
        put(-1);
    }
}

// Quads of neighbours are kept as a whole or not at all, as in a mask of blocks 1x4: there is no better order.
bool quads_are_full(int64_t out, const int32_t *crow, const int32_t *col) {
    for (int64_t row = 0; row < out; ++row) {
        const int32_t end = crow[row + 1];
        for (int32_t i = crow[row]; i < end; i += 4)
            if (end - i < 4 || col[i] % 4 || col[i + 3] != col[i] + 3) return false;
    }
    return true;
}

}  // namespace

int order_inputs(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, int32_t *inputs) {
    for (int64_t i = 0; i < 4 * quads_of(in); ++i) inputs[i] = i < in ? int32_t(i) : QUADS_NO_INPUT;
    const int64_t nnz = crow[out];
    if (nnz == out * in || quads_are_full(out, crow, col)) return SPARSIFY_OK;
    Columns columns;
    columns.rows = static_cast<uint64_t (*)[WORDS]>(malloc(MOST_COLUMNS * sizeof *columns.rows));
    columns.kept = static_cast<int32_t *>(malloc(5 * MOST_COLUMNS * sizeof(int32_t)));
    const bool allocated = columns.rows && columns.kept;
    if (allocated) {
        columns.partner = columns.kept + MOST_COLUMNS;
        columns.by_density = columns.partner + MOST_COLUMNS;  // and twice as many as a copy
        for (int64_t first = 0; first < in; first += MOST_COLUMNS) {
            const int64_t n = in - first < MOST_COLUMNS ? in - first : MOST_COLUMNS;
            order_some(out, first, n, crow, col, inputs + first, columns);
        }
    }
    free(columns.rows);
    free(columns.kept);
    return allocated ? SPARSIFY_OK : SPARSIFY_NO_MEMORY;
}

}  // namespace sparsify
