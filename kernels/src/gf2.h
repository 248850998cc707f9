// What decoding and encoding with an XOR network share.
#pragma once

#include <cstdint>

#include "hcx_kernels.h"

namespace hcx {

constexpr int kMaxIn = 16;
constexpr int kMaxOut = 256;
constexpr int kMaxRegisters = 3;
constexpr int kMaxWords = kMaxOut / 64;  // of a block
constexpr int kChunkBits = 512;          // of a stream, in the list of corrections
constexpr int kOffsetBits = 9;

struct Gf2Plan {
    int n_in, n_out, n_s;
    int64_t bits, segment, blocks;
    int64_t network_bytes, codes_bytes, stream_bytes;
};

int32_t make_gf2_plan(const hcx_gf2_shape& shape, Gf2Plan& plan);

// Row `row` of M_j as a number: bit i is the coefficient of input i.
static inline uint32_t network_row(const Gf2Plan& plan, const uint8_t* network, int j, int row) {
    const int row_bytes = (plan.n_in + 7) / 8;
    const uint8_t* at = network + (static_cast<int64_t>(j) * plan.n_out + row) * row_bytes;
    const uint32_t value = row_bytes == 1 ? at[0] : at[0] | static_cast<uint32_t>(at[1]) << 8;
    return value & ((1U << plan.n_in) - 1);
}

// `count` <= 64 bits of a stream from bit `from` on; bits beyond its end are zero.
static inline uint64_t stream_word(const uint8_t* stream, int64_t stream_bytes, int64_t from, int count) {
    uint64_t word = 0;
    const int64_t first = from / 8;
    const int shift = static_cast<int>(from % 8);
    const int64_t needed = (shift + count + 7) / 8;
    for (int64_t i = 0; i < needed && first + i < stream_bytes; ++i) {
        const uint64_t byte = stream[first + i];
        word |= i < 8 ? byte << (8 * i) >> shift : byte << (64 - shift);
    }
    return count == 64 ? word : word & ((uint64_t{1} << count) - 1);
}

}  // namespace hcx
