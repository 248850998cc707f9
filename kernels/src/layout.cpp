// Packing, checking and unpacking of the machine layout.
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "pack.h"
#include "pool.h"

namespace hcx {
namespace {

constexpr char kMagic[8] = {'H', 'C', 'X', '-', 'B', 'C', 'Q', '\n'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kMaxSide = int64_t{1} << 28;  // keeps every size below in 63 bits

// FNV-1a: finds damage, defends against nobody.
uint64_t check_of(const Header& header) {
    uint64_t hash = 14695981039346656037ULL;
    const auto* bytes = reinterpret_cast<const unsigned char*>(&header);
    for (size_t i = 0; i < offsetof(Header, check); ++i) hash = (hash ^ bytes[i]) * 1099511628211ULL;
    return hash;
}

int64_t packed_bytes(const Plan& plan) {
    const int64_t full = plan.blocks - 1;
    return static_cast<int64_t>(sizeof(Header)) + full * block_bytes(plan, kTiles) +
           block_bytes(plan, tiles_of_block(plan, full));
}

// Bits of 32 inputs of a canonical row, those beyond its end zero.
uint32_t word_of(const uint8_t* row, int64_t row_bytes, int64_t line, int64_t columns) {
    uint32_t word = 0;
    for (int64_t i = 0; i < 4 && 4 * line + i < row_bytes; ++i) {
        word |= static_cast<uint32_t>(row[4 * line + i]) << (8 * i);
    }
    const int64_t left = columns - line * kLineInputs;
    return left >= kLineInputs ? word : word & ((1U << left) - 1);
}

// Byte j: inputs 4 j .. in the low nibble, 16 + 4 j .. in the high one.
void put_word(uint8_t* out, uint32_t word) {
    for (int j = 0; j < 4; ++j) {
        out[j] = static_cast<uint8_t>(((word >> (4 * j)) & 15) | (((word >> (16 + 4 * j)) & 15) << 4));
    }
}

struct SignTable {
    float of[16][4];
    constexpr SignTable() : of() {
        for (int nibble = 0; nibble < 16; ++nibble) {
            for (int t = 0; t < 4; ++t) of[nibble][t] = (nibble >> t & 1) != 0 ? 1.0F : -1.0F;
        }
    }
};
constexpr SignTable kSigns;

// 32 inputs of one row and plane, as signs times a scale; added to `values`, or put there if it is the first plane.
inline void add_signed(const uint8_t* bytes, float scale, bool first, float* values) {
    for (int nibble = 0; nibble < 8; ++nibble) {
        const float* signs = kSigns.of[(bytes[nibble % 4] >> (nibble / 4 * 4)) & 15];
        float* four = values + 4 * nibble;
        for (int t = 0; t < 4; ++t) four[t] = first ? signs[t] * scale : four[t] + signs[t] * scale;
    }
}

void put_scales(const Plan& plan, void* packed, const void* scales, const float* offset) {
    const int size = scale_bytes(plan.scale_dtype);
    const auto* from = static_cast<const uint8_t*>(scales);
    for (int64_t block = 0; block < plan.blocks; ++block) {
        const int tiles = tiles_of_block(plan, block);
        auto* at = const_cast<uint8_t*>(block_at(plan, packed, block));
        for (int64_t group = 0; group < plan.groups; ++group) {
            std::memset(at, 0, static_cast<size_t>(head_bytes(plan, tiles)));
            for (int i = 0; i < tiles * kTileRows; ++i) {
                const int64_t row = block * kBlockRows + i;
                if (row >= plan.rows) break;
                for (int plane = 0; plane < plan.bits; ++plane) {
                    const int64_t index = (plane * plan.rows + row) * plan.groups + group;
                    const int64_t place = ((i / kTileRows) * plan.bits + plane) * kTileRows + i % kTileRows;
                    std::memcpy(at + place * size, from + index * size, static_cast<size_t>(size));
                }
                if (plan.has_offset) {
                    std::memcpy(at + scales_bytes_of_tiles(plan, tiles) + 4 * i, offset + row * plan.groups + group, 4);
                }
            }
            at += head_bytes(plan, tiles) + lines_of_group(plan, group) * plan.bits * tiles * kLineBytes;
        }
    }
}

}  // namespace

int32_t make_plan(const hcx_bcq_shape& shape, Plan& plan) {
    if (shape.rows < 1 || shape.columns < 1 || shape.rows > kMaxSide || shape.columns > kMaxSide) return HCX_BAD_SHAPE;
    if (shape.bits < 1 || shape.bits > kMaxBits) return HCX_BAD_BITS;
    if (shape.group < 1 || (shape.group % kLineInputs != 0 && shape.group < shape.columns)) return HCX_BAD_GROUP;
    if (shape.scale_dtype < HCX_FP16 || shape.scale_dtype > HCX_FP32) return HCX_BAD_SCALE_DTYPE;
    plan.rows = shape.rows;
    plan.columns = shape.columns;
    plan.group = shape.group;
    plan.bits = shape.bits;
    plan.scale_dtype = shape.scale_dtype;
    plan.has_offset = shape.has_offset != 0;
    plan.lines = ceil_div(shape.columns, kLineInputs);
    plan.lines_per_group = shape.group >= shape.columns ? plan.lines : shape.group / kLineInputs;
    plan.groups = ceil_div(plan.lines, plan.lines_per_group);
    plan.segments_per_group = ceil_div(plan.lines_per_group, kSegmentLines);
    const int64_t last = lines_of_group(plan, plan.groups - 1);
    plan.segments = (plan.groups - 1) * plan.segments_per_group + ceil_div(last, kSegmentLines);
    plan.blocks = ceil_div(plan.rows, kBlockRows);
    return HCX_OK;
}

int32_t check_canonical(const Plan& plan, const uint8_t* planes, int64_t planes_bytes, const void* scales,
                        int64_t scales_bytes, const float* offset, int64_t offset_bytes) {
    if (planes == nullptr || scales == nullptr || (plan.has_offset && offset == nullptr)) return HCX_NULL_POINTER;
    const int64_t groups = plan.rows * plan.groups;
    if (planes_bytes != plan.bits * plan.rows * ceil_div(plan.columns, 8) ||
        scales_bytes != plan.bits * groups * scale_bytes(plan.scale_dtype) ||
        offset_bytes != (plan.has_offset ? groups * 4 : 0)) {
        return HCX_WRONG_SIZE;
    }
    return HCX_OK;
}

int32_t read_plan(const void* packed, int64_t bytes, Plan& plan) {
    if (packed == nullptr) return HCX_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(packed) % kAlignment != 0) return HCX_MISALIGNED;
    if (bytes < static_cast<int64_t>(sizeof(Header))) return HCX_WRONG_SIZE;
    Header header;
    std::memcpy(&header, packed, sizeof(header));
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0 || header.version != kVersion ||
        header.check != check_of(header)) {
        return HCX_BAD_HEADER;
    }
    const hcx_bcq_shape shape{header.rows, header.columns,     header.group,      header.bits,
                              header.scale_dtype, header.has_offset, 0};
    if (make_plan(shape, plan) != HCX_OK) return HCX_BAD_HEADER;
    return header.bytes == bytes && packed_bytes(plan) == bytes ? HCX_OK : HCX_WRONG_SIZE;
}

}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_bcq_packed_bytes(const hcx_bcq_shape* shape, int64_t* bytes) {
    if (shape == nullptr || bytes == nullptr) return HCX_NULL_POINTER;
    Plan plan;
    const int32_t status = make_plan(*shape, plan);
    if (status == HCX_OK) *bytes = packed_bytes(plan);
    return status;
}

