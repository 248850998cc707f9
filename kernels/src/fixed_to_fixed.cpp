// Encoding: cuts the stream into segments, each searched alone, and packs the code words.
#include <atomic>
#include <cstring>
#include <new>

#include "layout.h"
#include "memory.h"
#include "pool.h"
#include "viterbi.h"

namespace hcx {
namespace {

constexpr int64_t kPieceBlocks = 4096;

const SearchSet& search_of(int isa) {
#if defined(__x86_64__)
#if defined(HCX_WITH_AVX512)
    if (isa == HCX_ISA_AVX512 && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
        __builtin_cpu_supports("avx512vpopcntdq")) {
        return kSearchAvx512;
    }
#endif
#if defined(HCX_WITH_AVX2)
    if (isa >= HCX_ISA_AVX2 && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) return kSearchAvx2;
#endif
#endif
    (void)isa;
    return kSearchPortable;
}

struct Encoder {
    const Gf2Plan& plan;
    const uint8_t *target, *mask;
    const SearchSet& set;
    const uint64_t* columns;
    uint16_t* words;
    std::atomic<int64_t> errors{0};
    std::atomic<bool> failed{false};

    // The bits of blocks begin .., in 64-bit words per block.
    void read(const uint8_t* stream, int64_t begin, int64_t blocks, int block_words, uint64_t* to) const {
        for (int64_t t = 0; t < blocks; ++t) {
            int64_t at = (begin + t) * plan.n_out;
            for (int w = 0, left = plan.n_out; w < block_words; ++w, left -= 64, at += 64) {
                int count = left < 64 ? left : 64;
                if (at + count > plan.bits) count = at < plan.bits ? static_cast<int>(plan.bits - at) : 0;
                to[t * block_words + w] = count > 0 ? stream_word(stream, plan.stream_bytes, at, count) : 0;
            }
        }
    }

    void segment(int64_t index) {
        const int64_t begin = index * plan.segment;
        const int64_t blocks = begin + plan.segment < plan.blocks ? plan.segment : plan.blocks - begin;
        const int block_words = (plan.n_out + 63) / 64;
        const int64_t states = plan.n_s == 0 ? 0 : int64_t{1} << (plan.n_in * plan.n_s);
        const int64_t entries = static_cast<int64_t>(plan.n_s + 1) << plan.n_in;
        const Block targets = block_of(blocks * block_words * 8), masks = block_of(blocks * block_words * 8);
        const Block tables = block_of(entries * 4), wide = block_of(entries * 8 * kMaxWords);
        if (!targets || !masks || !tables || !wide) {
            failed = true;
            return;
        }
        Search search{};
        search.n_in = plan.n_in;
        search.n_s = plan.n_s;
        search.words = block_words;
        search.blocks = blocks;
        auto* mask_words = static_cast<uint64_t*>(masks.get());
        read(target, begin, blocks, block_words, static_cast<uint64_t*>(targets.get()));
        read(mask, begin, blocks, block_words, mask_words);
        search.target = static_cast<const uint64_t*>(targets.get());
        search.mask = mask_words;
        search.columns = columns;
        search.tables = static_cast<uint32_t*>(tables.get());
        search.wide = static_cast<uint64_t*>(wide.get());
        search.codes = words + begin;

        const int64_t highest = highest_cost(mask_words, blocks, block_words, search.start_penalty);
        const bool narrow = plan.n_in <= 8 && highest + 2 * transform_bits(plan.n_in) < 255;
        const int cost_bytes = narrow ? 1 : 2;
        const Block costs = block_of(2 * states * cost_bytes), back = block_of(blocks * states * cost_bytes);
        const Block plane = block_of((int64_t{1} << transform_bits(plan.n_in)) * 2 * cost_bytes);
        if (!costs || !back || !plane) {
            failed = true;
            return;
        }
        search.costs = costs.get();
        search.back = back.get();
        search.plane = plane.get();
        (narrow ? set.narrow : set.wide)(search);
        errors += search.errors;
    }

