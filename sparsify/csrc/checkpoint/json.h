// JSON as a tree. Stricter than its users need: a key that stands twice in an object is an error, and so is a zero byte
// in a text.
#pragma once

#include "checkpoint/text.h"

namespace sparsify {

enum class Kind : uint8_t { NOTHING, BOOLEAN, INTEGER, NUMBER, TEXT, LIST, OBJECT };

struct Value {
    Kind kind = Kind::NOTHING;
    Text key;               // of a member of an object
    Value *next = nullptr;  // behind it in the same list or object
    Text text;              // of a TEXT
    int64_t integer = 0;    // of an INTEGER, -1 if it is negative or too large; of a BOOLEAN 0 or 1
    int64_t n = 0;          // members
    Value *first = nullptr;
    Value **sorted = nullptr;  // the members of an object by key
};

// Parses all of a text; the tree points into it. Returns null and sets *why for any other text.
Value *parse_json(Arena &arena, Text json, const char **why);

// The member of an object with this key, or null.
const Value *member(const Value *object, Text key);
inline const Value *member(const Value *object, const char *key) { return member(object, text(key)); }

}  // namespace sparsify
