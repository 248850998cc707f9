// The portable body: every method in plain C++. It runs everywhere, and it is the oracle: the other instruction sets
// give its bits, not merely its values.
#include <cmath>

#include "numbers.h"
#include "prepare.h"

namespace hcx {
namespace {

struct Ops {
    static float sum(const float* x, int64_t inputs) {
        float lane[16] = {};
        for (int64_t m = 0; m < inputs; m += 16) {
            for (int i = 0; i < 16; ++i) lane[i] += x[m + i];
        }
        for (int half = 8; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
        }
        return lane[0];
    }

    static float largest_table(const float* x, int64_t inputs) {
        float most = 0.0F;
        for (int64_t k = 0; k < inputs; k += 4) {
            const float sum = (std::fabs(x[k]) + std::fabs(x[k + 1])) + (std::fabs(x[k + 2]) + std::fabs(x[k + 3]));
            most = sum > most ? sum : most;
        }
        return most;
    }

    static float largest(const float* x, int64_t inputs) {
        float most = 0.0F;
        for (int64_t k = 0; k < inputs; ++k) most = std::fabs(x[k]) > most ? std::fabs(x[k]) : most;
        return most;
    }

    // Entry e of the table of inputs x[0..3]: bit t of e set means + x[t]. T[~e] = -T[e] bit for bit.
    static int entry(const float* x, int e, float inverse) {
        const float a = (e & 1) != 0 ? x[0] : -x[0], b = (e & 2) != 0 ? x[1] : -x[1];
        const float c = (e & 4) != 0 ? x[2] : -x[2], d = (e & 8) != 0 ? x[3] : -x[3];
        return static_cast<int>(std::nearbyint(((a + b) + (c + d)) * inverse));
    }

    static void tables8(const float* x, int64_t inputs, float inverse, int8_t* out) {
        for (int64_t k = 0; k < inputs; k += 4) {
            for (int e = 0; e < 16; ++e) *out++ = static_cast<int8_t>(entry(x + k, e, inverse));
        }
    }

    // Per quad of 16 inputs the high parts of its 64 entries, then the low ones: 128 high + low, 0 <= low < 128.
    static void tables15(const float* x, int64_t inputs, float inverse, int8_t* out) {
        for (int64_t k = 0; k < inputs; k += 16, out += 128) {
            for (int i = 0; i < 64; ++i) {
                const int value = entry(x + k + i / 16 * 4, i % 16, inverse);
                const int low = value & 127;
                out[i] = static_cast<int8_t>((value - low) / 128);
                out[64 + i] = static_cast<int8_t>(low);
            }
        }
    }

    static float codes8(const float* x, int64_t inputs, float inverse, int8_t* out) {
        int sum = 0;
        for (int64_t k = 0; k < inputs; ++k) {
            out[k] = static_cast<int8_t>(std::nearbyint(x[k] * inverse));
            sum += out[k];
        }
        return static_cast<float>(sum);
    }
};

int nibble_of(const uint8_t* line, int row, int table) {
    const uint8_t byte = line[4 * row + table % 4];
    return table < 4 ? byte & 15 : byte >> 4;
}

// Sum of the table entries that one row of one plane selects in `lines` lines.
template <bool kWide>
int selected(const uint8_t* weights, int row, int64_t lines, const int8_t* tables) {
    int sum = 0;
    for (int64_t l = 0; l < lines; ++l) {
        for (int table = 0; table < 8; ++table) {
            const int nibble = nibble_of(weights + l * kLineBytes, row, table);
            if (kWide) {
                const int8_t* quad = tables + l * kTable15Bytes + table / 4 * 128 + table % 4 * 16 + nibble;
                sum += 128 * quad[0] + quad[64];
            } else {
                sum += tables[l * kTable8Bytes + table * 16 + nibble];
            }
        }
    }
    return sum;
}

template <bool kWide>
void block_tables(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, int columns,
                  float* out) {
    constexpr int kBytes = kWide ? kTable15Bytes : kTable8Bytes;
    for (int c = 0; c < columns; ++c) {
        const auto* tables = reinterpret_cast<const int8_t*>(a.tables + (first + c) * a.table_stride);
        const float* unit = a.segment_scale + (first + c) * a.segment_stride;
        const float* group_sum = a.group_sum + (first + c) * a.group_stride;
        float* y = out + c * kBlockRows;
        for (int row = 0; row < kBlockRows; ++row) y[row] = 0.0F;
        const uint8_t* at = block;
        int64_t line = 0, segment = 0;
        for (int64_t group = 0; group < plan.groups; ++group) {
            const uint8_t* scales = at;
            const auto* offset = reinterpret_cast<const float*>(at + scales_bytes_of_tiles(plan, tiles));
            at += head_bytes(plan, tiles);
            const int64_t lines = lines_of_group(plan, group);
            for (int row = 0; row < tiles * kTileRows; ++row) {
                const int tile = row / kTileRows, r = row % kTileRows;
                for (int plane = 0; plane < plan.bits; ++plane) {
                    float sum = 0.0F;
                    const uint8_t* part = at;
                    for (int64_t l = 0, s = segment; l < lines; l += kSegmentLines, ++s) {
                        const int64_t count = lines - l < kSegmentLines ? lines - l : kSegmentLines;
                        const uint8_t* weights = part + (tile * plan.bits + plane) * count * kLineBytes;
                        const int units = selected<kWide>(weights, r, count, tables + (line + l) * kBytes);
                        sum = l == 0 ? static_cast<float>(units) * unit[s]
                                     : std::fma(static_cast<float>(units), unit[s], sum);
                        part += tiles * plan.bits * count * kLineBytes;
                    }
                    const float scale = scale_of(scales, plan.scale_dtype, (tile * plan.bits + plane) * kTileRows + r);
                    y[row] = std::fma(scale, sum, y[row]);
                }
                if (plan.has_offset) y[row] = std::fma(offset[row], group_sum[group], y[row]);
            }
            at += lines * tiles * plan.bits * kLineBytes;
            line += lines;
            segment += ceil_div(lines, kSegmentLines);
        }
    }
}

// W = offset + step * (2 code - sum of codes) / 2 with 0 <= code <= 255: each scale becomes a whole number of steps.
struct RowCodes {
    float step, half;  // half the sum of the codes
    int code[kMaxBits];
    int base;

