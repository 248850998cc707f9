// Alternating binary codes of groups (Xu et al., ICLR 2018, section 3), with scales in fp64 and as they will be stored.
//
// The nearest codes for given scales cut the sorted weights of a group into intervals, one for each level. So a group is
// sorted once; then a round needs 2^q - 1 binary searches among its weights, and prefix sums give the normal equations.
// hcx/compress/bcq.py holds the same method in torch, which is what this is checked against.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "layout.h"
#include "levels.h"
#include "memory.h"
#include "numbers.h"
#include "pool.h"

namespace hcx {
namespace {

constexpr int kMaxLevels = 1 << kMaxBits, kMaxUnknowns = kMaxBits + 1;
constexpr int64_t kGroupsPerItem = 64;
// Keeps the normal equations solvable where two planes coincide, relative to the group size.
constexpr double kRidge = 1e-7;
// Ranges of the even start, relative to the largest magnitude: outliers may be worth cutting.
constexpr float kClips[] = {1.0F, 0.85F, 0.7F, 0.55F, 0.4F};

// A positive number as it is read back from fp16 or bf16, halves to even.
float stored_half(float value) {
    // Below the smallest normal number steps are 2^-24; adding and subtracting 0.5 rounds to them.
    if (value < 0x1p-14F) return (value + 0.5F) - 0.5F;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits = (bits + 0xFFFU + ((bits >> 13) & 1U)) & ~0x1FFFU;
    return bits >= 0x47800000U ? INFINITY : float_of_bits(bits);
}

float stored_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return float_of_bits((bits + 0x7FFFU + ((bits >> 16) & 1U)) & 0xFFFF0000U);
}

float stored(float value, int dtype) {
    return dtype == HCX_FP16 ? stored_half(value) : dtype == HCX_BF16 ? stored_bfloat(value) : value;
}

// How many weights each level has, and their sum; with an importance, its sum and that of the products.
struct Totals {
    double count[kMaxLevels], sum[kMaxLevels];
};

struct Grid {
    float scales[kMaxBits];
    float offset;
};

// Levels in rising order, and the first weight above the middle between each and the next.
struct Partition {
    uint8_t order[kMaxLevels];
    int32_t bound[kMaxLevels + 1];
};

struct Best {
    double error = INFINITY;
    Grid grid;
    Partition partition;
};

struct Coder {
    int64_t count, size;
    int bits, rounds, dtype;
    bool has_offset;
    const float *groups, *importance;
    uint8_t* patterns;
    float *scales, *offsets;
    std::atomic<bool> failed{false};

    int levels() const { return 1 << bits; }
    int unknowns() const { return bits + (has_offset ? 1 : 0); }

    void operator()(int64_t item);
};

// One group, sorted.
struct Group {
    const Coder& coder;
    uint64_t* keys;
    float* values;
    double *weight_before, *sum_before;
    double squares = 0;

    double count_of(int64_t begin, int64_t end) const { return weight_before[end] - weight_before[begin]; }
    double sum_of(int64_t begin, int64_t end) const { return sum_before[end] - sum_before[begin]; }

    void sort(const float* from, const float* importance) {
        const int64_t size = coder.size;
        for (int64_t i = 0; i < size; ++i) {
            uint32_t bits;
            std::memcpy(&bits, from + i, sizeof(bits));
            bits = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
            keys[i] = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(i);
        }
        std::sort(keys, keys + size);
        double total = 0, sum = 0;
        squares = 0;
        for (int64_t i = 0; i < size; ++i) {
            const auto where = static_cast<uint32_t>(keys[i]);
            const double value = from[where], weight = importance == nullptr ? 1.0 : importance[where];
            values[i] = from[where];
            weight_before[i] = total;
            sum_before[i] = sum;
            total += weight;
            sum += weight * value;
            squares += weight * value * value;
        }
        weight_before[size] = total;
        sum_before[size] = sum;
    }

