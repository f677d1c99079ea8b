// Memory that is freed at once, pieces of text in it, and the one sentence that says why a file is refused. No STL: the
// library needs no more of the C++ runtime than its language does, and throws nothing.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsify {

struct Text {
    const char *at = "";
    int64_t n = 0;
};

inline Text text(const char *literal) { return {literal, int64_t(strlen(literal))}; }

inline int compare(Text a, Text b) {
    if (a.n != b.n) return a.n < b.n ? -1 : 1;
    return a.n ? memcmp(a.at, b.at, size_t(a.n)) : 0;
}

inline bool same(Text a, Text b) { return compare(a, b) == 0; }
inline bool same(Text a, const char *b) { return same(a, text(b)); }

// Memory for as long as the arena lives, not initialised.
class Arena {
public:
    Arena() = default;
    Arena(const Arena &) = delete;
    Arena &operator=(const Arena &) = delete;
    ~Arena();

    void *take(int64_t bytes);  // null when memory is short
    template <typename T>
    T *take(int64_t n) {
        return static_cast<T *>(take(n * int64_t(sizeof(T))));
    }

private:
    struct Block;
    Block *last_ = nullptr;
    int64_t room_ = 0;
    char *next_ = nullptr;
};

// All of the parts after each other, with dots between them; empty ones in front are left out. A zero byte follows.
// Null when memory is short.
const char *join(Arena &arena, Text first, const char *second, const char *third = "");

// Where the reason is written for which a file is refused.
struct Refusal {
    char *message;
    int64_t room;
    int status;

    // Writes the reason; returns false.
    bool no(const char *format, ...) __attribute__((format(printf, 2, 3)));
    bool no_memory();
};

// At most 80 bytes of a text, for `%.*s`.
inline int shown(Text t) { return t.n < 80 ? int(t.n) : 80; }

}  // namespace sparsify
