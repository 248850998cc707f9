// BiQGEMM (Jeon et al. 2020, SC20) as published: keys of 8 inputs, fp32 tables built by doubling, tables stationary
// while the keys of all rows stream by. Kept as the faithful reproduction; a scalar lookup per key bounds it.
#include <cstring>
#include <new>

#include "numbers.h"
#include "pack.h"
#include "pool.h"

namespace hcx {
namespace {

constexpr char kMagic[8] = {'H', 'C', 'X', '-', 'B', 'I', 'Q', '\n'};
constexpr int kKeyInputs = 8;
constexpr int kEntries = 1 << kKeyInputs;
constexpr int kTileKeys = 16;  // 16 tables of 1 KiB: half of a first cache

// [tile of at most 16 keys][row][plane][keys], then fp32 scales [group][row][plane], then offsets [group][row].
struct Layout {
    int64_t keys, keys_per_group, scales_at, offsets_at, bytes;

    explicit Layout(const Plan& plan) {
        keys = ceil_div(plan.columns, kKeyInputs);
        keys_per_group = plan.groups == 1 ? keys : plan.lines_per_group * (kLineInputs / kKeyInputs);
        const int64_t keys_end = static_cast<int64_t>(sizeof(Header)) + keys * plan.rows * plan.bits;
        scales_at = ceil_div(keys_end, kAlignment) * kAlignment;
        offsets_at = scales_at + plan.groups * plan.rows * plan.bits * 4;
        bytes = offsets_at + (plan.has_offset ? plan.groups * plan.rows * 4 : 0);
    }
};

// Tiles do not cross groups: (first key, keys) of the tile after the keys done.
int64_t tile_keys(const Layout& layout, int64_t done) {
    int64_t end = (done / layout.keys_per_group + 1) * layout.keys_per_group;
    if (end > layout.keys) end = layout.keys;
    return end - done < kTileKeys ? end - done : kTileKeys;
}

int32_t read_layout(const void* packed, int64_t bytes, Plan& plan) {
    if (packed == nullptr) return HCX_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(packed) % kAlignment != 0) return HCX_MISALIGNED;
    if (bytes < static_cast<int64_t>(sizeof(Header))) return HCX_WRONG_SIZE;
    Header header;
    std::memcpy(&header, packed, sizeof(header));
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) return HCX_BAD_HEADER;
    const hcx_bcq_shape shape{header.rows, header.columns, header.group, header.bits, HCX_FP32, header.has_offset, 0};
    if (make_plan(shape, plan) != HCX_OK) return HCX_BAD_HEADER;
    return header.bytes == bytes && Layout(plan).bytes == bytes ? HCX_OK : HCX_WRONG_SIZE;
}

// Section 3.2, by doubling: T[0] = - sum x; T[2^t + j] = T[j] + 2 x_t. Only the half without the last input is built:
// the other is its mirror image, so that T[~k] = -T[k] bit for bit.
void build_table(const float* x, float* table) {
    float sum = 0.0F;
    for (int t = 0; t < kKeyInputs; ++t) sum += x[t];
    table[0] = -sum;
    for (int t = 0; t < kKeyInputs - 1; ++t) {
        for (int j = 0; j < 1 << t; ++j) table[(1 << t) + j] = table[j] + 2.0F * x[t];
    }
    for (int k = 0; k < kEntries / 2; ++k) table[kEntries - 1 - k] = -table[k];
}

void multiply_rows(const Plan& plan, const void* packed, const float* x, float* y, int64_t from, int64_t to) {
    const Layout layout(plan);
    const auto* base = static_cast<const uint8_t*>(packed);
    const auto* scales = reinterpret_cast<const float*>(base + layout.scales_at);
    const auto* offsets = reinterpret_cast<const float*>(base + layout.offsets_at);
    const uint8_t* keys = base + sizeof(Header);
    alignas(64) float tables[kTileKeys][kEntries];
    for (int64_t row = from; row < to; ++row) y[row] = 0.0F;
    float sum = 0.0F;
    for (int64_t done = 0; done < layout.keys;) {
        const int64_t count = tile_keys(layout, done), group = done / layout.keys_per_group;
        for (int64_t j = 0; j < count; ++j) {
            float inputs[kKeyInputs] = {};
            const int64_t first = (done + j) * kKeyInputs, left = plan.columns - first;
            std::memcpy(inputs, x + first, static_cast<size_t>(left < kKeyInputs ? left : kKeyInputs) * 4);
            build_table(inputs, tables[j]);
            sum += tables[j][kEntries - 1];
        }
        for (int64_t row = from; row < to; ++row) {
            const uint8_t* key = keys + row * plan.bits * count;
            for (int plane = 0; plane < plan.bits; ++plane, key += count) {
                float part[4] = {};  // four chains hide the latency of a load and an addition
                int64_t j = 0;
                for (; j + 4 <= count; j += 4) {
                    for (int i = 0; i < 4; ++i) part[i] += tables[j + i][key[j + i]];
                }
                for (; j < count; ++j) part[0] += tables[j][key[j]];
                const float sum_of_keys = (part[0] + part[1]) + (part[2] + part[3]);
                y[row] += scales[(group * plan.rows + row) * plan.bits + plane] * sum_of_keys;
            }
        }
        keys += count * plan.rows * plan.bits;
        done += count;
        if (done < layout.keys && done / layout.keys_per_group == group) continue;
        if (plan.has_offset) {
            for (int64_t row = from; row < to; ++row) y[row] += offsets[group * plan.rows + row] * sum;
        }
        sum = 0.0F;
    }
}

}  // namespace
}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_biqgemm_table(const float* x, float* table) {
    if (x == nullptr || table == nullptr) return HCX_NULL_POINTER;
    build_table(x, table);
    return HCX_OK;
}

