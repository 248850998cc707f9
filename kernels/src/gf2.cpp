// Decoding with an XOR network: every byte of a code word looks up its part of the block, and the parts are added.
//
// Any block depends on n_s + 1 code words of its segment only, so tiles of blocks are decoded independently and may be
// shared among threads. A tile is a multiple of 8 blocks: it begins at a byte of the output.
#include "gf2.h"

#include <cstring>
#include <memory>
#include <new>

#include "layout.h"
#include "pool.h"

namespace hcx {
namespace {

constexpr int64_t kTileBlocks = 4096;
constexpr int kWideBytes = 16;   // one load, one store
constexpr int kPieceBits = 56;   // what still fits in 64 bits behind up to 7 bits that wait
constexpr int kMaxPieces = (kMaxOut + kPieceBits - 1) / kPieceBits;
constexpr int kMaxTables = (kMaxRegisters + 1) * 2;
constexpr int64_t kMaxStreamBits = int64_t{1} << 40;

typedef uint64_t Wide __attribute__((vector_size(kWideBytes), aligned(1), may_alias));

struct Tables {
    int count;        // of tables of 256 entries: n_s + 1 registers by bytes of a code word
    int pieces;       // words of an entry
    int piece_bits;   // of the last
    std::unique_ptr<uint64_t[]> entries;  // [table][256][pieces]
};

// Entry v of a table: the sum of the columns whose bit is set in v, in pieces of `width` bits.
bool make_tables(const Gf2Plan& plan, const uint8_t* network, int width, Tables& tables) {
    const int bytes = (plan.n_in + 7) / 8;
    tables.count = (plan.n_s + 1) * bytes;
    tables.pieces = (plan.n_out + width - 1) / width;
    if (width == 64) tables.pieces = kWideBytes / 8;
    tables.piece_bits = plan.n_out - (tables.pieces - 1) * width;
    const int64_t size = static_cast<int64_t>(tables.count) * 256 * tables.pieces;
    tables.entries.reset(new (std::nothrow) uint64_t[static_cast<size_t>(size)]());
    if (!tables.entries) return false;
    for (int j = 0; j <= plan.n_s; ++j) {
        for (int row = 0; row < plan.n_out; ++row) {
            const uint32_t coefficients = network_row(plan, network, j, row);
            for (int b = 0; b < bytes; ++b) {
                uint64_t* table = tables.entries.get() + static_cast<int64_t>(j * bytes + b) * 256 * tables.pieces;
                const uint32_t own = coefficients >> (8 * b) & 255;
                for (uint32_t value = 0; value < 256; ++value) {
                    const uint64_t parity = static_cast<uint64_t>(__builtin_parity(own & value));
                    table[value * tables.pieces + row / width] |= parity << (row % width);
                }
            }
        }
    }
    return true;
}

// The code words of blocks first - n_s .. first + count - 1, those before the segment's beginning zero.
void read_words(const Gf2Plan& plan, const uint8_t* codes, int64_t first, int64_t count, uint16_t* words) {
    if (plan.n_in == 8 && first >= plan.n_s) {
        for (int64_t i = 0; i < count + plan.n_s; ++i) words[i] = codes[first - plan.n_s + i];
        return;
    }
    for (int64_t i = -plan.n_s; i < count; ++i) {
        const int64_t block = first + i;
        words[i + plan.n_s] =
            block < 0 ? 0
                      : static_cast<uint16_t>(stream_word(codes, plan.codes_bytes, block * plan.n_in, plan.n_in));
    }
}

// Blocks of whole bytes, at most 16: entries are added and stored 16 bytes wide, each over the rest of the last.
template <int kCount>
void decode_wide(const Tables& tables, int n_out, int bytes, const uint16_t* words, int64_t count, uint8_t* out) {
    const int block_bytes = n_out / 8;
    const int tables_count = kCount > 0 ? kCount : tables.count;
    const auto* entries = reinterpret_cast<const Wide*>(tables.entries.get());
    const int registers = tables_count / bytes - 1;
    const auto block = [&](int64_t t) {
        Wide sum = {0, 0};
        for (int table = 0; table < tables_count; ++table) {
            const int j = table / bytes;
            sum ^= entries[table * 256 + (words[t + registers - j] >> (8 * (table % bytes)) & 255)];
        }
        return sum;
    };
    // The last stores must not reach what another thread writes.
    const int64_t safe = count - (kWideBytes + block_bytes - 1) / block_bytes;
    int64_t t = 0;
    for (; t < safe; ++t) *reinterpret_cast<Wide*>(out + t * block_bytes) = block(t);
    for (; t < count; ++t) {
        const Wide sum = block(t);
        std::memcpy(out + t * block_bytes, &sum, static_cast<size_t>(block_bytes));
    }
}

// Blocks of any size: pieces queue up in a word, whose whole bytes are stored.
class Queue {
   public:
    explicit Queue(uint8_t* out, uint8_t* end) : at_(out), end_(end) {}