    // The nearest codes. `order` begins as that of the last call, from which little moves.
    void part(const Grid& grid, Partition& partition) const {
        float levels[kMaxLevels];
        levels_of(grid.scales, coder.bits, grid.offset, levels);
        const int count = coder.levels();
        uint8_t* order = partition.order;
        for (int i = 1; i < count; ++i) {
            const uint8_t moved = order[i];
            int j = i;
            for (; j > 0 && levels[order[j - 1]] > levels[moved]; --j) order[j] = order[j - 1];
            order[j] = moved;
        }
        partition.bound[0] = 0;
        for (int i = 1; i < count; ++i) {
            const float middle = (levels[order[i]] + levels[order[i - 1]]) / 2;
            const float* begin = values;
            int64_t length = coder.size;
            while (length > 1) {
                const int64_t half = length / 2;
                begin += begin[half - 1] <= middle ? half : 0;
                length -= half;
            }
            const auto found = static_cast<int32_t>(begin - values + (*begin <= middle ? 1 : 0));
            partition.bound[i] = std::max(found, partition.bound[i - 1]);
        }
        partition.bound[count] = static_cast<int32_t>(coder.size);
    }

    void totals_of(const Partition& partition, Totals& totals) const {
        for (int i = 0; i < coder.levels(); ++i) {
            const int64_t begin = partition.bound[i], end = partition.bound[i + 1];
            totals.count[partition.order[i]] = count_of(begin, end);
            totals.sum[partition.order[i]] = sum_of(begin, end);
        }
    }

