// The quadsteps form, for int8 values and many zeros, or few tokens: bytes of activations are looked up in a register.
// What lies where in `index`. The widesteps form is the same with a window of four registers.
//
// Sixteen output rows, the *lanes* of a tile, walk their kept inputs from left to right together. A *window* is 64
// neighbouring inputs, the bytes of a register. In one *step* each lane may take up to four of its next kept inputs, if
// they lie in the window, which begins at the first of all or up to 15 inputs before it: one permute of bytes fetches
// up to 64 activations, and one instruction multiplies them and adds four products to the sum of each lane. What it
// costs is the places that stay empty in a step: 3% at 50% sparsity, 27% at 90%. In windows of 255 inputs 6% stay empty
// at 90%, and a token takes four loads, two permutes and a blend in a step: for a token whose weights come from memory.
// Four tiles make a *block*, 64 consecutive rows that lie in the lanes in an order of their own: rows that keep
// equally many inputs side by side.
//
//   QuadstepsHeader
//   uint32 tile_steps[n_tiles + 1]   steps before each tile
//   uint8  lanes[n_tiles * 16]       of each row, among the 64 of its block; QUADSTEPS_NO_LANE past the last row
//   uint16 starts[n_steps]           the first input of each window
//   (up to a multiple of 64 bytes)
//   uint8  inputs[n_steps][16][4]    counted from the start; QUADSTEPS_EMPTY where nothing is taken
//
// values: int8 [n_steps][16][4], zeros where nothing is taken; then int32 row_sums[out], the sums of the weights of
// each row, with which a kernel takes out the zero point of the activations.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsify {

constexpr int QUADSTEPS_LANES = 16;
constexpr int QUADSTEPS_TAKEN = 4;  // at most, of each lane in a step
constexpr int QUADSTEPS_BYTES = QUADSTEPS_LANES * QUADSTEPS_TAKEN;
constexpr int QUADSTEPS_WINDOW = 64, WIDESTEPS_WINDOW = 255;  // 255 is QUADSTEPS_EMPTY
// Windows begin at multiples: of 64 bytes that cross cache lines a processor loads half as many. Multiples of 16 take
// .7 to 4% more steps at 50 to 90%, and with 128 tokens 8% to 3% less time; of 32, more steps and a little less time
// still, but one token is slower.
constexpr int QUADSTEPS_ALIGNED = 16;
constexpr int QUADSTEPS_BLOCK_TILES = 4;
constexpr int QUADSTEPS_BLOCK_ROWS = QUADSTEPS_BLOCK_TILES * QUADSTEPS_LANES;
constexpr int64_t QUADSTEPS_MOST_IN = 65536;
constexpr uint8_t QUADSTEPS_NO_LANE = 255;
constexpr uint8_t QUADSTEPS_EMPTY = 255;  // of which a permute uses the lower bits: an input in the window, or after it
constexpr uint32_t QUADSTEPS_MAGIC = 0x31535451, WIDESTEPS_MAGIC = 0x31535457;  // "QTS1", "WTS1"

struct QuadstepsHeader {
    uint32_t magic, n_steps;
    int64_t out, in, nnz;
    int64_t unused[4];
};
static_assert(sizeof(QuadstepsHeader) == 64, "the layout of the blob");

// What the two forms differ in.
struct StepsKind {
    uint32_t magic;
    int window;
};
constexpr StepsKind QUADSTEPS_KIND = {QUADSTEPS_MAGIC, QUADSTEPS_WINDOW};
constexpr StepsKind WIDESTEPS_KIND = {WIDESTEPS_MAGIC, WIDESTEPS_WINDOW};

static inline int64_t quadsteps_n_tiles(int64_t out) { return (out + QUADSTEPS_LANES - 1) / QUADSTEPS_LANES; }

// Byte offsets in index. `end` is its size.
struct QuadstepsSections {
    int64_t tile_steps, lanes, starts, inputs, end;
};

static inline QuadstepsSections quadsteps_sections(int64_t out, int64_t n_steps) {
    QuadstepsSections s;
    s.tile_steps = int64_t(sizeof(QuadstepsHeader));
    s.lanes = s.tile_steps + 4 * (quadsteps_n_tiles(out) + 1);
    s.starts = s.lanes + QUADSTEPS_LANES * quadsteps_n_tiles(out);
    s.inputs = (s.starts + 2 * n_steps + 63) / 64 * 64;
    s.end = s.inputs + QUADSTEPS_BYTES * n_steps;
    return s;
}

static inline int64_t quadsteps_n_values(int64_t out, int64_t n_steps) { return QUADSTEPS_BYTES * n_steps + 4 * out; }

struct QuadstepsView {
    const QuadstepsHeader *header;
    const uint32_t *tile_steps;
    const uint8_t *lanes;
    const uint16_t *starts;
    const uint8_t *inputs;
};

static inline QuadstepsView quadsteps_view(const uint8_t *index) {
    const QuadstepsHeader *h = reinterpret_cast<const QuadstepsHeader *>(index);
    const QuadstepsSections s = quadsteps_sections(h->out, h->n_steps);
    return {h, reinterpret_cast<const uint32_t *>(index + s.tile_steps), index + s.lanes,
            reinterpret_cast<const uint16_t *>(index + s.starts), index + s.inputs};
}

}  // namespace sparsify
