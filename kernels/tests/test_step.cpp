// A decoding step beside its formulas in fp64, on every instruction set, and refusals of what does not fit.
#include <cmath>

#include "check.h"

namespace {

constexpr int64_t kLayers = 2, kHidden = 40, kInner = 50, kHeads = 4, kKvHeads = 2, kDim = 22, kPlaces = 20, kBatch = 2;

std::vector<float> draw(std::mt19937& random, int64_t count, float size) {
    std::normal_distribution<float> normal(0.0F, size);
    std::vector<float> found(static_cast<size_t>(count));
    for (auto& value : found) value = normal(random);
    return found;
}

struct Block {
    std::vector<float> norm, post_norm;
    std::vector<Weight> inner, outer;
    std::vector<hcx_bcq_weight> handles, out;
};

struct Model {
    std::mt19937 random{7};
    std::vector<Block> blocks;
    std::vector<hcx_sublayer> sublayers;
    std::vector<float> norm, cosines, sines, keys, values;
    hcx_decoder decoder{};
    hcx_cache cache{};

    Model() {
        for (int64_t index = 0; index < 2 * kLayers; ++index) {
            Block block;
            block.norm = draw(random, kHidden, 1.0F);
            if (index < 2) block.post_norm = draw(random, kHidden, 1.0F);
            const bool attention = index % 2 == 0;
            const std::vector<int64_t> rows = attention ? std::vector<int64_t>{kHeads * kDim, kKvHeads * kDim, kKvHeads * kDim}
                                                        : std::vector<int64_t>{kInner, kInner};
            for (const int64_t count : rows) block.inner.emplace_back(count, kHidden, 2, kHidden, true, random());
            block.outer.emplace_back(kHidden, attention ? kHeads * kDim : kInner, 3, kHeads * kDim, false, random());
            blocks.push_back(std::move(block));
        }
        for (auto& block : blocks) {
            for (const auto& weight : block.inner) block.handles.push_back(weight.handle());
            block.out.push_back(block.outer[0].handle());
            sublayers.push_back({block.norm.data(), block.post_norm.empty() ? nullptr : block.post_norm.data(),
                                 block.handles.data(), block.out.data(), static_cast<int32_t>(block.handles.size()), 0});
        }
        norm = draw(random, kHidden, 1.0F);
        for (int64_t i = 0; i < kPlaces * kDim / 2; ++i) {
            const float angle = static_cast<float>(random() % 628) / 100;
            cosines.push_back(std::cos(angle));
            sines.push_back(std::sin(angle));
        }
        keys = draw(random, kLayers * kBatch * kPlaces * kKvHeads * kDim, 1.0F);
        values = draw(random, kLayers * kBatch * kPlaces * kKvHeads * kDim, 1.0F);
        decoder = {kLayers, kHidden, kInner, kHeads, kKvHeads, kDim, sublayers.data(), norm.data(), cosines.data(),
                   sines.data(), kPlaces, 1e-5F, 0.3F, 0.7F, 0.0F};
        point();
    }

    void point() {
        const int64_t place = kKvHeads * kDim, row = kPlaces * place;
        cache = {keys.data(), values.data(), kBatch * row, row, place, kPlaces};
    }

    int32_t step(const int64_t* positions, float* hidden, int isa, int threads) {
        return hcx_decode_step(&decoder, &cache, positions, kBatch, hidden, HCX_TABLES15, isa, threads);
    }

    std::vector<double> product(const std::vector<Weight>& weights, const std::vector<double>& x) const {
        std::vector<double> y;
        for (const auto& weight : weights) {
            for (int64_t row = 0; row < weight.shape.rows; ++row) {
                double sum = 0;
                for (int64_t column = 0; column < weight.shape.columns; ++column) {
                    sum += weight.dense(row, column) * x[static_cast<size_t>(column)];
                }
                y.push_back(sum);
            }
        }
        return y;
    }

    static std::vector<double> normed(const std::vector<double>& x, const std::vector<float>& weight) {
        double squares = 0;
        for (const double value : x) squares += value * value;
        const double inverse = 1 / std::sqrt(squares / static_cast<double>(x.size()) + 1e-5);
        std::vector<double> y;
        for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] * inverse * weight[i]);
        return y;
    }

    // One row by the formulas; the cache as it was before.
    std::vector<double> by_hand(int64_t row, int64_t position, const float* embedding) const {
        std::vector<double> hidden(embedding, embedding + kHidden);
        for (int64_t index = 0; index < 2 * kLayers; ++index) {
            const Block& block = blocks[static_cast<size_t>(index)];
            std::vector<double> inner = product(block.inner, normed(hidden, block.norm)), narrow;
            if (index % 2 == 1) {
                for (size_t i = 0; i < kInner; ++i) {
                    narrow.push_back(inner[i] / (1 + std::exp(-inner[i])) * inner[i + kInner]);
                }
            } else {
                for (int64_t head = 0; head < kHeads + kKvHeads; ++head) {
                    for (int64_t i = 0; i < kDim / 2; ++i) {
                        const auto at = static_cast<size_t>(head * kDim + i), angle = static_cast<size_t>(position * kDim / 2 + i);
                        const double a = inner[at], b = inner[at + kDim / 2];
                        inner[at] = a * cosines[angle] - b * sines[angle];
                        inner[at + kDim / 2] = b * cosines[angle] + a * sines[angle];
                    }
                }
                for (int64_t head = 0; head < kHeads; ++head) {
                    const int64_t group = head / (kHeads / kKvHeads);
                    const auto stored = [&](const std::vector<float>& from, int64_t offset, int64_t t, int64_t i) {
                        if (t == position) return inner[static_cast<size_t>((offset + group) * kDim + i)];
                        return static_cast<double>(
                            from[static_cast<size_t>((((index / 2) * kBatch + row) * kPlaces + t) * kKvHeads * kDim + group * kDim + i)]);
                    };
                    std::vector<double> weights;
                    double total = 0;
                    for (int64_t t = 0; t <= position; ++t) {
                        double score = 0;
                        for (int64_t i = 0; i < kDim; ++i) {
                            score += inner[static_cast<size_t>(head * kDim + i)] * stored(keys, kHeads, t, i);
                        }
                        weights.push_back(std::exp(0.3 * score));
                        total += weights.back();
                    }
                    for (int64_t i = 0; i < kDim; ++i) {
                        double sum = 0;
                        for (int64_t t = 0; t <= position; ++t) {
                            sum += weights[static_cast<size_t>(t)] * stored(values, kHeads + kKvHeads, t, i);
                        }
                        narrow.push_back(sum / total);
                    }
                }
            }
            std::vector<double> branch = product(block.outer, narrow);
            if (!block.post_norm.empty()) branch = normed(branch, block.post_norm);
            for (size_t i = 0; i < kHidden; ++i) hidden[i] += 0.7 * branch[i];
        }
        return normed(hidden, norm);
    }
};