    // Least squares: the scales of given codes. False if they cannot be told.
    bool solve(const Totals& totals, Grid& grid) const {
        const int n = coder.unknowns(), bits = coder.bits;
        double a[kMaxUnknowns][kMaxUnknowns] = {}, x[kMaxUnknowns] = {};
        for (int pattern = 0; pattern < coder.levels(); ++pattern) {
            double sign[kMaxUnknowns];
            for (int plane = 0; plane < bits; ++plane) sign[plane] = (pattern >> plane & 1) != 0 ? 1.0 : -1.0;
            if (n > bits) sign[bits] = 1.0;
            for (int i = 0; i < n; ++i) {
                x[i] += sign[i] * totals.sum[pattern];
                for (int j = 0; j <= i; ++j) a[i][j] += sign[i] * sign[j] * totals.count[pattern];
            }
        }
        const double ridge = kRidge * static_cast<double>(coder.size);
        for (int i = 0; i < n; ++i) a[i][i] += ridge;
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j <= i; ++j) {
                double sum = a[i][j];
                for (int k = 0; k < j; ++k) sum -= a[i][k] * a[j][k];
                if (i == j && !(sum > 0)) return false;
                a[i][j] = i == j ? std::sqrt(sum) : sum / a[j][j];
            }
            for (int k = 0; k < i; ++k) x[i] -= a[i][k] * x[k];
            x[i] /= a[i][i];
        }
        for (int i = n - 1; i >= 0; --i) {
            for (int k = i + 1; k < n; ++k) x[i] -= a[k][i] * x[k];
            x[i] /= a[i][i];
        }
        for (int plane = 0; plane < bits; ++plane) grid.scales[plane] = static_cast<float>(x[plane]);
        grid.offset = n > bits ? static_cast<float>(x[bits]) : 0.0F;
        return true;
    }

    double error_of(const Grid& grid, const Totals& totals) const {
        float levels[kMaxLevels];
        levels_of(grid.scales, coder.bits, grid.offset, levels);
        double error = squares;
        for (int pattern = 0; pattern < coder.levels(); ++pattern) {
            const double level = levels[pattern];
            error += level * (level * totals.count[pattern] - 2 * totals.sum[pattern]);
        }
        return error;
    }

    // Rounds the scales, and chooses codes and offset anew for what is left of them.
    void offer(const Grid& found, Partition partition, Best& best) const {
        Grid grid = found;
        // Falling magnitudes: a negative scale is a flipped plane, and the nearest codes see to that.
        for (int plane = 0; plane < coder.bits; ++plane) grid.scales[plane] = std::fabs(grid.scales[plane]);
        std::sort(grid.scales, grid.scales + coder.bits, [](float a, float b) { return a > b; });
        for (int plane = 0; plane < coder.bits; ++plane) grid.scales[plane] = stored(grid.scales[plane], coder.dtype);
        part(grid, partition);
        Totals totals;
        totals_of(partition, totals);
        if (coder.has_offset) {
            float levels[kMaxLevels];
            levels_of(grid.scales, coder.bits, grid.offset, levels);
            double rest = sum_of(0, coder.size);
            for (int pattern = 0; pattern < coder.levels(); ++pattern) rest -= levels[pattern] * totals.count[pattern];
            grid.offset += static_cast<float>(rest / count_of(0, coder.size));
        }
        const double error = error_of(grid, totals);
        if (error < best.error) {
            best.error = error;
            best.grid = grid;
            best.partition = partition;
        }
    }

    // From the codes that `totals` sums up, rounds of solving scales and taking the nearest codes.
    Grid alternate(Totals totals, Grid grid, Partition& partition) const {
        Partition before;
        for (int round = 0; round < coder.rounds; ++round) {
            if (!solve(totals, grid)) return grid;
            before = partition;
            part(grid, partition);
            // Codes that stay give the same scales again: such a group has arrived. The first round has none before it.
            const auto levels = static_cast<size_t>(coder.levels());
            if (round > 0 && std::memcmp(before.order, partition.order, levels) == 0 &&
                std::memcmp(before.bound, partition.bound, (levels + 1) * sizeof(int32_t)) == 0) {
                return grid;
            }
            totals_of(partition, totals);
        }
        solve(totals, grid);
        return grid;
    }

    // Plane by plane the signs and the mean magnitude of what is left, as stored.
    Grid greedy(float* rest, Totals& totals) const {
        const int64_t size = coder.size;
        const double whole = count_of(0, size);
        Grid grid{};
        if (coder.has_offset) grid.offset = static_cast<float>(sum_of(0, size) / whole);
        for (int64_t i = 0; i < size; ++i) rest[i] = values[i] - grid.offset;
        float found[kMaxBits];
        uint8_t* codes = reinterpret_cast<uint8_t*>(rest + size);
        std::memset(codes, 0, static_cast<size_t>(size));
        for (int plane = 0; plane < coder.bits; ++plane) {
            double sum = 0;
            for (int64_t i = 0; i < size; ++i) sum += count_of(i, i + 1) * std::fabs(static_cast<double>(rest[i]));
            const float scale = stored(static_cast<float>(sum / whole), coder.dtype);
            for (int64_t i = 0; i < size; ++i) {
                const bool positive = rest[i] >= 0;  // sign(0) is +1: a code has no zero
                rest[i] -= positive ? scale : -scale;
                codes[i] = static_cast<uint8_t>(codes[i] | (positive ? 1 : 0) << plane);
            }
            found[plane] = scale;
        }
        // A few large values among small ones make a later scale larger than an earlier one.
        int order[kMaxBits];
        for (int plane = 0; plane < coder.bits; ++plane) order[plane] = plane;
        std::stable_sort(order, order + coder.bits, [&](int a, int b) { return found[a] > found[b]; });
        std::fill(totals.count, totals.count + coder.levels(), 0.0);
        std::fill(totals.sum, totals.sum + coder.levels(), 0.0);
        for (int plane = 0; plane < coder.bits; ++plane) grid.scales[plane] = found[order[plane]];
        for (int64_t i = 0; i < size; ++i) {
            int pattern = 0;
            for (int plane = 0; plane < coder.bits; ++plane) pattern |= (codes[i] >> order[plane] & 1) << plane;
            totals.count[pattern] += count_of(i, i + 1);
            totals.sum[pattern] += sum_of(i, i + 1);
        }
        return grid;
    }

    // The best of a few even grids around the middle of the group, around zero without an offset.
    Grid even(Partition& partition, Totals& totals) const {
        const float low = values[0], high = values[coder.size - 1];
        const float reach = coder.has_offset ? (high - low) / 2 : std::max(std::fabs(low), std::fabs(high));
        double least = INFINITY;
        Grid best{};
        for (const float clip : kClips) {
            Grid grid{};
            grid.offset = coder.has_offset ? (low + high) / 2 : 0.0F;
            const float step = clip * reach / static_cast<float>(coder.levels() - 1);
            for (int plane = 0; plane < coder.bits; ++plane) {
                grid.scales[plane] = step * static_cast<float>(1 << (coder.bits - 1 - plane));
            }
            Totals found;
            part(grid, partition);
            totals_of(partition, found);
            const double error = error_of(grid, found);
            if (error < least) {
                least = error;
                best = grid;
                totals = found;
            }
        }
        return best;
    }

    void code(float* rest, uint8_t* patterns, float* scales, float* offset) const {
        Partition partition{};
        for (int i = 0; i < coder.levels(); ++i) partition.order[i] = static_cast<uint8_t>(i);
        Best best;
        Totals totals;
        Grid start = greedy(rest, totals);
        offer(start, partition, best);
        offer(alternate(totals, start, partition), partition, best);
        if (coder.bits > 2) {
            start = even(partition, totals);
            offer(start, partition, best);
            offer(alternate(totals, start, partition), partition, best);
        }
        for (int i = 0; i < coder.levels(); ++i) {
            for (int32_t j = best.partition.bound[i]; j < best.partition.bound[i + 1]; ++j) {
                patterns[static_cast<uint32_t>(keys[j])] = best.partition.order[i];
            }
        }
        std::copy(best.grid.scales, best.grid.scales + coder.bits, scales);
        *offset = best.grid.offset;
    }
};

