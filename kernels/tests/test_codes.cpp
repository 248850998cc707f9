// Codes of weights: a slow second optimum, stored scales, threads, and refusals of what does not fit.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace {

struct Groups {
    int64_t count, size;
    int bits, offset, dtype;
    std::vector<float> values, importance, scales, offsets;
    std::vector<uint8_t> patterns;

    Groups(int64_t count, int64_t size, int bits, int offset, int dtype, bool weighted, uint32_t seed)
        : count(count), size(size), bits(bits), offset(offset), dtype(dtype) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0F, 0.02F);
        std::uniform_real_distribution<float> uniform(0.1F, 2.0F);
        for (int64_t i = 0; i < count * size; ++i) values.push_back(normal(random));
        for (int64_t i = 0; weighted && i < count * size; ++i) importance.push_back(uniform(random));
        // A group of zeros, one of equal weights, one with an outlier, one that is tiny.
        for (int64_t i = 0; i < size; ++i) {
            values[static_cast<size_t>(i)] = 0;
            if (count > 3) {
                values[static_cast<size_t>(size + i)] = 0.01F;
                values[static_cast<size_t>(3 * size + i)] *= 1e-6F;
            }
        }
        if (count > 3) values[static_cast<size_t>(2 * size)] = 3.0F;
        patterns.resize(values.size());
        scales.resize(static_cast<size_t>(count * bits));
        offsets.resize(static_cast<size_t>(count));
    }

    int32_t code(int rounds, int threads) {
        return hcx_bcq_alternate(values.data(), importance.empty() ? nullptr : importance.data(), count, size, bits,
                                 rounds, offset, dtype, patterns.data(), scales.data(), offsets.data(), threads);
    }

    float level(int64_t group, int pattern) const {
        float value = 0;
        for (int plane = 0; plane < bits; ++plane) {
            const float scale = scales[static_cast<size_t>(group * bits + plane)];
            value += (pattern >> plane & 1) != 0 ? scale : -scale;
        }
        return value + offsets[static_cast<size_t>(group)];
    }

    double error(int64_t group) const {
        double sum = 0;
        for (int64_t i = group * size; i < (group + 1) * size; ++i) {
            const auto at = static_cast<size_t>(i);
            const double rest = static_cast<double>(values[at]) - level(group, patterns[at]);
            sum += (importance.empty() ? 1.0 : importance[at]) * rest * rest;
        }
        return sum;
    }
};

void codes_are_nearest_and_more_rounds_are_never_worse() {
    for (int bits = 1; bits <= 8; ++bits) {
        for (const bool weighted : {false, true}) {
            Groups groups(70, bits == 3 ? 1 : 37, bits, bits % 2, bits % 3, weighted, static_cast<uint32_t>(bits));
            CHECK(groups.code(15, 1) == HCX_OK);
            std::vector<double> found;
            for (int64_t group = 0; group < groups.count; ++group) {
                found.push_back(groups.error(group));
                const float* scales = groups.scales.data() + group * bits;
                CHECK(std::is_sorted(scales, scales + bits, [](float a, float b) { return a > b; }));
                CHECK(scales[bits - 1] >= 0 && std::isfinite(scales[0]));
                if (groups.offset == 0) CHECK(groups.offsets[static_cast<size_t>(group)] == 0);
                for (int64_t i = group * groups.size; groups.offset == 0 && i < (group + 1) * groups.size; ++i) {
                    const float value = groups.values[static_cast<size_t>(i)];
                    const float own = std::fabs(groups.level(group, groups.patterns[static_cast<size_t>(i)]) - value);
                    for (int pattern = 0; pattern < 1 << bits; ++pattern) {
                        CHECK(own <= std::fabs(groups.level(group, pattern) - value) + 1e-7F);
                    }
                }
            }
            const auto patterns = groups.patterns;
            CHECK(groups.code(15, 3) == HCX_OK);
            CHECK(groups.patterns == patterns);
            // Rounding to a narrower type may undo what rounds gain.
            if (groups.dtype != HCX_FP32) continue;
            CHECK(groups.code(0, 1) == HCX_OK);
            for (int64_t group = 0; group < groups.count; ++group) {
                CHECK(found[static_cast<size_t>(group)] <= groups.error(group) * (1 + 1e-6) + 1e-12);
            }
        }
    }
}