    // No cost that is kept exceeds this. A state is at most as far from the best one as the last n_s blocks have kept
    // bits, since any words may follow the best path up to there; a path that does not begin at zero pays a penalty on
    // top, which is more than all that beginning elsewhere could save.
    int64_t highest_cost(const uint64_t* masks, int64_t blocks, int block_words, uint32_t& penalty) const {
        const auto kept = [&](int64_t t) {
            int64_t count = 0;
            for (int w = 0; w < block_words; ++w) count += __builtin_popcountll(masks[t * block_words + w]);
            return count;
        };
        int64_t window = 0, widest = 0, first = 0;
        for (int64_t t = 0; t < blocks; ++t) {
            window += kept(t);
            if (t > plan.n_s) window -= kept(t - plan.n_s - 1);
            if (t < plan.n_s) first += kept(t);
            widest = window > widest ? window : widest;
        }
        penalty = static_cast<uint32_t>(first + 1);
        return widest + first + 1;
    }
};

}  // namespace
}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_gf2_encode(const hcx_gf2_shape* shape, const uint8_t* network, int64_t network_bytes, const uint8_t* target,
                       const uint8_t* mask, int64_t stream_bytes, uint8_t* codes, int64_t codes_bytes, int64_t* errors,
                       int32_t isa, int32_t threads) {
    if (shape == nullptr || network == nullptr || target == nullptr || mask == nullptr || codes == nullptr ||
        errors == nullptr) {
        return HCX_NULL_POINTER;
    }
    if (isa < HCX_ISA_BEST || isa > HCX_ISA_AVX512) return HCX_BAD_ISA;
    Gf2Plan plan;
    const int32_t status = make_gf2_plan(*shape, plan);
    if (status != HCX_OK) return status;
    if (plan.n_s > 0 && (plan.n_in > kMaxSearchedIn || plan.n_in * plan.n_s > kMaxStatesBits)) return HCX_BAD_SHAPE;
    if (network_bytes != plan.network_bytes || stream_bytes != plan.stream_bytes || codes_bytes != plan.codes_bytes) {
        return HCX_WRONG_SIZE;
    }
    const int block_words = (plan.n_out + 63) / 64;
    uint64_t columns[(kMaxRegisters + 1) * kMaxIn * kMaxWords] = {};
    for (int j = 0; j <= plan.n_s; ++j) {
        for (int row = 0; row < plan.n_out; ++row) {
            const uint32_t coefficients = network_row(plan, network, j, row);
            for (int i = 0; i < plan.n_in; ++i) {
                columns[(j * plan.n_in + i) * block_words + row / 64] |= static_cast<uint64_t>(coefficients >> i & 1)
                                                                          << (row % 64);
            }
        }
    }
    std::unique_ptr<uint16_t[]> words(new (std::nothrow) uint16_t[static_cast<size_t>(plan.blocks)]);
    if (!words) return HCX_NO_MEMORY;
    const int best = hcx_best_isa();
    // Without registers there is nothing to search along: pieces only share the work.
    if (plan.n_s == 0 && plan.segment > kPieceBlocks) plan.segment = kPieceBlocks;
    const SearchSet& set = search_of(isa == HCX_ISA_BEST || isa > best ? best : isa);
    Encoder encoder{plan, target, mask, set, columns, words.get()};
    auto segment = [&encoder](int64_t index) { encoder.segment(index); };
    parallel(threads, ceil_div(plan.blocks, plan.segment), segment);
    if (encoder.failed) return HCX_NO_MEMORY;
    std::memset(codes, 0, static_cast<size_t>(codes_bytes));
    for (int64_t t = 0; t < plan.blocks; ++t) {
        const int64_t at = t * plan.n_in;
        const uint32_t word = static_cast<uint32_t>(words[static_cast<size_t>(t)]) << (at % 8);
        for (int i = 0; i * 8 < at % 8 + plan.n_in; ++i) codes[at / 8 + i] |= static_cast<uint8_t>(word >> (8 * i));
    }
    *errors = encoder.errors;
    return HCX_OK;
}
}
