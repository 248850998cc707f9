// XOR networks: a slow second decoder, the search on every instruction set, and refusals of what is damaged.
#include "check.h"

namespace {

int parity(uint32_t value) { return __builtin_popcount(value) & 1; }

// A stream with random targets and a random mask, exactly as long as its buffers.
struct Stream {
    hcx_gf2_shape shape;
    std::vector<uint8_t> network, target, mask, codes, decoded;
    int64_t errors = -1;

    Stream(int n_in, int n_out, int n_s, int64_t bits, int64_t segment, double kept, uint32_t seed)
        : shape{bits, segment, n_in, n_out, n_s, 0} {
        std::mt19937 random(seed);
        const auto bytes = [&](int64_t count) {
            std::vector<uint8_t> found(static_cast<size_t>(count));
            for (auto& byte : found) byte = static_cast<uint8_t>(random());
            return found;
        };
        network = bytes((n_s + 1) * n_out * ceil_of(n_in, 8));
        target = bytes(ceil_of(bits, 8));
        mask.resize(target.size());
        std::bernoulli_distribution keep(kept);
        for (int64_t i = 0; i < bits; ++i) {
            mask[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>((keep(random) ? 1 : 0) << (i % 8));
        }
        codes.resize(static_cast<size_t>(ceil_of(blocks() * n_in, 8)));
        decoded.resize(target.size());
    }

    int64_t blocks() const { return ceil_of(shape.bits, shape.n_out); }

    int32_t encode(int isa, int threads) {
        return hcx_gf2_encode(&shape, network.data(), size(network), target.data(), mask.data(), size(target),
                              codes.data(), size(codes), &errors, isa, threads);
    }

    int32_t decode(int threads) {
        return hcx_gf2_decode(&shape, network.data(), size(network), codes.data(), size(codes), decoded.data(),
                              size(decoded), threads);
    }

    // FORMAT.md, bit by bit.
    int bit_by_hand(int64_t i) const {
        const int64_t t = i / shape.n_out, row = i % shape.n_out;
        const int64_t inside = shape.segment > 0 ? t % shape.segment : t;
        int sum = 0;
        for (int j = 0; j <= shape.n_s && j <= inside; ++j) {
            uint32_t word = 0, coefficients = 0;
            for (int k = 0; k < shape.n_in; ++k) {
                const int64_t at = (t - j) * shape.n_in + k;
                word |= static_cast<uint32_t>(codes[static_cast<size_t>(at / 8)] >> (at % 8) & 1) << k;
                const auto byte = static_cast<size_t>((j * shape.n_out + row) * ceil_of(shape.n_in, 8) + k / 8);
                coefficients |= static_cast<uint32_t>(network[byte] >> (k % 8) & 1) << k;
            }
            sum ^= parity(word & coefficients);
        }
        return sum;
    }

    static int64_t size(const std::vector<uint8_t>& bytes) { return static_cast<int64_t>(bytes.size()); }
};

int bit(const std::vector<uint8_t>& stream, int64_t i) { return stream[static_cast<size_t>(i / 8)] >> (i % 8) & 1; }

struct Case {
    int n_in, n_out, n_s;
    int64_t bits, segment;
    double kept;
};
constexpr Case kCases[] = {
    {8, 80, 1, 20000, 64, 0.1}, {8, 16, 1, 9999, 0, 0.5},   {8, 26, 0, 5001, 0, 0.3},   {4, 10, 2, 777, 5, 0.5},
    {8, 76, 1, 4001, 7, 0.4},   {10, 100, 1, 500, 0, 0.12}, {16, 160, 0, 300, 0, 0.1},   {1, 1, 3, 65, 0, 1.0},
    {3, 256, 2, 3000, 4, 0.9},  {6, 128, 2, 1500, 0, 0.05}, {5, 40, 3, 1001, 10, 0.25}, {8, 64, 0, 330000, 0, 0.1},
};

void decodes_to_the_formula_and_counts_its_errors() {
    for (const Case& c : kCases) {
        Stream stream(c.n_in, c.n_out, c.n_s, c.bits, c.segment, c.kept, 3);
        CHECK(stream.encode(HCX_ISA_BEST, 2) == HCX_OK);
        CHECK(stream.decode(1) == HCX_OK);
        int64_t wrong = 0, different = 0;
        for (int64_t i = 0; i < c.bits; ++i) {
            wrong += bit(stream.decoded, i) != stream.bit_by_hand(i);
            different += bit(stream.mask, i) != 0 && bit(stream.decoded, i) != bit(stream.target, i);
        }
        CHECK(wrong == 0);
        CHECK(different == stream.errors);
        if (c.bits % 8 != 0) CHECK(stream.decoded.back() >> (c.bits % 8) == 0);
        const auto alone = stream.decoded;
        CHECK(stream.decode(3) == HCX_OK);
        CHECK(stream.decoded == alone);
    }
}

void every_instruction_set_finds_the_same_words() {
    for (const Case& c : kCases) {
        if (c.bits > 30000) continue;
        Stream stream(c.n_in, c.n_out, c.n_s, c.bits, c.segment, c.kept, 5);
        CHECK(stream.encode(HCX_ISA_PORTABLE, 1) == HCX_OK);
        const auto expected = stream.codes;
        const int64_t errors = stream.errors;
        for (const int isa : {HCX_ISA_AVX2, HCX_ISA_AVX512}) {
            CHECK(stream.encode(isa, 2) == HCX_OK);
            CHECK(stream.codes == expected && stream.errors == errors);
        }
    }
}

// No sequence of words does better: all 2^(4 blocks) of them are tried.
void finds_the_optimum() {
    for (uint32_t seed = 0; seed < 6; ++seed) {
        Stream stream(4, 9, 1, 27, 0, 0.8, seed);
        CHECK(stream.encode(HCX_ISA_BEST, 1) == HCX_OK);
        Stream trial = stream;
        int64_t least = 27;
        for (uint32_t words = 0; words < 1U << 12; ++words) {
            trial.codes = {static_cast<uint8_t>(words), static_cast<uint8_t>(words >> 8)};
            CHECK(trial.decode(1) == HCX_OK);
            int64_t wrong = 0;
            for (size_t i = 0; i < trial.mask.size(); ++i) {
                wrong += __builtin_popcount((trial.decoded[i] ^ trial.target[i]) & trial.mask[i]);
            }
            least = wrong < least ? wrong : least;
        }
        CHECK(least == stream.errors);
    }
}

// The worked example of FORMAT.md.
void decodes_the_worked_example() {
    const hcx_gf2_shape shape{12, 0, 2, 4, 1, 0};
    const uint8_t network[] = {1, 2, 3, 1, 0, 1, 2, 3}, codes[] = {0x39};
    uint8_t out[2] = {};
    CHECK(hcx_gf2_decode(&shape, network, 8, codes, 1, out, 2, 1) == HCX_OK);
    CHECK(out[0] == 0xCD && out[1] == 0x07);
}

// One correction at bit 3 and one at bit 513 of 1030: 1, 9 bits; 0; 1, 9 bits; 0; 0.
void corrects_and_refuses_damaged_lists() {
    const hcx_gf2_shape shape{1030, 0, 8, 10, 0, 0};
    const std::vector<uint8_t> list = {0x07, 0x08, 0x03 << 1 & 0xFF, 0x00};
    // Flag 1 and offset 3 fill bits 0 to 9, an end bit 10, flag 1 and offset 1 bits 11 to 20, two ends bits 21 and 22.
    std::vector<uint8_t> bits(3, 0);
    const auto put = [&](int at) { bits[static_cast<size_t>(at / 8)] |= static_cast<uint8_t>(1 << (at % 8)); };
    put(0), put(1), put(2), put(11), put(12);
    std::vector<uint8_t> stream(129, 0);
    CHECK(hcx_gf2_correct(&shape, bits.data(), 3, stream.data(), 129) == HCX_OK);
    CHECK(stream[0] == 8 && stream[64] == 2);
    CHECK(hcx_gf2_correct(&shape, bits.data(), 2, stream.data(), 129) == HCX_BAD_STREAM);
    CHECK(hcx_gf2_correct(&shape, list.data(), 4, stream.data(), 129) == HCX_BAD_STREAM);
    CHECK(hcx_gf2_correct(&shape, bits.data(), 3, stream.data(), 128) == HCX_WRONG_SIZE);
    std::mt19937 random(9);
    for (int i = 0; i < 20000; ++i) {  // nothing is read or written outside, whatever the bytes say
        const auto size = static_cast<int64_t>(random() % 12);
        std::vector<uint8_t> noise(static_cast<size_t>(size));
        for (auto& byte : noise) byte = static_cast<uint8_t>(random() & (i % 2 != 0 ? 255 : random()));
        const int32_t status = hcx_gf2_correct(&shape, noise.data(), size, stream.data(), 129);
        CHECK(status == HCX_OK || status == HCX_BAD_STREAM || status == HCX_WRONG_SIZE || size == 0);
    }
}

void refuses_shapes_and_sizes() {
    Stream stream(8, 80, 1, 1000, 0, 0.1, 1);
    const auto status_of = [&](const hcx_gf2_shape& shape) {
        int64_t errors = 0;
        const int32_t encoded = hcx_gf2_encode(&shape, stream.network.data(), 160, stream.target.data(),
                                               stream.mask.data(), 125, stream.codes.data(), 13, &errors, 0, 1);
        const int32_t decoded = hcx_gf2_decode(&shape, stream.network.data(), 160, stream.codes.data(), 13,
                                               stream.decoded.data(), 125, 1);
        CHECK((encoded == HCX_OK) == (decoded == HCX_OK));
        return decoded;
    };
    CHECK(status_of(stream.shape) == HCX_OK);
    for (const hcx_gf2_shape& shape :
         {hcx_gf2_shape{0, 0, 8, 80, 1, 0}, hcx_gf2_shape{1000, -1, 8, 80, 1, 0}, hcx_gf2_shape{1000, 0, 0, 80, 1, 0},
          hcx_gf2_shape{1000, 0, 17, 80, 1, 0}, hcx_gf2_shape{1000, 0, 8, 257, 1, 0},
          hcx_gf2_shape{1000, 0, 8, 80, 4, 0}, hcx_gf2_shape{INT64_MAX, 0, 8, 80, 1, 0}}) {
        CHECK(status_of(shape) == HCX_BAD_SHAPE);
    }
    std::mt19937 random(4);
    for (int i = 0; i < 5000; ++i) {
        const hcx_gf2_shape shape{static_cast<int64_t>(random() % 3000), static_cast<int64_t>(random() % 9),
                                  static_cast<int32_t>(random() % 20), static_cast<int32_t>(random() % 300),
                                  static_cast<int32_t>(random() % 5), 0};
        CHECK(hcx_gf2_decode(&shape, stream.network.data(), 160, stream.codes.data(), 13, stream.decoded.data(), 125,
                             1) <= HCX_BAD_STREAM);
    }
    int64_t errors = 0;
    const hcx_gf2_shape large{1000, 0, 12, 80, 2, 0};
    CHECK(hcx_gf2_encode(&large, stream.network.data(), 480, stream.target.data(), stream.mask.data(), 125,
                         stream.codes.data(), 20, &errors, 0, 1) == HCX_BAD_SHAPE);
    CHECK(hcx_gf2_decode(&stream.shape, nullptr, 160, stream.codes.data(), 13, stream.decoded.data(), 125, 1) ==
          HCX_NULL_POINTER);
    CHECK(stream.encode(7, 1) == HCX_BAD_ISA);
}

void transposes_bits() {
    std::mt19937 random(2);
    for (const int rows : {1, 7, 8, 21}) {
        std::vector<uint8_t> from(static_cast<size_t>(rows * 3)), to(static_cast<size_t>(24 * ceil_of(rows, 8)));
        for (auto& byte : from) byte = static_cast<uint8_t>(random());
        CHECK(hcx_bit_transpose(from.data(), rows, 3, to.data(), Stream::size(to)) == HCX_OK);
        int wrong = 0;
        for (int c = 0; c < 24; ++c) {
            for (int r = 0; r < 8 * ceil_of(rows, 8); ++r) {
                const int expected = r < rows ? from[static_cast<size_t>(3 * r + c / 8)] >> (c % 8) & 1 : 0;
                wrong += (to[static_cast<size_t>(c * ceil_of(rows, 8) + r / 8)] >> (r % 8) & 1) != expected;
            }
        }
        CHECK(wrong == 0);
        CHECK(hcx_bit_transpose(from.data(), rows, 3, to.data(), 5) == HCX_WRONG_SIZE);
    }
}

}  // namespace

int main() {
    decodes_to_the_formula_and_counts_its_errors();
    every_instruction_set_finds_the_same_words();
    finds_the_optimum();
    decodes_the_worked_example();
    corrects_and_refuses_damaged_lists();
    refuses_shapes_and_sizes();
    transposes_bits();
    return report("gf2");
}