// Two scales of five weights: every assignment of codes, each with its least-squares scales.
void two_planes_come_near_the_optimum_of_all_assignments() {
    Groups groups(40, 5, 2, 0, HCX_FP32, false, 9);
    CHECK(groups.code(15, 1) == HCX_OK);
    double sum = 0, least_sum = 0;
    for (int64_t group = 4; group < groups.count; ++group) {
        double least = INFINITY;
        for (int codes = 0; codes < 1 << 10; ++codes) {
            double xy = 0, x1 = 0, x2 = 0, squares = 0;
            for (int i = 0; i < 5; ++i) {
                const double first = (codes >> (2 * i) & 1) * 2 - 1, second = (codes >> (2 * i + 1) & 1) * 2 - 1;
                const double value = groups.values[static_cast<size_t>(group * 5 + i)];
                xy += first * second;
                x1 += first * value;
                x2 += second * value;
                squares += value * value;
            }
            const double determinant = 25 - xy * xy;
            if (determinant < 1e-9) continue;
            const double a = (5 * x1 - xy * x2) / determinant, b = (5 * x2 - xy * x1) / determinant;
            least = std::min(least, squares - a * x1 - b * x2);
        }
        CHECK(groups.error(group) >= least - 1e-9);
        sum += groups.error(group);
        least_sum += least;
    }
    CHECK(sum < 3 * least_sum);
}

void columns_are_taken_through_their_block() {
    constexpr int64_t rows = 21, columns = 40;
    constexpr int bits = 2, group = 16;
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    const auto draw = [&](int64_t count) {
        std::vector<float> found;
        for (int64_t i = 0; i < count; ++i) found.push_back(normal(random));
        return found;
    };
    const auto scales = draw(rows * 3 * bits), offsets = draw(rows * 3), before = draw(rows * columns);
    auto gram = draw(columns * columns);
    std::vector<int64_t> order;
    for (int64_t i = 0; i < columns; ++i) {
        order.push_back((i * 7) % columns);
        gram[static_cast<size_t>(i * columns + i)] = 5 + static_cast<float>(i % 3);
    }
    const auto level = [&](int64_t row, int64_t column, int pattern) {
        const float* scale = scales.data() + (row * 3 + column / group) * bits;
        const float first = (pattern & 1) != 0 ? scale[0] : -scale[0];
        return first + ((pattern & 2) != 0 ? scale[1] : -scale[1]) + offsets[static_cast<size_t>(row * 3 + column / group)];
    };
    std::vector<uint8_t> patterns(rows * columns, 3);
    const hcx_bcq_columns block{rows, columns, 8, 24, group, scales.data(), offsets.data(), patterns.data(), bits, 0};
    auto current = before;
    std::vector<float> errors(rows * 16);
    CHECK(hcx_bcq_feed_back(&block, order.data(), gram.data(), current.data(), errors.data(), 2) == HCX_OK);
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<float> now(before.begin() + row * columns, before.begin() + (row + 1) * columns);
        for (int64_t column = 8; column < 24; ++column) {
            const int64_t where = order[static_cast<size_t>(column)];
            int best = 0;
            const float value = now[static_cast<size_t>(column)];
            for (int pattern = 1; pattern < 4; ++pattern) {
                if (std::fabs(level(row, where, pattern) - value) < std::fabs(level(row, where, best) - value)) best = pattern;
            }
            CHECK(patterns[static_cast<size_t>(row * columns + where)] == best);
            const float error = (value - level(row, where, best)) / gram[static_cast<size_t>(column * columns + column)];
            CHECK(errors[static_cast<size_t>(row * 16 + column - 8)] == error);
            for (int64_t later = column + 1; later < 24; ++later) {
                now[static_cast<size_t>(later)] -= error * gram[static_cast<size_t>(column * columns + later)];
            }
        }
        for (const int64_t untouched : {0, 7, 24, 39}) {
            const auto at = static_cast<size_t>(row * columns + untouched);
            CHECK(current[at] == before[at]);
        }
    }
    // Descent with the first plane frozen keeps its bits, and moves each weight to where it says.
    const auto old = patterns;
    auto pull = draw(rows * 16);
    std::vector<float> deltas(rows * 16);
    CHECK(hcx_bcq_choose_codes(&block, gram.data(), pull.data(), deltas.data(), 1, 3) == HCX_OK);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            const auto at = static_cast<size_t>(row * columns + column);
            CHECK((patterns[at] & 1) == (old[at] & 1));
            if (column < 8 || column >= 24) {
                CHECK(patterns[at] == old[at]);
                continue;
            }
            const float moved = level(row, column, patterns[at]) - level(row, column, old[at]);
            CHECK(deltas[static_cast<size_t>(row * 16 + column - 8)] == moved);
        }
    }
}

