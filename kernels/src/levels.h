// The weight that each pattern of signs stands for.
#pragma once

namespace hcx {

// `levels` [2^bits], summed in the order in which a reader sums: planes from the first to the last, then the offset.
static inline void levels_of(const float* scales, int bits, float offset, float* levels) {
    for (int pattern = 0; pattern < 1 << bits; ++pattern) {
        float level = (pattern & 1) != 0 ? scales[0] : -scales[0];
        for (int plane = 1; plane < bits; ++plane) level += (pattern >> plane & 1) != 0 ? scales[plane] : -scales[plane];
        levels[pattern] = level + offset;
    }
}

}  // namespace hcx