void Coder::operator()(int64_t item) {
    const int64_t padded = ceil_div(size + 1, 8) * 8;
    const Block keys = block_of(padded * 8), values = block_of(padded * 4), rest = block_of(padded * 5);
    const Block before = block_of(padded * 8), sums = block_of(padded * 8);
    if (!keys || !values || !rest || !before || !sums) {
        failed = true;
        return;
    }
    Group group{*this, static_cast<uint64_t*>(keys.get()), static_cast<float*>(values.get()),
                static_cast<double*>(before.get()), static_cast<double*>(sums.get())};
    const int64_t end = std::min(count, (item + 1) * kGroupsPerItem);
    for (int64_t i = item * kGroupsPerItem; i < end; ++i) {
        group.sort(groups + i * size, importance == nullptr ? nullptr : importance + i * size);
        group.code(static_cast<float*>(rest.get()), patterns + i * size, scales + i * bits, offsets + i);
    }
}

}  // namespace
}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_bcq_alternate(const float* groups, const float* importance, int64_t count, int64_t size, int32_t bits,
                          int32_t rounds, int32_t has_offset, int32_t scale_dtype, uint8_t* patterns, float* scales,
                          float* offsets, int32_t threads) {
    if (groups == nullptr || patterns == nullptr || scales == nullptr || offsets == nullptr) return HCX_NULL_POINTER;
    if (count < 0 || size < 1 || size > INT32_MAX / 16 || rounds < 0) return HCX_BAD_SHAPE;
    if (bits < 1 || bits > kMaxBits) return HCX_BAD_BITS;
    if (scale_dtype < HCX_FP16 || scale_dtype > HCX_FP32) return HCX_BAD_SCALE_DTYPE;
    Coder coder{count, size, bits, rounds, scale_dtype, has_offset != 0, groups, importance, patterns, scales, offsets};
    parallel(threads, ceil_div(count, kGroupsPerItem), coder);
    return coder.failed ? HCX_NO_MEMORY : HCX_OK;
}

}  // extern "C"