void refuses_what_does_not_fit() {
    Groups groups(4, 8, 2, 0, HCX_FP16, false, 1);
    const auto code = [&](const float* values, int64_t count, int64_t size, int bits, int rounds, int dtype) {
        return hcx_bcq_alternate(values, nullptr, count, size, bits, rounds, 0, dtype, groups.patterns.data(),
                                 groups.scales.data(), groups.offsets.data(), 1);
    };
    const float* values = groups.values.data();
    CHECK(code(nullptr, 4, 8, 2, 15, HCX_FP16) == HCX_NULL_POINTER);
    CHECK(code(values, -1, 8, 2, 15, HCX_FP16) == HCX_BAD_SHAPE);
    CHECK(code(values, 4, 0, 2, 15, HCX_FP16) == HCX_BAD_SHAPE);
    CHECK(code(values, 4, 8, 2, -1, HCX_FP16) == HCX_BAD_SHAPE);
    CHECK(code(values, 4, 8, 0, 15, HCX_FP16) == HCX_BAD_BITS);
    CHECK(code(values, 4, 8, 9, 15, HCX_FP16) == HCX_BAD_BITS);
    CHECK(code(values, 4, 8, 2, 15, 3) == HCX_BAD_SCALE_DTYPE);
    CHECK(code(values, 0, 8, 2, 15, HCX_FP16) == HCX_OK);

    std::vector<int64_t> order = {0, 1, 2, 3, 4, 5, 6, 8};
    std::vector<float> square(64, 1.0F), errors(32);
    hcx_bcq_columns block{4, 8, 0, 8, 8, groups.scales.data(), groups.offsets.data(), groups.patterns.data(), 2, 0};
    CHECK(hcx_bcq_feed_back(nullptr, order.data(), square.data(), square.data(), errors.data(), 1) == HCX_NULL_POINTER);
    CHECK(hcx_bcq_feed_back(&block, order.data(), square.data(), square.data(), errors.data(), 1) == HCX_BAD_SHAPE);
    CHECK(hcx_bcq_feed_back(&block, order.data(), nullptr, square.data(), errors.data(), 1) == HCX_NULL_POINTER);
    CHECK(hcx_bcq_choose_codes(&block, square.data(), errors.data(), errors.data(), 2, 1) == HCX_BAD_BITS);
    CHECK(hcx_bcq_choose_codes(&block, nullptr, errors.data(), errors.data(), 0, 1) == HCX_NULL_POINTER);
    for (const auto& [start, stop] : {std::pair<int64_t, int64_t>{-1, 8}, {0, 9}, {3, 3}, {0, 65}}) {
        block.start = start;
        block.stop = stop;
        CHECK(hcx_bcq_choose_codes(&block, square.data(), errors.data(), errors.data(), 0, 1) == HCX_BAD_SHAPE);
    }
    block.start = 0;
    block.stop = 8;
    block.group = 0;
    CHECK(hcx_bcq_choose_codes(&block, square.data(), errors.data(), errors.data(), 0, 1) == HCX_BAD_GROUP);
    block.bits = 9;
    CHECK(hcx_bcq_choose_codes(&block, square.data(), errors.data(), errors.data(), 0, 1) == HCX_BAD_BITS);
    block.scales = nullptr;
    CHECK(hcx_bcq_choose_codes(&block, square.data(), errors.data(), errors.data(), 0, 1) == HCX_NULL_POINTER);
}

}  // namespace

int main() {
    codes_are_nearest_and_more_rounds_are_never_worse();
    two_planes_come_near_the_optimum_of_all_assignments();
    columns_are_taken_through_their_block();
    refuses_what_does_not_fit();
    return report("codes");
}