    void put(uint64_t bits, int count) {
        word_ |= bits << filled_;
        filled_ += count;
        if (end_ - at_ >= 8) {
            std::memcpy(at_, &word_, 8);
            at_ += filled_ / 8;
            word_ = filled_ >= 64 ? 0 : word_ >> (filled_ / 8 * 8);
            filled_ %= 8;
        } else {
            while (filled_ >= 8) drain();
        }
    }

    void finish() {
        while (filled_ > 0) drain();
    }

   private:
    void drain() {
        if (at_ < end_) *at_++ = static_cast<uint8_t>(word_);
        word_ >>= 8;
        filled_ -= 8;
    }

    uint8_t *at_, *end_;
    uint64_t word_ = 0;
    int filled_ = 0;
};

void decode_pieces(const Tables& tables, int bytes, const uint16_t* words, int64_t count, Queue& queue) {
    const int registers = tables.count / bytes - 1;
    for (int64_t t = 0; t < count; ++t) {
        uint64_t sum[kMaxPieces] = {};
        for (int table = 0; table < tables.count; ++table) {
            const int j = table / bytes;
            const int value = words[t + registers - j] >> (8 * (table % bytes)) & 255;
            const uint64_t* entry = tables.entries.get() + (table * 256 + value) * static_cast<int64_t>(tables.pieces);
            for (int piece = 0; piece < tables.pieces; ++piece) sum[piece] ^= entry[piece];
        }
        for (int piece = 0; piece < tables.pieces; ++piece) {
            queue.put(sum[piece], piece + 1 < tables.pieces ? kPieceBits : tables.piece_bits);
        }
    }
}

// Code words of one byte and blocks of one or two pieces: the usual case of blocks that are not whole bytes.
template <int kCount, int kPieces>
void decode_narrow(const Tables& tables, const uint16_t* words, int64_t count, Queue& queue) {
    const uint64_t* entries = tables.entries.get();
    for (int64_t t = 0; t < count; ++t) {
        uint64_t sum[kPieces] = {};
        for (int j = 0; j < kCount; ++j) {
            const uint64_t* entry = entries + (j * 256 + words[t + kCount - 1 - j]) * kPieces;
            for (int piece = 0; piece < kPieces; ++piece) sum[piece] ^= entry[piece];
        }
        for (int piece = 0; piece + 1 < kPieces; ++piece) queue.put(sum[piece], kPieceBits);
        queue.put(sum[kPieces - 1], tables.piece_bits);
    }
}

void decode_run(const Gf2Plan& plan, const Tables& tables, bool wide, const uint16_t* words, int64_t count,
                uint8_t* out, Queue& queue) {
    const int bytes = (plan.n_in + 7) / 8;
    if (wide) {
        switch (tables.count) {
            case 1: return decode_wide<1>(tables, plan.n_out, bytes, words, count, out);
            case 2: return decode_wide<2>(tables, plan.n_out, bytes, words, count, out);
            case 3: return decode_wide<3>(tables, plan.n_out, bytes, words, count, out);
            default: return decode_wide<0>(tables, plan.n_out, bytes, words, count, out);
        }
    }
    if (tables.pieces <= 2 && bytes == 1 && tables.count <= 3) {
        constexpr decltype(&decode_narrow<1, 1>) kNarrow[3][2] = {{decode_narrow<1, 1>, decode_narrow<1, 2>},
                                                                  {decode_narrow<2, 1>, decode_narrow<2, 2>},
                                                                  {decode_narrow<3, 1>, decode_narrow<3, 2>}};
        return kNarrow[tables.count - 1][tables.pieces - 1](tables, words, count, queue);
    }
    decode_pieces(tables, bytes, words, count, queue);
}

// Reads a list of corrections bit by bit: it may end anywhere in a byte.
class BitReader {
   public:
    BitReader(const uint8_t* data, int64_t bytes) : data_(data), bytes_(bytes) {}