    RowCodes(const Plan& plan, const uint8_t* scales, int tile, int r) {
        float scale[kMaxBits], sum = 0.0F;
        for (int p = 0; p < plan.bits; ++p) {
            scale[p] = scale_of(scales, plan.scale_dtype, (tile * plan.bits + p) * kTileRows + r);
            sum += std::fabs(scale[p]);
        }
        const bool usable = sum > kTiny && sum <= FLT_MAX / 2;
        step = sum <= kTiny ? 0.0F : (sum + sum) / (255.0F - 0.5F * static_cast<float>(plan.bits));
        const float inverse = usable ? 1.0F / step : 0.0F;
        base = 0;
        int total = 0;
        for (int p = 0; p < plan.bits; ++p) {
            const float wanted = (std::fabs(scale[p]) + std::fabs(scale[p])) * inverse;
            const int rounded = usable ? static_cast<int>(std::nearbyint(wanted)) : 0;
            total += rounded;
            base += scale[p] < 0.0F ? rounded : 0;
            code[p] = scale[p] < 0.0F ? -rounded : rounded;
        }
        half = 0.5F * static_cast<float>(total);
    }
};

void block_codes(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, int columns,
                 float* out) {
    for (int i = 0; i < columns * kBlockRows; ++i) out[i] = 0.0F;
    const uint8_t* at = block;
    int64_t line = 0, segment = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
        const uint8_t* scales = at;
        const auto* offset = reinterpret_cast<const float*>(at + scales_bytes_of_tiles(plan, tiles));
        at += head_bytes(plan, tiles);
        const int64_t end = line + lines_of_group(plan, group);
        for (; line < end; ++segment) {
            const int64_t count = end - line < kSegmentLines ? end - line : kSegmentLines;
            for (int row = 0; row < tiles * kTileRows; ++row) {
                const int tile = row / kTileRows, r = row % kTileRows;
                const RowCodes codes(plan, scales, tile, r);
                int code[kSegmentLines * kLineInputs];
                for (int64_t k = 0; k < count * kLineInputs; ++k) {
                    code[k] = codes.base;
                    for (int p = 0; p < plan.bits; ++p) {
                        const uint8_t* bytes = at + ((tile * plan.bits + p) * count + k / kLineInputs) * kLineBytes;
                        const int nibble = nibble_of(bytes, r, static_cast<int>(k % kLineInputs / 4));
                        code[k] += (nibble >> (k % 4) & 1) != 0 ? codes.code[p] : 0;
                    }
                }
                for (int c = 0; c < columns; ++c) {
                    const auto* x = reinterpret_cast<const int8_t*>(a.tables + (first + c) * a.table_stride);
                    const int64_t s = (first + c) * a.segment_stride + segment;
                    int dot = 0;
                    for (int64_t k = 0; k < count * kLineInputs; ++k) dot += code[k] * x[line * kLineInputs + k];
                    const float centred = std::fma(-codes.half, a.segment_sum[s], static_cast<float>(dot));
                    float& y = out[c * kBlockRows + row];
                    y = std::fma(centred, codes.step * a.segment_scale[s], y);
                }
            }
            at += tiles * plan.bits * count * kLineBytes;
            line += count;
        }
        if (!plan.has_offset) continue;
        for (int c = 0; c < columns; ++c) {
            const float sum = a.group_sum[(first + c) * a.group_stride + group];
            for (int row = 0; row < tiles * kTileRows; ++row) {
                float& y = out[c * kBlockRows + row];
                y = std::fma(offset[row], sum, y);
            }
        }
    }
}

}  // namespace

extern const KernelSet kPortable = {
    {prepare_tables8<Ops>, block_tables<false>},
    {prepare_tables15<Ops>, block_tables<true>},
    {prepare_codes8<Ops>, block_codes},
};

}  // namespace hcx
