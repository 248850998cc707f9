// What the native tests share: a check that counts, and random weights with their canonical tensors.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "hcx_kernels.h"

static int failures = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            ++failures;                                                               \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
        }                                                                             \
    } while (0)

static inline int report(const char* name) {
    std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
    return failures == 0 ? 0 : 1;
}

struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
};

// Memory of exactly `bytes`, aligned to 64: a sanitizer sees a read beyond it.
using Memory = std::unique_ptr<uint8_t, Free>;
static inline Memory memory_of(int64_t bytes) {
    void* memory = nullptr;
    const int status = posix_memalign(&memory, 64, static_cast<size_t>(bytes));
    return Memory(status == 0 ? static_cast<uint8_t*>(memory) : nullptr);
}

static inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Canonical tensors with fp32 scales.
struct Weight {
    hcx_bcq_shape shape;
    int64_t groups;
    std::vector<uint8_t> planes;
    std::vector<float> scales, offset;
    Memory packed;
    int64_t packed_bytes = 0;

    Weight(int64_t rows, int64_t columns, int bits, int64_t group, bool has_offset, uint32_t seed, bool powers = false)
        : shape{rows, columns, group, bits, HCX_FP32, has_offset, 0}, groups(ceil_of(columns, group)) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        planes.resize(static_cast<size_t>(bits * rows * ceil_of(columns, 8)));
        for (auto& byte : planes) byte = static_cast<uint8_t>(random());
        for (int64_t i = 0; i < bits * rows * groups; ++i) {
            const float sign = random() % 2 != 0 ? 1.0F : -1.0F;
            scales.push_back(powers ? sign / static_cast<float>(1U << random() % 4) : normal(random));
        }
        for (int64_t i = 0; has_offset && i < rows * groups; ++i) {
            offset.push_back(powers ? static_cast<float>(random() % 9) / 4 - 1 : normal(random));
        }
        CHECK(hcx_bcq_packed_bytes(&shape, &packed_bytes) == HCX_OK);
        packed = memory_of(packed_bytes);
        CHECK(pack(packed.get(), packed_bytes) == HCX_OK);
    }

    int32_t pack(void* out, int64_t bytes) const {
        return hcx_bcq_pack(&shape, planes.data(), static_cast<int64_t>(planes.size()), scales.data(),
                            static_cast<int64_t>(4 * scales.size()), offset.empty() ? nullptr : offset.data(),
                            static_cast<int64_t>(4 * offset.size()), out, bytes);
    }

    int bit(int plane, int64_t row, int64_t column) const {
        const int64_t row_bytes = ceil_of(shape.columns, 8);
        return planes[static_cast<size_t>((plane * shape.rows + row) * row_bytes + column / 8)] >> (column % 8) & 1;
    }

    float scale(int plane, int64_t row, int64_t column) const {
        return scales[static_cast<size_t>((plane * shape.rows + row) * groups + column / shape.group)];
    }

    // The formula of FORMAT.md.
    double dense(int64_t row, int64_t column) const {
        double value = offset.empty() ? 0.0 : offset[static_cast<size_t>(row * groups + column / shape.group)];
        for (int p = 0; p < shape.bits; ++p) value += scale(p, row, column) * (2.0 * bit(p, row, column) - 1.0);
        return value;
    }

    hcx_bcq_weight handle() const { return {packed.get(), packed_bytes}; }
};