void a_step_is_its_formulas_on_every_instruction_set() {
    Model model;
    const int64_t positions[] = {17, 0};
    const auto embeddings = draw(model.random, kBatch * kHidden, 1.0F);
    std::vector<std::vector<double>> expected;
    for (int64_t row = 0; row < kBatch; ++row) {
        expected.push_back(model.by_hand(row, positions[row], embeddings.data() + row * kHidden));
    }
    const auto keys = model.keys, values = model.values;
    std::vector<float> first;
    for (const int isa : {HCX_ISA_PORTABLE, HCX_ISA_AVX2, HCX_ISA_AVX512, HCX_ISA_BEST}) {
        model.keys = keys;
        model.values = values;
        model.point();
        auto hidden = embeddings;
        CHECK(model.step(positions, hidden.data(), isa, 2) == HCX_OK);
        for (int64_t row = 0; row < kBatch; ++row) {
            for (int64_t i = 0; i < kHidden; ++i) {
                const double wanted = expected[static_cast<size_t>(row)][static_cast<size_t>(i)];
                CHECK(std::fabs(hidden[static_cast<size_t>(row * kHidden + i)] - wanted) < 5e-3);
            }
        }
        if (first.empty()) first = hidden;
        CHECK(hidden == first);
        // Other places stay as they were.
        for (int64_t layer = 0; layer < kLayers; ++layer) {
            for (int64_t row = 0; row < kBatch; ++row) {
                for (int64_t t = 0; t < kPlaces; ++t) {
                    const auto at = static_cast<size_t>(((layer * kBatch + row) * kPlaces + t) * kKvHeads * kDim);
                    CHECK((model.keys[at] != keys[at]) == (t == positions[row]));
                    CHECK((model.values[at] != values[at]) == (t == positions[row]));
                }
            }
        }
    }
}

void refuses_what_does_not_fit() {
    Model model;
    std::vector<float> hidden(kBatch * kHidden);
    const int64_t positions[] = {3, 4}, beyond[] = {3, kPlaces}, before[] = {-1, 0};
    const auto step = [&](const int64_t* where) { return model.step(where, hidden.data(), HCX_ISA_BEST, 1); };
    CHECK(step(nullptr) == HCX_NULL_POINTER);
    CHECK(step(beyond) == HCX_BAD_SHAPE);
    CHECK(step(before) == HCX_BAD_SHAPE);
    CHECK(model.step(positions, nullptr, HCX_ISA_BEST, 1) == HCX_NULL_POINTER);
    CHECK(model.step(positions, hidden.data(), 9, 1) == HCX_BAD_ISA);
    const auto whole = model.decoder;
    const auto changed = [&](auto change) {
        model.decoder = whole;
        change(model.decoder);
        const int32_t status = step(positions);
        model.decoder = whole;
        return status;
    };
    CHECK(changed([](hcx_decoder& d) { d.sublayers = nullptr; }) == HCX_NULL_POINTER);
    CHECK(changed([](hcx_decoder& d) { d.norm = nullptr; }) == HCX_NULL_POINTER);
    CHECK(changed([](hcx_decoder& d) { d.layers = 0; }) == HCX_BAD_SHAPE);
    CHECK(changed([](hcx_decoder& d) { d.head_dim = 21; }) == HCX_BAD_SHAPE);
    CHECK(changed([](hcx_decoder& d) { d.kv_heads = 3; }) == HCX_BAD_SHAPE);
    CHECK(changed([](hcx_decoder& d) { d.intermediate = 49; }) == HCX_BAD_SHAPE);
    CHECK(changed([](hcx_decoder& d) { d.hidden = 41; }) == HCX_BAD_SHAPE);
    CHECK(changed([](hcx_decoder& d) { d.positions = 4; }) == HCX_BAD_SHAPE);
    model.cache.row_stride = 1;
    CHECK(step(positions) == HCX_BAD_SHAPE);
    model.point();
    model.sublayers[1].norm = nullptr;
    CHECK(step(positions) == HCX_NULL_POINTER);
}

}  // namespace

int main() {
    a_step_is_its_formulas_on_every_instruction_set();
    refuses_what_does_not_fit();
    return report("step");
}
