// 16-bit floats to fp32, exactly, without any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "hcx_kernels.h"

namespace hcx {

static inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline float float_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
    const uint32_t exponent = (half >> 10) & 31U, fraction = half & 1023U;
    if (exponent == 31) return float_of_bits(sign | 0x7F800000U | (fraction << 13));
    if (exponent != 0) return float_of_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
}

// Number `index` of an array of fp16, bf16 or fp32.
static inline float scale_of(const void* scales, int dtype, int64_t index) {
    if (dtype == HCX_FP32) {
        float value;
        std::memcpy(&value, static_cast<const uint8_t*>(scales) + 4 * index, sizeof(value));
        return value;
    }
    uint16_t value;
    std::memcpy(&value, static_cast<const uint8_t*>(scales) + 2 * index, sizeof(value));
    return dtype == HCX_FP16 ? float_of_half(value) : float_of_bits(static_cast<uint32_t>(value) << 16);
}

}  // namespace hcx
