// The search in plain C++: the oracle of the others, and what machines without AVX2 run.
#define HCX_SEARCH_BODY
#include <cstdint>

namespace hcx {
namespace {

struct Lanes {
    template <class Packed>
    static constexpr int kBits = 0;

    static uint64_t extract(uint64_t value, uint64_t mask) {
        uint64_t found = 0;
        for (int i = 0; mask != 0; mask &= mask - 1, ++i) found |= (value >> __builtin_ctzll(mask) & 1) << i;
        return found;
    }

    template <class Packed>
    static void small_steps(Packed*, int, Packed) {}

    template <class Packed>
    static void step(Packed* low, Packed* high, int64_t count, Packed one) {
        for (int64_t i = 0; i < count; ++i) {
            const Packed a = low[i], b = high[i];
            const auto up = static_cast<Packed>(b + one), down = static_cast<Packed>(a + one);
            low[i] = a < up ? a : up;
            high[i] = b < down ? b : down;
        }
    }
};

}  // namespace
}  // namespace hcx

#include "viterbi.h"

namespace hcx {
const SearchSet kSearchPortable = kSearch;
}