int32_t hcx_biqgemm_packed_bytes(const hcx_bcq_shape* shape, int64_t* bytes) {
    if (shape == nullptr || bytes == nullptr) return HCX_NULL_POINTER;
    Plan plan;
    const int32_t status = make_plan(*shape, plan);
    if (status == HCX_OK) *bytes = Layout(plan).bytes;
    return status;
}

int32_t hcx_biqgemm_pack(const hcx_bcq_shape* shape, const uint8_t* planes, int64_t planes_bytes, const void* scales,
                         int64_t scales_bytes, const float* offset, int64_t offset_bytes, void* out,
                         int64_t out_bytes) {
    if (shape == nullptr || out == nullptr) return HCX_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(out) % kAlignment != 0) return HCX_MISALIGNED;
    Plan plan;
    int32_t status = make_plan(*shape, plan);
    if (status != HCX_OK) return status;
    status = check_canonical(plan, planes, planes_bytes, scales, scales_bytes, offset, offset_bytes);
    if (status != HCX_OK) return status;
    const Layout layout(plan);
    if (out_bytes != layout.bytes) return HCX_WRONG_SIZE;
    auto* base = static_cast<uint8_t*>(out);
    std::memset(base, 0, static_cast<size_t>(layout.scales_at));
    Header header{};
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.bits = plan.bits;
    header.rows = plan.rows;
    header.columns = plan.columns;
    header.group = plan.group;
    header.has_offset = plan.has_offset;
    header.bytes = out_bytes;
    std::memcpy(base, &header, sizeof(header));
    uint8_t* at = base + sizeof(Header);
    for (int64_t done = 0; done < layout.keys;) {
        const int64_t count = tile_keys(layout, done);
        for (int64_t row = 0; row < plan.rows; ++row) {
            for (int plane = 0; plane < plan.bits; ++plane, at += count) {
                std::memcpy(at, planes + (plane * plan.rows + row) * layout.keys + done, static_cast<size_t>(count));
            }
        }
        done += count;
    }
    for (int64_t row = 0; row < plan.rows; ++row) {
        for (int64_t group = 0; group < plan.groups; ++group) {
            for (int plane = 0; plane < plan.bits; ++plane) {
                const float scale = scale_of(scales, plan.scale_dtype, (plane * plan.rows + row) * plan.groups + group);
                std::memcpy(base + layout.scales_at + ((group * plan.rows + row) * plan.bits + plane) * 4, &scale, 4);
            }
            if (plan.has_offset) {
                uint8_t* to = base + layout.offsets_at + (group * plan.rows + row) * 4;
                std::memcpy(to, offset + row * plan.groups + group, 4);
            }
        }
    }
    return HCX_OK;
}

int32_t hcx_biqgemm_matmul(const void* packed, int64_t packed_bytes, const float* x, int64_t x_stride, int64_t batch,
                           float* y, int64_t y_stride, int32_t threads) {
    if (batch > 0 && (x == nullptr || y == nullptr)) return HCX_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(x) % 4 != 0 || reinterpret_cast<uintptr_t>(y) % 4 != 0) return HCX_MISALIGNED;
    Plan plan;
    const int32_t status = read_layout(packed, packed_bytes, plan);
    if (status != HCX_OK) return status;
    if (batch < 0 || x_stride < plan.columns || y_stride < plan.rows) return HCX_BAD_SHAPE;
    // Every thread builds all tables and owns some rows: no barrier, and the same bits for any number of threads.
    const int64_t parts = threads < 1 ? 1 : threads < plan.blocks ? threads : plan.blocks;
    auto multiply = [&](int64_t item) {
        const int64_t part = item % parts, column = item / parts;
        const int64_t from = plan.blocks * part / parts * kBlockRows;
        const int64_t to = part == parts - 1 ? plan.rows : plan.blocks * (part + 1) / parts * kBlockRows;
        multiply_rows(plan, packed, x + column * x_stride, y + column * y_stride, from, to);
    };
    return parallel(static_cast<int>(parts), parts * batch, multiply);
}
}