int32_t hcx_bcq_pack(const hcx_bcq_shape* shape, const uint8_t* planes, int64_t planes_bytes, const void* scales,
                     int64_t scales_bytes, const float* offset, int64_t offset_bytes, void* out, int64_t out_bytes) {
    if (shape == nullptr || out == nullptr) return HCX_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(out) % kAlignment != 0) return HCX_MISALIGNED;
    Plan plan;
    int32_t status = make_plan(*shape, plan);
    if (status != HCX_OK) return status;
    status = check_canonical(plan, planes, planes_bytes, scales, scales_bytes, offset, offset_bytes);
    if (status != HCX_OK) return status;
    if (out_bytes != packed_bytes(plan)) return HCX_WRONG_SIZE;

    Header header{};
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.version = kVersion;
    header.bits = plan.bits;
    header.rows = plan.rows;
    header.columns = plan.columns;
    header.group = plan.group;
    header.scale_dtype = plan.scale_dtype;
    header.has_offset = plan.has_offset;
    header.bytes = out_bytes;
    header.check = check_of(header);
    std::memcpy(out, &header, sizeof(header));
    put_scales(plan, out, scales, offset);
    const int64_t row_bytes = ceil_div(plan.columns, 8);
    for (int64_t block = 0; block < plan.blocks; ++block) {
        const int tiles = tiles_of_block(plan, block);
        auto* at = const_cast<uint8_t*>(block_at(plan, out, block));
        int64_t line = 0;
        for (int64_t group = 0; group < plan.groups; ++group) {
            at += head_bytes(plan, tiles);
            const int64_t end = line + lines_of_group(plan, group);
            for (; line < end; line += kSegmentLines) {
                const int64_t count = end - line < kSegmentLines ? end - line : kSegmentLines;
                for (int tile = 0; tile < tiles; ++tile) {
                    for (int plane = 0; plane < plan.bits; ++plane) {
                        for (int64_t l = line; l < line + count; ++l, at += kLineBytes) {
                            for (int r = 0; r < kTileRows; ++r) {
                                const int64_t row = block * kBlockRows + tile * kTileRows + r;
                                const uint8_t* from = planes + (plane * plan.rows + row) * row_bytes;
                                put_word(at + 4 * r, row < plan.rows ? word_of(from, row_bytes, l, plan.columns) : 0);
                            }
                        }
                    }
                }
            }
            line = end;
        }
    }
    return HCX_OK;
}

