// Golden bytes, packing and unpacking, and refusals.
#include <fstream>
#include <string>

#include "check.h"

namespace {

// The bytes of a tensor of a safetensors file: its header is JSON, and only one kind of entry is asked for.
std::vector<uint8_t> tensor_of(const std::string& file, const std::string& name) {
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    const std::string header = file.substr(8, length);
    const size_t entry = header.find("." + name + "\"");
    const size_t open = header.find('[', header.find("data_offsets", entry));
    const size_t comma = header.find(',', open), close = header.find(']', open);
    if (entry == std::string::npos || close == std::string::npos) return {};
    const size_t begin = std::stoul(header.substr(open + 1, comma - open - 1));
    const size_t end = std::stoul(header.substr(comma + 1, close - comma - 1));
    const std::string bytes = file.substr(8 + length + begin, end - begin);
    return {bytes.begin(), bytes.end()};
}

// FORMAT.md's worked example has groups of 6, which no kernel serves: its groups are spread out over groups of 32, with
// the columns between them multiplied by scales of zero, which must come out as zero.
void golden() {
    std::ifstream stream(HCX_GOLDEN, std::ios::binary);
    const std::string file((std::istreambuf_iterator<char>(stream)), {});
    CHECK(file.size() > 8);
    const auto planes = tensor_of(file, "planes"), scales = tensor_of(file, "scales");
    const auto offsets = tensor_of(file, "offset");
    CHECK(planes.size() == 32 && scales.size() == 96 && offsets.size() == 96);
    if (failures != 0) return;

    std::vector<uint8_t> spread(2 * 8 * 12, 0);
    const hcx_bcq_shape shape{8, 96, 32, 2, HCX_FP16, 1, 0};
    for (int plane = 0; plane < 2; ++plane) {
        for (int row = 0; row < 8; ++row) {
            for (int k = 0; k < 16; ++k) {
                const int bit = planes[static_cast<size_t>((plane * 8 + row) * 2 + k / 8)] >> (k % 8) & 1;
                const int column = k / 6 * 32 + k % 6;
                auto& byte = spread[static_cast<size_t>((plane * 8 + row) * 12 + column / 8)];
                byte = static_cast<uint8_t>(byte | bit << column % 8);
            }
        }
    }
    int64_t bytes = 0;
    CHECK(hcx_bcq_packed_bytes(&shape, &bytes) == HCX_OK);
    // Header, then per group: scales of one tile of 2 planes, offsets, one line of each plane.
    CHECK(bytes == 64 + 3 * (2 * 16 * 2 + 16 * 4 + 2 * 64));
    Memory packed = memory_of(bytes);
    const auto* offset = reinterpret_cast<const float*>(offsets.data());
    CHECK(hcx_bcq_pack(&shape, spread.data(), 192, scales.data(), 96, offset, 96, packed.get(), bytes) == HCX_OK);
    std::vector<float> dense(8 * 96);
    CHECK(hcx_bcq_dequantize(packed.get(), bytes, dense.data(), 4 * 8 * 96, 1) == HCX_OK);
    // FORMAT.md, by hand: W[0, 0], W[0, 1], W[0, 6], W[0, 12], W[3, 0].
    CHECK(dense[0] == 0.25F);
    CHECK(dense[1] == -0.75F);
    CHECK(dense[32] == -0.84375F);
    CHECK(dense[64] == -2.4375F);
    CHECK(dense[3 * 96] == -0.75F);
    // The first line: row r of plane 0 has the canonical bits of columns 0 to 5, here 0x95 & 63 for row 0, as nibbles.
    const uint8_t* line = packed.get() + 64 + 64 + 64;
    CHECK(line[0] == 0x5 && line[1] == 0x1 && line[2] == 0 && line[3] == 0);
}

struct Case {
    int64_t rows, columns, group;
};
constexpr Case kCases[] = {{1, 1, 32},     {17, 33, 32},   {64, 128, 128}, {130, 577, 577},
                           {5, 400, 160},  {65, 1030, 96}, {16, 50, 50},   {80, 640, 64}};

void unpacks_to_the_formula() {
    for (const Case& c : kCases) {
        for (int bits = 1; bits <= 8; ++bits) {
            const Weight weight(c.rows, c.columns, bits, c.group, bits % 2 == 0, 7, true);
            std::vector<float> dense(static_cast<size_t>(c.rows * c.columns));
            CHECK(hcx_bcq_dequantize(weight.packed.get(), weight.packed_bytes, dense.data(),
                                     4 * c.rows * c.columns, 2) == HCX_OK);
            int64_t wrong = 0;  // scales are short binary fractions: sums are exact
            for (int64_t row = 0; row < c.rows; ++row) {
                for (int64_t k = 0; k < c.columns; ++k) {
                    const float found = dense[static_cast<size_t>(row * c.columns + k)];
                    wrong += found != static_cast<float>(weight.dense(row, k));
                }
            }
            CHECK(wrong == 0);
        }
    }
}

void other_scales_replace_the_first() {
    Weight weight(70, 200, 3, 64, true, 1);
    const Weight other(70, 200, 3, 64, true, 2);
    weight.scales = other.scales;
    weight.offset = other.offset;
    Memory expected = memory_of(weight.packed_bytes);
    CHECK(weight.pack(expected.get(), weight.packed_bytes) == HCX_OK);
    CHECK(hcx_bcq_set_scales(weight.packed.get(), weight.packed_bytes, other.scales.data(),
                             static_cast<int64_t>(4 * other.scales.size()), other.offset.data(),
                             static_cast<int64_t>(4 * other.offset.size())) == HCX_OK);
    CHECK(std::memcmp(expected.get(), weight.packed.get(), static_cast<size_t>(weight.packed_bytes)) == 0);
    CHECK(hcx_bcq_set_scales(weight.packed.get(), weight.packed_bytes, other.scales.data(), 8, other.offset.data(),
                             static_cast<int64_t>(4 * other.offset.size())) == HCX_WRONG_SIZE);
}

void bad_shapes_are_refused() {
    const auto status_of = [](hcx_bcq_shape shape) {
        int64_t bytes = 0;
        return hcx_bcq_packed_bytes(&shape, &bytes);
    };
    CHECK(status_of({0, 64, 32, 2, HCX_FP16, 0, 0}) == HCX_BAD_SHAPE);
    CHECK(status_of({8, -1, 32, 2, HCX_FP16, 0, 0}) == HCX_BAD_SHAPE);
    CHECK(status_of({INT64_MAX, INT64_MAX, 32, 8, HCX_FP32, 1, 0}) == HCX_BAD_SHAPE);
    CHECK(status_of({8, 64, 32, 0, HCX_FP16, 0, 0}) == HCX_BAD_BITS);
    CHECK(status_of({8, 64, 32, 9, HCX_FP16, 0, 0}) == HCX_BAD_BITS);
    CHECK(status_of({8, 64, 33, 2, HCX_FP16, 0, 0}) == HCX_BAD_GROUP);
    CHECK(status_of({8, 64, 0, 2, HCX_FP16, 0, 0}) == HCX_BAD_GROUP);
    CHECK(status_of({8, 50, 64, 2, HCX_FP16, 0, 0}) == HCX_OK);
    CHECK(status_of({8, 64, 32, 2, 3, 0, 0}) == HCX_BAD_SCALE_DTYPE);
    CHECK(hcx_bcq_packed_bytes(nullptr, nullptr) == HCX_NULL_POINTER);
}

void damaged_buffers_are_refused() {
    const Weight weight(40, 96, 2, 32, true, 3);
    const auto bytes = static_cast<size_t>(weight.packed_bytes);
    Memory copy = memory_of(weight.packed_bytes + 64);
    std::memcpy(copy.get(), weight.packed.get(), bytes);
    hcx_bcq_shape shape;
    CHECK(hcx_bcq_describe(copy.get(), weight.packed_bytes, &shape) == HCX_OK);
    CHECK(shape.rows == 40 && shape.columns == 96 && shape.bits == 2 && shape.group == 32 && shape.has_offset == 1);
    CHECK(hcx_bcq_describe(copy.get(), weight.packed_bytes - 1, &shape) == HCX_WRONG_SIZE);
    CHECK(hcx_bcq_describe(copy.get(), weight.packed_bytes + 1, &shape) == HCX_WRONG_SIZE);
    CHECK(hcx_bcq_describe(copy.get(), 63, &shape) == HCX_WRONG_SIZE);
    CHECK(hcx_bcq_describe(copy.get(), -5, &shape) == HCX_WRONG_SIZE);
    CHECK(hcx_bcq_describe(copy.get() + 4, weight.packed_bytes, &shape) == HCX_MISALIGNED);
    CHECK(hcx_bcq_describe(nullptr, weight.packed_bytes, &shape) == HCX_NULL_POINTER);
    // Any change of any bit of the header.
    for (int bit = 0; bit < 64 * 8; ++bit) {
        copy.get()[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        CHECK(hcx_bcq_describe(copy.get(), weight.packed_bytes, &shape) == HCX_BAD_HEADER);
        copy.get()[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
    CHECK(weight.pack(copy.get(), weight.packed_bytes + 1) == HCX_WRONG_SIZE);
    CHECK(weight.pack(copy.get() + 8, weight.packed_bytes) == HCX_MISALIGNED);
    CHECK(hcx_bcq_dequantize(copy.get(), weight.packed_bytes, nullptr, 40 * 96 * 4, 1) == HCX_NULL_POINTER);
    float number = 0;
    CHECK(hcx_bcq_dequantize(copy.get(), weight.packed_bytes, &number, 4, 1) == HCX_WRONG_SIZE);
    for (int status = -1; status < 20; ++status) CHECK(std::strlen(hcx_status_text(status)) > 3);
}

}  // namespace

int main() {
    golden();
    unpacks_to_the_formula();
    other_scales_replace_the_first();
    bad_shapes_are_refused();
    damaged_buffers_are_refused();
    return report("layout");
}
