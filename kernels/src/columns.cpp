// Codes column by column under a Gram matrix: error feedback (GPTQ: Frantar et al., ICLR 2023, section 3) and coordinate
// descent. Rows do not depend on each other, so each is taken through a block of columns at once.
// hcx/compress/feedback.py holds the same loops in torch, which is what they are checked against.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "layout.h"
#include "levels.h"
#include "pool.h"

namespace hcx {
namespace {

constexpr int kMaxLevels = 1 << kMaxBits, kMaxBlock = 64;
constexpr int64_t kRowsPerItem = 16;

// The grids of a matrix: scales [rows, groups, bits], offsets [rows, groups].
struct Grids {
    const float *scales, *offsets;
    int64_t groups, group;
    int bits;

    void levels_of_group(int64_t row, int64_t index, float* levels) const {
        levels_of(scales + (row * groups + index) * bits, bits, offsets[row * groups + index], levels);
    }
};

// The first of the nearest levels.
int nearest_of(const float* levels, int begin, int count, int step, float goal) {
    int best = begin;
    float least = std::fabs(levels[begin] - goal);
    for (int i = 1; i < count; ++i) {
        const float distance = std::fabs(levels[begin + i * step] - goal);
        if (distance < least) {
            least = distance;
            best = begin + i * step;
        }
    }
    return best;
}

struct FeedBack {
    Grids grids;
    int64_t rows, columns, start, stop;
    const int64_t* order;
    const float* upper;
    float *current, *errors;
    uint8_t* patterns;

    void operator()(int64_t item) const {
        float levels[kMaxLevels];
        const int64_t end = std::min(rows, (item + 1) * kRowsPerItem), width = stop - start;
        for (int64_t row = item * kRowsPerItem; row < end; ++row) {
            float* now = current + row * columns;
            int64_t known = -1;
            for (int64_t column = start; column < stop; ++column) {
                const int64_t where = order[column], index = where / grids.group;
                if (index != known) grids.levels_of_group(row, known = index, levels);
                const int chosen = nearest_of(levels, 0, 1 << grids.bits, 1, now[column]);
                const float* shares = upper + column * columns;
                const float error = (now[column] - levels[chosen]) / shares[column];
                patterns[row * columns + where] = static_cast<uint8_t>(chosen);
                errors[row * width + column - start] = error;
                for (int64_t later = column + 1; later < stop; ++later) now[later] -= error * shares[later];
            }
        }
    }
};

struct Descend {
    Grids grids;
    int64_t rows, columns, start, stop;
    int frozen;
    const float* gram;
    float *pull, *deltas;
    uint8_t* patterns;

    void operator()(int64_t item) const {
        float levels[kMaxLevels];
        const int64_t end = std::min(rows, (item + 1) * kRowsPerItem), width = stop - start;
        const int kept = (1 << frozen) - 1, free = 1 << (grids.bits - frozen);
        for (int64_t row = item * kRowsPerItem; row < end; ++row) {
            float* pulled = pull + row * width;
            int64_t known = -1;
            for (int64_t place = 0; place < width; ++place) {
                const int64_t column = start + place, index = column / grids.group;
                if (index != known) grids.levels_of_group(row, known = index, levels);
                const float* shares = gram + column * columns;
                uint8_t& pattern = patterns[row * columns + column];
                const float value = levels[pattern], goal = value + pulled[place] / shares[column];
                const int chosen = nearest_of(levels, pattern & kept, free, 1 << frozen, goal);
                const float delta = levels[chosen] - value;
                pattern = static_cast<uint8_t>(chosen);
                deltas[row * width + place] = delta;
                if (delta != 0) {
                    for (int64_t later = 0; later < width; ++later) pulled[later] -= delta * shares[start + later];
                }
            }
        }
    }
};

int32_t check(const hcx_bcq_columns* block) {
    if (block == nullptr || block->scales == nullptr || block->offsets == nullptr || block->patterns == nullptr) {
        return HCX_NULL_POINTER;
    }
    if (block->bits < 1 || block->bits > kMaxBits) return HCX_BAD_BITS;
    if (block->group < 1) return HCX_BAD_GROUP;
    if (block->rows < 0 || block->columns < 1 || block->start < 0 || block->stop > block->columns ||
        block->start >= block->stop || block->stop - block->start > kMaxBlock) {
        return HCX_BAD_SHAPE;
    }
    return HCX_OK;
}

Grids grids_of(const hcx_bcq_columns& block) {
    return {block.scales, block.offsets, ceil_div(block.columns, block.group), block.group, block.bits};
}

}  // namespace
}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_bcq_feed_back(const hcx_bcq_columns* block, const int64_t* order, const float* upper, float* current,
                          float* errors, int32_t threads) {
    const int32_t status = check(block);
    if (status != HCX_OK) return status;
    if (order == nullptr || upper == nullptr || current == nullptr || errors == nullptr) return HCX_NULL_POINTER;
    for (int64_t column = block->start; column < block->stop; ++column) {
        if (order[column] < 0 || order[column] >= block->columns) return HCX_BAD_SHAPE;
    }
    FeedBack body{grids_of(*block), block->rows, block->columns, block->start, block->stop, order, upper, current,
                  errors, block->patterns};
    return parallel(threads, ceil_div(block->rows, kRowsPerItem), body);
}

int32_t hcx_bcq_choose_codes(const hcx_bcq_columns* block, const float* gram, float* pull, float* deltas,
                             int32_t frozen, int32_t threads) {
    const int32_t status = check(block);
    if (status != HCX_OK) return status;
    if (gram == nullptr || pull == nullptr || deltas == nullptr) return HCX_NULL_POINTER;
    if (frozen < 0 || frozen >= block->bits) return HCX_BAD_BITS;
    Descend body{grids_of(*block), block->rows, block->columns, block->start, block->stop, frozen, gram, pull, deltas,
                 block->patterns};
    return parallel(threads, ceil_div(block->rows, kRowsPerItem), body);
}

}  // extern "C"
