// The search with 16 costs to a register. Needs AVX2, BMI2 and POPCNT.
#define HCX_SEARCH_BODY
#include <immintrin.h>

#include <cstdint>

namespace hcx {
namespace {

struct Lanes {
    template <class Packed>
    static constexpr int kBits = sizeof(Packed) == 2 ? 4 : 3;

    static uint64_t extract(uint64_t value, uint64_t mask) { return _pext_u64(value, mask); }

    static __m256i load(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
    static void store(void* at, __m256i value) { _mm256_store_si256(static_cast<__m256i*>(at), value); }

    // Partners are 1, 2, 4 or 8 numbers apart within a register.
    static void small_steps(uint16_t* plane, int n, uint16_t one) {
        const __m256i add = _mm256_set1_epi16(static_cast<short>(one));
        const __m256i swap1 = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
        const int64_t size = n > 4 ? int64_t{1} << n : 16;
        for (int64_t i = 0; i < size; i += 16) {
            __m256i v = load(plane + i);
            if (n > 0) v = _mm256_min_epu16(v, _mm256_add_epi16(_mm256_shuffle_epi8(v, swap1), add));
            if (n > 1) v = _mm256_min_epu16(v, _mm256_add_epi16(_mm256_shuffle_epi32(v, 0xB1), add));
            if (n > 2) v = _mm256_min_epu16(v, _mm256_add_epi16(_mm256_shuffle_epi32(v, 0x4E), add));
            if (n > 3) v = _mm256_min_epu16(v, _mm256_add_epi16(_mm256_permute4x64_epi64(v, 0x4E), add));
            store(plane + i, v);
        }
    }

    static void small_steps(uint32_t* plane, int n, uint32_t one) {
        const __m256i add = _mm256_set1_epi32(static_cast<int>(one));
        const int64_t size = n > 3 ? int64_t{1} << n : 8;
        for (int64_t i = 0; i < size; i += 8) {
            __m256i v = load(plane + i);
            if (n > 0) v = _mm256_min_epu32(v, _mm256_add_epi32(_mm256_shuffle_epi32(v, 0xB1), add));
            if (n > 1) v = _mm256_min_epu32(v, _mm256_add_epi32(_mm256_shuffle_epi32(v, 0x4E), add));
            if (n > 2) v = _mm256_min_epu32(v, _mm256_add_epi32(_mm256_permute4x64_epi64(v, 0x4E), add));
            store(plane + i, v);
        }
    }

    static void step(uint16_t* low, uint16_t* high, int64_t count, uint16_t one) {
        const __m256i add = _mm256_set1_epi16(static_cast<short>(one));
        for (int64_t i = 0; i < count; i += 16) {
            const __m256i a = load(low + i), b = load(high + i);
            store(low + i, _mm256_min_epu16(a, _mm256_add_epi16(b, add)));
            store(high + i, _mm256_min_epu16(b, _mm256_add_epi16(a, add)));
        }
    }

    static void step(uint32_t* low, uint32_t* high, int64_t count, uint32_t one) {
        const __m256i add = _mm256_set1_epi32(static_cast<int>(one));
        for (int64_t i = 0; i < count; i += 8) {
            const __m256i a = load(low + i), b = load(high + i);
            store(low + i, _mm256_min_epu32(a, _mm256_add_epi32(b, add)));
            store(high + i, _mm256_min_epu32(b, _mm256_add_epi32(a, add)));
        }
    }
};

}  // namespace
}  // namespace hcx

#include "viterbi.h"

namespace hcx {
const SearchSet kSearchAvx2 = kSearch;
}
