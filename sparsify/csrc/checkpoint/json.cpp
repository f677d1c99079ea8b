#include "checkpoint/json.h"

#include <stdlib.h>

namespace sparsify {
namespace {

constexpr int DEEPEST = 200;

int by_key(const void *a, const void *b) {
    return compare((*static_cast<Value *const *>(a))->key, (*static_cast<Value *const *>(b))->key);
}

// The length of a well-formed UTF-8 character of more than one byte; 0 for anything else (RFC 3629).
int utf8_length(const unsigned char *c, const char *end) {
    const int64_t left = end - reinterpret_cast<const char *>(c);
    const auto follows = [&](int at, int low, int high) { return left > at && c[at] >= low && c[at] <= high; };
    if (c[0] >= 0xC2 && c[0] <= 0xDF) return follows(1, 0x80, 0xBF) ? 2 : 0;
    if (c[0] >= 0xE0 && c[0] <= 0xEF) {
        const int low = c[0] == 0xE0 ? 0xA0 : 0x80, high = c[0] == 0xED ? 0x9F : 0xBF;  // no surrogates
        return follows(1, low, high) && follows(2, 0x80, 0xBF) ? 3 : 0;
    }
    if (c[0] >= 0xF0 && c[0] <= 0xF4) {
        const int low = c[0] == 0xF0 ? 0x90 : 0x80, high = c[0] == 0xF4 ? 0x8F : 0xBF;
        return follows(1, low, high) && follows(2, 0x80, 0xBF) && follows(3, 0x80, 0xBF) ? 4 : 0;
    }
    return 0;
}

char *put_utf8(char *to, unsigned code) {
    if (code < 0x80) {
        *to++ = char(code);
        return to;
    }
    const int n = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = char((0xFF00 >> (n + 1) & 0xFF) | code >> 6 * n);
    for (int i = n - 1; i >= 0; --i) *to++ = char(0x80 | (code >> 6 * i & 0x3F));
    return to;
}

class Parser {
public:
    Parser(Arena &arena, Text json) : arena_(arena), at_(json.at), end_(json.at + json.n) {}

    Value *whole() {
        Value *value = arena_.take<Value>(1);
        if (!value) {
            no("out of memory");
            return nullptr;
        }
        *value = Value();
        if (!parse(*value, 0)) return nullptr;
        skip_space();
        return at_ == end_ || no("text behind its end") ? value : nullptr;
    }

    const char *why = nullptr;

private:
    bool no(const char *reason) {
        why = reason;
        return false;
    }

    void skip_space() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
    }

    bool take(char c) {
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }

    bool take_word(const char *word) {
        const int64_t n = int64_t(strlen(word));
        if (end_ - at_ < n || memcmp(at_, word, size_t(n)) != 0) return false;
        at_ += n;
        return true;
    }

    bool parse(Value &value, int depth) {
        if (depth > DEEPEST) return no("too many levels");
        skip_space();
        if (at_ == end_) return no("it ends early");
        if (*at_ == '{' || *at_ == '[') return parse_members(value, depth);
        if (*at_ == '"') {
            value.kind = Kind::TEXT;
            return parse_text(value.text);
        }
        if (take_word("null")) return true;
        if (take_word("true")) {
            value.kind = Kind::BOOLEAN;
            value.integer = 1;
            return true;
        }
        if (take_word("false")) {
            value.kind = Kind::BOOLEAN;
            return true;
        }
        return parse_number(value);
    }

    bool parse_members(Value &value, int depth) {
        const bool is_object = *at_++ == '{';
        const char close = is_object ? '}' : ']';
        value.kind = is_object ? Kind::OBJECT : Kind::LIST;
        Value **last = &value.first;
        skip_space();
        if (take(close)) return true;
        do {
            Value *one = arena_.take<Value>(1);
            if (!one) return no("out of memory");
            *one = Value();
            skip_space();
            if (is_object) {
                if (at_ == end_ || *at_ != '"') return no("a key is missing");
                if (!parse_text(one->key)) return false;
                skip_space();
                if (!take(':')) return no("a colon is missing");
            }
            if (!parse(*one, depth + 1)) return false;
            *last = one;
            last = &one->next;
            ++value.n;
            skip_space();
        } while (take(','));
        if (!take(close)) return no("a comma or a bracket is missing");
        return !is_object || sort_members(value);
    }

