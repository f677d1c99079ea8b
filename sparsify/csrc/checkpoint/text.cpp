#include "checkpoint/text.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "sparsify.h"

namespace sparsify {

struct alignas(16) Arena::Block {
    Block *before;
};

Arena::~Arena() {
    while (last_) {
        Block *block = last_;
        last_ = block->before;
        free(block);
    }
}

void *Arena::take(int64_t bytes) {
    constexpr int64_t USUAL = 1 << 16, MOST = int64_t(1) << 46;
    if (bytes < 0 || bytes > MOST) return nullptr;
    bytes = (bytes + 16) / 16 * 16;  // also for none an address of its own
    if (bytes > room_) {
        const int64_t room = bytes > USUAL ? bytes : USUAL;
        auto *block = static_cast<Block *>(malloc(sizeof(Block) + size_t(room)));
        if (!block) return nullptr;
        block->before = last_;
        last_ = block;
        next_ = reinterpret_cast<char *>(block + 1);
        room_ = room;
    }
    void *taken = next_;
    next_ += bytes;
    room_ -= bytes;
    return taken;
}

const char *join(Arena &arena, Text first, const char *second, const char *third) {
    const Text parts[] = {first, text(second), text(third)};
    char *joined = arena.take<char>(first.n + parts[1].n + parts[2].n + 3);
    if (!joined) return nullptr;
    char *end = joined;
    for (const Text &part : parts) {
        if (part.n == 0) continue;
        if (end != joined) *end++ = '.';
        memcpy(end, part.at, size_t(part.n));
        end += part.n;
    }
    *end = 0;
    return joined;
}

bool Refusal::no(const char *format, ...) {
    if (status == SPARSIFY_OK) status = SPARSIFY_BAD_FILE;
    if (!message || room <= 0) return false;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, size_t(room), format, arguments);
    va_end(arguments);
    for (char *c = message; *c; ++c)  // names are of a stranger's choice
        if (static_cast<unsigned char>(*c) < 32) *c = '?';
    return false;
}

bool Refusal::no_memory() {
    status = SPARSIFY_NO_MEMORY;
    return no("out of memory");
}

}  // namespace sparsify