    // False at the end of the data.
    bool read(int count, uint32_t& value) {
        if (at_ + count > 8 * bytes_) return false;
        uint32_t word = 0;
        const int64_t first = at_ / 8;
        if (first + 4 <= bytes_) {
            std::memcpy(&word, data_ + first, 4);
        } else {
            for (int64_t i = 0; first + i < bytes_; ++i) word |= static_cast<uint32_t>(data_[first + i]) << (8 * i);
        }
        value = word >> (at_ % 8) & ((1U << count) - 1);
        at_ += count;
        return true;
    }

    bool at_end() const {
        return (at_ + 7) / 8 == bytes_ && (at_ % 8 == 0 || data_[bytes_ - 1] >> (at_ % 8) == 0);
    }

   private:
    const uint8_t* data_;
    int64_t bytes_, at_ = 0;
};

// The rows of an 8 x 8 matrix of bits become its columns (Warren, Hacker's Delight, section 7-3).
uint64_t transpose_8x8(uint64_t x) {
    uint64_t swap = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAULL;
    x ^= swap ^ (swap << 7);
    swap = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCULL;
    x ^= swap ^ (swap << 14);
    swap = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ULL;
    return x ^ swap ^ (swap << 28);
}

}  // namespace

int32_t make_gf2_plan(const hcx_gf2_shape& shape, Gf2Plan& plan) {
    if (shape.n_in < 1 || shape.n_in > kMaxIn || shape.n_out < 1 || shape.n_out > kMaxOut || shape.n_s < 0 ||
        shape.n_s > kMaxRegisters || shape.bits < 1 || shape.bits > kMaxStreamBits || shape.segment < 0) {
        return HCX_BAD_SHAPE;
    }
    plan.n_in = shape.n_in;
    plan.n_out = shape.n_out;
    plan.n_s = shape.n_s;
    plan.bits = shape.bits;
    plan.blocks = ceil_div(shape.bits, shape.n_out);
    plan.segment = shape.segment == 0 || shape.segment > plan.blocks ? plan.blocks : shape.segment;
    plan.network_bytes = static_cast<int64_t>(shape.n_s + 1) * shape.n_out * ((shape.n_in + 7) / 8);
    plan.codes_bytes = ceil_div(plan.blocks * shape.n_in, 8);
    plan.stream_bytes = ceil_div(shape.bits, 8);
    return HCX_OK;
}

}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_gf2_decode(const hcx_gf2_shape* shape, const uint8_t* network, int64_t network_bytes, const uint8_t* codes,
                       int64_t codes_bytes, uint8_t* out, int64_t out_bytes, int32_t threads) {
    if (shape == nullptr || network == nullptr || codes == nullptr || out == nullptr) return HCX_NULL_POINTER;
    Gf2Plan plan;
    const int32_t status = make_gf2_plan(*shape, plan);
    if (status != HCX_OK) return status;
    if (network_bytes != plan.network_bytes || codes_bytes != plan.codes_bytes || out_bytes != plan.stream_bytes) {
        return HCX_WRONG_SIZE;
    }
    const bool wide = plan.n_out % 8 == 0 && plan.n_out <= 8 * kWideBytes;
    Tables tables;
    if (!make_tables(plan, network, wide ? 64 : kPieceBits, tables)) return HCX_NO_MEMORY;
    auto tile = [&](int64_t index) {
        uint16_t words[kTileBlocks + kMaxRegisters];
        const int64_t begin = index * kTileBlocks;
        const int64_t end = begin + kTileBlocks < plan.blocks ? begin + kTileBlocks : plan.blocks;
        // The last block may be cut short: the queue stops at the end of the stream.
        const int64_t last_byte = end == plan.blocks ? plan.stream_bytes : end * plan.n_out / 8;
        Queue queue(out + begin * plan.n_out / 8, out + last_byte);
        for (int64_t at = begin; at < end;) {
            const int64_t next = (at / plan.segment + 1) * plan.segment;
            int64_t count = (next < end ? next : end) - at;
            read_words(plan, codes, at, count, words);
            const int64_t inside = at % plan.segment;
            for (int64_t i = 0; i < plan.n_s - inside; ++i) words[i] = 0;
            if (wide && at + count == plan.blocks && plan.blocks * plan.n_out != plan.bits) {
                // Its last block is put by bytes.
                uint8_t block[kWideBytes];
                const int64_t t = count - 1, done = (plan.blocks - 1) * plan.n_out / 8;
                decode_run(plan, tables, true, words + t, 1, block, queue);
                std::memcpy(out + done, block, static_cast<size_t>(plan.stream_bytes - done));
                --count;
                if (count > 0) decode_run(plan, tables, true, words, count, out + at * plan.n_out / 8, queue);
                break;
            }
            decode_run(plan, tables, wide, words, count, out + at * plan.n_out / 8, queue);
            at += count;
        }
        if (!wide) queue.finish();
    };
    parallel(threads, ceil_div(plan.blocks, kTileBlocks), tile);
    if (plan.bits % 8 != 0) out[plan.stream_bytes - 1] &= static_cast<uint8_t>((1U << (plan.bits % 8)) - 1);
    return HCX_OK;
}

