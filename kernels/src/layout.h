// The machine layout of a packed weight, and what follows from its header. README.md draws it.
//
// A line is 16 rows x 32 inputs of one plane in 64 bytes: byte 4 r + j holds inputs 4 j .. 4 j + 3 of row r in its low
// nibble, and inputs 16 + 4 j .. in its high nibble. Four tiles of 16 rows make a block of 64 rows; a block is one
// sequential stream [group]{ scales [tile][plane][16], offsets [tile][16], lines [segment][tile][plane][line] }, where
// a segment is at most four lines: 128 inputs of one group.
//
// Included by code that is compiled for one instruction set: plain data and static functions only, so that no inline
// function of the library can be emitted with instructions that another machine lacks.
#pragma once

#include <cstdint>

#include "hcx_kernels.h"

namespace hcx {

constexpr int kTileRows = 16;
constexpr int kTiles = 4;
constexpr int kBlockRows = kTileRows * kTiles;
constexpr int kLineInputs = 32;
constexpr int kLineBytes = 64;
constexpr int kSegmentLines = 4;
constexpr int kMaxBits = 8;
constexpr int kAlignment = 64;
constexpr int kTable8Bytes = 128;   // of one line: two quads of four tables of 16 entries
constexpr int kTable15Bytes = 256;  // high and low halves
// How far ahead the stream is asked for: a memory latency at full speed. Every byte must be: a gap, even of the few
// lines of scales in each group, costs a latency per group (measured: half the speed).
constexpr int kPrefetchBytes = 8192;
// Sums below this become zero: their reciprocals would leave fp32.
constexpr float kTiny = 1e-34F;

struct Plan {
    int64_t rows, columns, group;
    int bits, scale_dtype, has_offset;
    int64_t lines, lines_per_group, groups, segments, segments_per_group, blocks;
};

struct Header {
    char magic[8];
    uint32_t version;
    int32_t bits;
    int64_t rows, columns, group;
    int32_t scale_dtype, has_offset;
    int64_t bytes;
    uint64_t check;  // of the fields above
};
static_assert(sizeof(Header) == kAlignment, "the stream after the header stays aligned");

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int scale_bytes(int dtype) { return dtype == HCX_FP32 ? 4 : 2; }

static inline int64_t lines_of_group(const Plan& plan, int64_t group) {
    const int64_t left = plan.lines - group * plan.lines_per_group;
    return left < plan.lines_per_group ? left : plan.lines_per_group;
}

static inline int tiles_of_block(const Plan& plan, int64_t block) {
    const int64_t left = ceil_div(plan.rows, kTileRows) - block * kTiles;
    return static_cast<int>(left < kTiles ? left : kTiles);
}

static inline int64_t scales_bytes_of_tiles(const Plan& plan, int tiles) {
    const int64_t bytes = static_cast<int64_t>(tiles) * plan.bits * kTileRows * scale_bytes(plan.scale_dtype);
    return ceil_div(bytes, kAlignment) * kAlignment;
}

// Scales and offsets of one group of a block.
static inline int64_t head_bytes(const Plan& plan, int tiles) {
    return scales_bytes_of_tiles(plan, tiles) + (plan.has_offset ? tiles * kTileRows * 4 : 0);
}

static inline int64_t block_bytes(const Plan& plan, int tiles) {
    return plan.groups * head_bytes(plan, tiles) + plan.lines * plan.bits * tiles * kLineBytes;
}

static inline const uint8_t* block_at(const Plan& plan, const void* packed, int64_t block) {
    return static_cast<const uint8_t*>(packed) + sizeof(Header) + block * block_bytes(plan, kTiles);
}

// The batch as the kernels read it: what is below per column, `stride` apart.
struct Activations {
    const uint8_t* tables;      // tables of each line, or int8 activations
    const float* segment_scale; // what one unit of a table, or of an activation, is worth
    const float* group_sum;     // sum of the inputs of a group
    const float* segment_sum;   // sum of the int8 activations of a segment (codes only)
    int64_t table_stride, segment_stride, group_stride;
};

// Fills one column: x is padded with zeros to whole lines.
using PrepareFunction = void (*)(const Plan& plan, const float* x, uint8_t* tables, float* segment_scale,
                                 float* group_sum, float* segment_sum);
// Rows of one block for some columns: out[column][64].
using BlockFunction = void (*)(const Plan& plan, const uint8_t* block, int tiles, const Activations& activations,
                               int64_t first_column, int columns, float* out);

struct Kernel {
    PrepareFunction prepare;
    BlockFunction block;
};

struct KernelSet {
    Kernel tables8, tables15, codes8;
};

extern const KernelSet kPortable;
extern const KernelSet kAvx2;    // codes8 is null: maddubs saturates
extern const KernelSet kAvx512;

}  // namespace hcx