int32_t hcx_bcq_set_scales(void* packed, int64_t packed_bytes, const void* scales, int64_t scales_bytes,
                           const float* offset, int64_t offset_bytes) {
    Plan plan;
    const int32_t status = read_plan(packed, packed_bytes, plan);
    if (status != HCX_OK) return status;
    if (scales == nullptr || (plan.has_offset && offset == nullptr)) return HCX_NULL_POINTER;
    const int64_t groups = plan.rows * plan.groups;
    if (scales_bytes != plan.bits * groups * scale_bytes(plan.scale_dtype) ||
        offset_bytes != (plan.has_offset ? groups * 4 : 0)) {
        return HCX_WRONG_SIZE;
    }
    put_scales(plan, packed, scales, offset);
    return HCX_OK;
}

int32_t hcx_bcq_describe(const void* packed, int64_t packed_bytes, hcx_bcq_shape* shape) {
    if (shape == nullptr) return HCX_NULL_POINTER;
    Plan plan;
    const int32_t status = read_plan(packed, packed_bytes, plan);
    if (status != HCX_OK) return status;
    *shape = {plan.rows, plan.columns, plan.group, plan.bits, plan.scale_dtype, plan.has_offset, 0};
    return HCX_OK;
}

int32_t hcx_bcq_dequantize(const void* packed, int64_t packed_bytes, float* out, int64_t out_bytes, int32_t threads) {
    Plan plan;
    const int32_t status = read_plan(packed, packed_bytes, plan);
    if (status != HCX_OK) return status;
    if (out == nullptr) return HCX_NULL_POINTER;
    if (out_bytes != plan.rows * plan.columns * 4) return HCX_WRONG_SIZE;
    auto dense = [&](int64_t block) {
        const int tiles = tiles_of_block(plan, block);
        const uint8_t* at = block_at(plan, packed, block);
        int64_t line = 0;
        for (int64_t group = 0; group < plan.groups; ++group) {
            const uint8_t* scales = at;
            const auto* offset = reinterpret_cast<const float*>(at + scales_bytes_of_tiles(plan, tiles));
            at += head_bytes(plan, tiles);
            const int64_t end = line + lines_of_group(plan, group);
            for (; line < end; line += kSegmentLines) {
                const int64_t count = end - line < kSegmentLines ? end - line : kSegmentLines;
                for (int tile = 0; tile < tiles; ++tile, at += plan.bits * count * kLineBytes) {
                    for (int r = 0; r < kTileRows; ++r) {
                        const int64_t row = block * kBlockRows + tile * kTileRows + r;
                        if (row >= plan.rows) break;
                        float scale[kMaxBits];
                        for (int p = 0; p < plan.bits; ++p) {
                            scale[p] = scale_of(scales, plan.scale_dtype, (tile * plan.bits + p) * kTileRows + r);
                        }
                        for (int64_t l = 0; l < count; ++l) {
                            float values[kLineInputs];
                            for (int p = 0; p < plan.bits; ++p) {
                                add_signed(at + (p * count + l) * kLineBytes + 4 * r, scale[p], p == 0, values);
                            }
                            const int64_t first = (line + l) * kLineInputs;
                            const int64_t left = plan.columns - first;
                            const int64_t width = left < kLineInputs ? left : kLineInputs;
                            const float add = plan.has_offset ? offset[tile * kTileRows + r] : 0.0F;
                            for (int64_t k = 0; k < width; ++k) {
                                out[row * plan.columns + first + k] = plan.has_offset ? values[k] + add : values[k];
                            }
                        }
                    }
                }
            }
            line = end;
        }
    };
    return parallel(threads, plan.blocks, dense);
}
}
