// The vectors of tokens of a call spread over tiles.
//
// A tile's time for each of its vectors depends on how many it has. AVX2, 768x768 at 50%, us a vector for tiles of 1 to
// 8: 145, 89, 87, 73, 76, 73, 75, 70. So each thread gets tiles as wide as can be, and for what is left one or two of
// at least half of that width: 196 tokens are tiles of 8, 4, 8 and 5 vectors and not of 6, 6, 6 and 7.
#pragma once

#include <stdint.h>

namespace {

// Tiles of one thread follow each other: first the wide ones, of `width` vectors, then those that have the rest.
struct Spread {
    int64_t n_vecs, n_tiles;
    int64_t width, n_wide, n_groups;  // wide tiles of each of the groups of tiles

    // The first vector of a tile; of number n_tiles, the end.
    int64_t first_vec(int64_t tile) const {
        const int64_t in_group = n_tiles / n_groups, group = tile / in_group, place = tile % in_group;
        const int64_t wide_before = group * n_wide + (place < n_wide ? place : n_wide);
        const int64_t n_rest = n_tiles - n_groups * n_wide, rest_before = tile - wide_before;
        const int64_t rest = n_vecs - n_groups * n_wide * width;
        return wide_before * width + (n_rest ? rest_before * rest / n_rest : 0);
    }
};

inline Spread spread_evenly(int64_t n_vecs, int64_t n_tiles) { return {n_vecs, n_tiles, 0, 0, 1}; }

// For tiles that are tasks of so many threads: at least one for each.
inline Spread spread_widely(int64_t n_vecs, int64_t width, int64_t n_threads) {
    const int64_t round = n_threads * width;
    int64_t n_wide = n_vecs / round, rest = n_vecs % round;
    if (n_wide > 0 && rest > 0 && 2 * rest < round) --n_wide, rest += round;  // no tile of less than half the width
    const int64_t n_rest = (rest + round - 1) / round * n_threads;
    return {n_vecs, n_threads * n_wide + n_rest, width, n_wide, n_threads};
}

}  // namespace