    bool sort_members(Value &object) {
        object.sorted = arena_.take<Value *>(object.n);
        if (!object.sorted) return no("out of memory");
        int64_t n = 0;
        for (Value *one = object.first; one; one = one->next) object.sorted[n++] = one;
        qsort(object.sorted, size_t(n), sizeof(Value *), by_key);
        for (int64_t i = 1; i < n; ++i)
            if (same(object.sorted[i - 1]->key, object.sorted[i]->key)) return no("a key stands twice");
        return true;
    }

    bool parse_number(Value &value) {
        if (take_word("NaN") || take_word("Infinity") || take_word("-Infinity")) {  // as Python writes them
            value.kind = Kind::NUMBER;
            return true;
        }
        const bool negative = take('-');
        const char *digits = at_;
        int64_t n = 0;
        bool fits = true;
        for (; at_ < end_ && *at_ >= '0' && *at_ <= '9'; ++at_)
            fits = fits && !__builtin_mul_overflow(n, int64_t(10), &n) &&
                   !__builtin_add_overflow(n, int64_t(*at_ - '0'), &n);
        const int64_t n_digits = at_ - digits;
        if (n_digits == 0 || (n_digits > 1 && *digits == '0')) return no("a value is missing");
        value.kind = Kind::INTEGER;
        value.integer = fits && !(negative && n) ? n : -1;
        if (take('.')) {
            value.kind = Kind::NUMBER;
            if (!skip_digits()) return no("a number ends with its point");
        }
        if (at_ < end_ && (*at_ == 'e' || *at_ == 'E')) {
            value.kind = Kind::NUMBER;
            ++at_;
            if (!take('+')) take('-');
            if (!skip_digits()) return no("an exponent has no digits");
        }
        return true;
    }

    bool skip_digits() {
        const char *start = at_;
        while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
        return at_ > start;
    }

    // Leaves the place behind the closing quote, and the text where it stands or, with escapes, in the arena.
    bool parse_text(Text &text) {
        const char *start = ++at_;
        bool escaped = false;
        for (; at_ < end_ && *at_ != '"';) {
            const auto *c = reinterpret_cast<const unsigned char *>(at_);
            if (*c < 32) return no("a control character in a text");
            if (*c == '\\') {
                escaped = true;
                at_ += 2;
                continue;
            }
            const int n = *c < 0x80 ? 1 : utf8_length(c, end_);
            if (n == 0) return no("a text that is not UTF-8");
            at_ += n;
        }
        if (at_ >= end_) return no("a text without an end");
        text = {start, at_ - start};
        ++at_;
        return !escaped || unescape(text);
    }

    bool unescape(Text &text) {
        char *decoded = arena_.take<char>(text.n);
        if (!decoded) return no("out of memory");
        char *to = decoded;
        for (const char *from = text.at, *end = text.at + text.n; from < end;) {
            if (*from != '\\') {
                *to++ = *from++;
                continue;
            }
            static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
            const char *name = from + 1 < end ? strchr(names, from[1]) : nullptr;
            if (name && *name) {
                *to++ = meanings[name - names];
                from += 2;
            } else if (!unescape_code(from, end, to)) {
                return no("an escape that does not exist");
            }
        }
        text = {decoded, to - decoded};
        return true;
    }

    static bool hexadecimal(const char *from, const char *end, unsigned &code) {
        if (end - from < 6 || from[0] != '\\' || from[1] != 'u') return false;
        code = 0;
        for (int i = 2; i < 6; ++i) {
            const char c = from[i];
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) return false;
            code = code << 4 | unsigned(digit);
        }
        return true;
    }

    static bool unescape_code(const char *&from, const char *end, char *&to) {
        unsigned code, low;
        if (!hexadecimal(from, end, code) || code == 0 || (code >= 0xDC00 && code <= 0xDFFF)) return false;
        from += 6;
        if (code >= 0xD800 && code <= 0xDBFF) {
            if (!hexadecimal(from, end, low) || low < 0xDC00 || low > 0xDFFF) return false;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            from += 6;
        }
        to = put_utf8(to, code);
        return true;
    }

    Arena &arena_;
    const char *at_, *end_;
};

}  // namespace

Value *parse_json(Arena &arena, Text json, const char **why) {
    Parser parser(arena, json);
    Value *value = parser.whole();
    *why = parser.why;
    return value;
}

const Value *member(const Value *object, Text key) {
    int64_t low = 0, high = object->kind == Kind::OBJECT ? object->n : 0;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        const int order = compare(object->sorted[middle]->key, key);
        if (order == 0) return object->sorted[middle];
        (order < 0 ? low : high) = order < 0 ? middle + 1 : middle;
    }
    return nullptr;
}

}  // namespace sparsify
