// Products: exact where sums are exact, the same bits on every instruction set and number of threads, refusals.
#include <cmath>

#include "check.h"

namespace {

constexpr int kMethods[] = {HCX_TABLES8, HCX_CODES8, HCX_TABLES15};
constexpr int kIsas[] = {HCX_ISA_PORTABLE, HCX_ISA_AVX2, HCX_ISA_AVX512};

struct Case {
    int64_t rows, columns, group, batch;
};
constexpr Case kCases[] = {{1, 1, 32, 1},     {17, 33, 32, 2},  {64, 128, 128, 3}, {130, 577, 577, 5},
                           {70, 400, 160, 9}, {65, 515, 96, 1}, {16, 50, 50, 4},   {200, 640, 64, 19}};

std::vector<float> product(const std::vector<const Weight*>& weights, const std::vector<float>& x, int64_t batch,
                           int method, int isa, int threads) {
    std::vector<hcx_bcq_weight> handles;
    int64_t rows = 0;
    for (const Weight* weight : weights) {
        handles.push_back(weight->handle());
        rows += weight->shape.rows;
    }
    std::vector<float> y(static_cast<size_t>(batch * rows), -7.0F);
    CHECK(hcx_bcq_matmul(handles.data(), static_cast<int32_t>(handles.size()), x.data(), weights[0]->shape.columns,
                         batch, y.data(), rows, method, isa, threads) == HCX_OK);
    return y;
}

std::vector<float> inputs(int64_t count, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(count));
    for (auto& value : x) value = normal(random);
    return x;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

// In each segment the largest table entry is the limit of the tables, so tables hold the sums themselves; scales are
// powers of two. Every sum is exact in any order, and the result must be the dense product, bit for bit.
void exact_where_sums_are_exact() {
    for (const int limit : {127, 16383}) {
        for (const Case& c : kCases) {
            for (int bits = 1; bits <= 8; ++bits) {
                const Weight weight(c.rows, c.columns, bits, c.group, bits % 2 == 1, 11, true);
                std::mt19937 random(5);
                std::vector<float> x(static_cast<size_t>(c.batch * c.columns));
                for (auto& value : x) value = static_cast<float>(static_cast<int>(random() % 31) - 15);
                for (int64_t n = 0; n < c.batch; ++n) {
                    for (int64_t k = 0; k < c.columns; ++k) {
                        // One input of a segment takes its table to the limit; the others of that table are zero.
                        const int64_t within = k % c.group % 128;
                        const float only = within == 0 ? static_cast<float>(limit) : 0.0F;
                        if (within < 4) x[static_cast<size_t>(n * c.columns + k)] = only;
                    }
                }
                const int method = limit == 127 ? HCX_TABLES8 : HCX_TABLES15;
                const auto y = product({&weight}, x, c.batch, method, HCX_ISA_BEST, 2);
                int64_t wrong = 0;
                for (int64_t n = 0; n < c.batch; ++n) {
                    for (int64_t row = 0; row < c.rows; ++row) {
                        double sum = 0;
                        for (int64_t k = 0; k < c.columns; ++k) {
                            sum += weight.dense(row, k) * x[static_cast<size_t>(n * c.columns + k)];
                        }
                        wrong += y[static_cast<size_t>(n * c.rows + row)] != static_cast<float>(sum);
                    }
                }
                CHECK(wrong == 0);
            }
        }
    }
}

void every_instruction_set_gives_the_bits_of_the_portable_body() {
    for (const Case& c : kCases) {
        for (int bits = 1; bits <= 8; ++bits) {
            const Weight weight(c.rows, c.columns, bits, c.group, bits % 2 == 0, 3);
            const auto x = inputs(c.batch * c.columns, 4);
            for (const int method : kMethods) {
                const auto expected = product({&weight}, x, c.batch, method, HCX_ISA_PORTABLE, 1);
                for (const int isa : kIsas) {
                    for (const int threads : {1, 3}) {
                        CHECK(same_bits(expected, product({&weight}, x, c.batch, method, isa, threads)));
                    }
                }
            }
        }
    }
}

void a_row_of_a_batch_is_what_it_is_alone() {
    const Weight weight(100, 300, 3, 128, true, 8);
    const auto x = inputs(21 * 300, 9);
    for (const int method : kMethods) {
        const auto all = product({&weight}, x, 21, method, HCX_ISA_BEST, 2);
        for (int64_t n = 0; n < 21; ++n) {
            const std::vector<float> row(x.begin() + n * 300, x.begin() + (n + 1) * 300);
            const auto alone = product({&weight}, row, 1, method, HCX_ISA_BEST, 1);
            CHECK(std::memcmp(alone.data(), all.data() + n * 100, 400) == 0);
        }
    }
}

void weights_that_share_an_input_give_what_each_gives() {
    const Weight q(96, 256, 3, 128, true, 1), k(40, 256, 4, 128, false, 2), v(33, 256, 1, 128, true, 3);
    const int64_t batch = 20;  // above the crossover of some bit widths and below that of others
    const auto x = inputs(batch * 256, 4);
    for (const int method : {HCX_FAST, HCX_TABLES8, HCX_CODES8, HCX_TABLES15}) {
        const auto all = product({&q, &k, &v}, x, batch, method, HCX_ISA_BEST, 2);
        int64_t first = 0;
        for (const Weight* weight : {&q, &k, &v}) {
            const auto alone = product({weight}, x, batch, method, HCX_ISA_BEST, 1);
            for (int64_t n = 0; n < batch; ++n) {
                const auto rows = static_cast<size_t>(weight->shape.rows);
                CHECK(std::memcmp(alone.data() + n * weight->shape.rows, all.data() + n * 169 + first, 4 * rows) == 0);
            }
            first += weight->shape.rows;
        }
    }
}

void unusual_inputs_saturate_nothing() {
    const Weight weight(32, 256, 2, 128, true, 1);
    const auto zeros = product({&weight}, std::vector<float>(256, 0.0F), 1, HCX_TABLES8, HCX_ISA_BEST, 1);
    for (const float y : zeros) CHECK(y == 0.0F);
    for (const int method : kMethods) {
        for (const float extreme : {1e4F, 1e30F, 1e-30F, 1e-40F}) {
            auto x = inputs(256, 2);
            for (auto& value : x) value = value < 0 ? -extreme : extreme;
            const auto expected = product({&weight}, x, 1, method, HCX_ISA_PORTABLE, 1);
            for (const float y : expected) CHECK(std::isfinite(y));
            for (const int isa : kIsas) CHECK(same_bits(expected, product({&weight}, x, 1, method, isa, 1)));
        }
        for (const float poison : {NAN, INFINITY}) {
            auto x = inputs(256, 2);
            x[200] = poison;
            for (const int isa : kIsas) {
                for (const float y : product({&weight}, x, 1, method, isa, 1)) CHECK(std::isnan(y));
            }
        }
    }
}

void biqgemm_is_exact_and_its_tables_are_mirrored() {
    float x[8], table[256];
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (auto& value : x) value = normal(random);
    CHECK(hcx_biqgemm_table(x, table) == HCX_OK);
    for (int k = 0; k < 256; ++k) {
        double sum = 0;
        for (int t = 0; t < 8; ++t) sum += (k >> t & 1) != 0 ? x[t] : -x[t];
        CHECK(std::fabs(table[k] - sum) < 4e-6);  // 8 additions of numbers of size 1 in fp32
        CHECK(table[k] == -table[255 - k]);
    }
    for (const Case& c : kCases) {
        const Weight weight(c.rows, c.columns, 3, c.group, true, 6, true);
        int64_t bytes = 0;
        CHECK(hcx_biqgemm_packed_bytes(&weight.shape, &bytes) == HCX_OK);
        Memory packed = memory_of(bytes);
        CHECK(hcx_biqgemm_pack(&weight.shape, weight.planes.data(), static_cast<int64_t>(weight.planes.size()),
                               weight.scales.data(), static_cast<int64_t>(4 * weight.scales.size()),
                               weight.offset.data(), static_cast<int64_t>(4 * weight.offset.size()), packed.get(),
                               bytes) == HCX_OK);
        std::vector<float> inputs(static_cast<size_t>(c.batch * c.columns)), y(static_cast<size_t>(c.batch * c.rows));
        for (auto& value : inputs) value = static_cast<float>(static_cast<int>(random() % 31) - 15);
        for (const int threads : {1, 2, 5}) {
            CHECK(hcx_biqgemm_matmul(packed.get(), bytes, inputs.data(), c.columns, c.batch, y.data(), c.rows,
                                     threads) == HCX_OK);
            int64_t wrong = 0;
            for (int64_t n = 0; n < c.batch; ++n) {
                for (int64_t row = 0; row < c.rows; ++row) {
                    double sum = 0;
                    for (int64_t k = 0; k < c.columns; ++k) {
                        sum += weight.dense(row, k) * inputs[static_cast<size_t>(n * c.columns + k)];
                    }
                    wrong += y[static_cast<size_t>(n * c.rows + row)] != static_cast<float>(sum);
                }
            }
            CHECK(wrong == 0);
        }
        CHECK(hcx_biqgemm_matmul(packed.get(), bytes - 4, inputs.data(), c.columns, 1, y.data(), c.rows, 1) ==
              HCX_WRONG_SIZE);
        packed.get()[0] ^= 1;
        CHECK(hcx_biqgemm_matmul(packed.get(), bytes, inputs.data(), c.columns, 1, y.data(), c.rows, 1) ==
              HCX_BAD_HEADER);
    }
}

void bad_calls_are_refused() {
    const Weight a(32, 128, 2, 64, true, 1), b(32, 128, 2, 128, true, 1), c(32, 96, 2, 64, true, 1);
    std::vector<float> x(256), y(256);
    const auto call = [&](std::vector<hcx_bcq_weight> weights, const float* from, int64_t x_stride, int64_t batch,
                          float* to, int64_t y_stride, int method, int isa) {
        return hcx_bcq_matmul(weights.data(), static_cast<int32_t>(weights.size()), from, x_stride, batch, to, y_stride,
                              method, isa, 1);
    };
    const auto h = a.handle();
    const auto* odd = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x.data()) + 1);
    CHECK(call({h}, x.data(), 128, 1, y.data(), 32, 0, 0) == HCX_OK);
    CHECK(call({h}, x.data(), 128, 0, y.data(), 32, 0, 0) == HCX_OK);
    CHECK(call({h}, nullptr, 128, 1, y.data(), 32, 0, 0) == HCX_NULL_POINTER);
    CHECK(call({h}, odd, 128, 1, y.data(), 32, 0, 0) == HCX_MISALIGNED);
    CHECK(call({h}, x.data(), 127, 1, y.data(), 32, 0, 0) == HCX_BAD_SHAPE);
    CHECK(call({h}, x.data(), 128, 1, y.data(), 31, 0, 0) == HCX_BAD_SHAPE);
    CHECK(call({h}, x.data(), 128, -1, y.data(), 32, 0, 0) == HCX_BAD_SHAPE);
    CHECK(call({}, x.data(), 128, 1, y.data(), 32, 0, 0) != HCX_OK);
    CHECK(call({h}, x.data(), 128, 1, y.data(), 32, 9, 0) == HCX_BAD_METHOD);
    CHECK(call({h}, x.data(), 128, 1, y.data(), 32, 0, -1) == HCX_BAD_ISA);
    CHECK(call({h, b.handle()}, x.data(), 128, 1, y.data(), 64, 0, 0) == HCX_DIFFERENT_INPUTS);
    CHECK(call({h, c.handle()}, x.data(), 128, 1, y.data(), 64, 0, 0) == HCX_DIFFERENT_INPUTS);
    CHECK(call({{h.data, h.bytes - 64}}, x.data(), 128, 1, y.data(), 32, 0, 0) == HCX_WRONG_SIZE);
    CHECK(call({{nullptr, 0}}, x.data(), 128, 1, y.data(), 32, 0, 0) == HCX_NULL_POINTER);
}

}  // namespace

int main() {
    std::printf("best instruction set: %s\n", hcx_isa_text(hcx_best_isa()));
    exact_where_sums_are_exact();
    every_instruction_set_gives_the_bits_of_the_portable_body();
    a_row_of_a_batch_is_what_it_is_alone();
    weights_that_share_an_input_give_what_each_gives();
    unusual_inputs_saturate_nothing();
    biqgemm_is_exact_and_its_tables_are_mirrored();
    bad_calls_are_refused();
    return report("matmul");
}
