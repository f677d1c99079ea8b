// SHA-256 (FIPS 180-4).
#pragma once

#include <cstdint>

#include "checkpoint/text.h"

namespace sparsify {

class Sha256 {
public:
    void add(const void *bytes, int64_t n);
    void finish(char hexadecimal[64]);  // lower case; nothing may be added afterwards

private:
    void mix(const uint8_t *block);

    uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t rest_[64];
    int64_t n_ = 0;
};

}  // namespace sparsify