int32_t hcx_gf2_correct(const hcx_gf2_shape* shape, const uint8_t* corrections, int64_t corrections_bytes,
                        uint8_t* stream, int64_t stream_bytes) {
    if (shape == nullptr || corrections == nullptr || stream == nullptr) return HCX_NULL_POINTER;
    Gf2Plan plan;
    const int32_t status = make_gf2_plan(*shape, plan);
    if (status != HCX_OK) return status;
    if (stream_bytes != plan.stream_bytes || corrections_bytes < 1) return HCX_WRONG_SIZE;
    BitReader reader(corrections, corrections_bytes);
    const int64_t chunks = ceil_div(plan.blocks * plan.n_out, kChunkBits);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t earlier = -1;
        for (;;) {
            uint32_t more = 0, offset = 0;
            if (!reader.read(1, more)) return HCX_BAD_STREAM;
            if (more == 0) break;
            if (!reader.read(kOffsetBits, offset)) return HCX_BAD_STREAM;
            const int64_t bit = chunk * kChunkBits + offset;
            if (bit <= earlier || bit >= plan.bits) return HCX_BAD_STREAM;
            stream[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
            earlier = bit;
        }
    }
    return reader.at_end() ? HCX_OK : HCX_BAD_STREAM;
}

int32_t hcx_bit_transpose(const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to, int64_t to_bytes) {
    if (from == nullptr || to == nullptr) return HCX_NULL_POINTER;
    if (rows < 1 || row_bytes < 1 || rows > (int64_t{1} << 28) || row_bytes > (int64_t{1} << 28)) return HCX_BAD_SHAPE;
    const int64_t out_row = ceil_div(rows, 8);
    if (to_bytes != 8 * row_bytes * out_row) return HCX_WRONG_SIZE;
    for (int64_t r = 0; r < out_row; ++r) {
        const int height = static_cast<int>(rows - 8 * r < 8 ? rows - 8 * r : 8);
        for (int64_t c = 0; c < row_bytes; ++c) {
            uint64_t square = 0;
            for (int i = 0; i < height; ++i) {
                square |= static_cast<uint64_t>(from[(8 * r + i) * row_bytes + c]) << (8 * i);
            }
            square = transpose_8x8(square);
            for (int i = 0; i < 8; ++i) to[(8 * c + i) * out_row + r] = static_cast<uint8_t>(square >> (8 * i));
        }
    }
    return HCX_OK;
}
}
