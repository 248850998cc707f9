// The search with 32 costs to a register, and brute force with counted bits of 16 words at once. Needs AVX-512 with BW
// and VPOPCNTDQ, and BMI2.
#define HCX_SEARCH_BODY
#include <immintrin.h>

#include <cstdint>

namespace hcx {
namespace {

struct Lanes {
    template <class Packed>
    static constexpr int kBits = sizeof(Packed) == 2 ? 5 : 4;

    static uint64_t extract(uint64_t value, uint64_t mask) { return _pext_u64(value, mask); }

    static __m512i load(const void* at) { return _mm512_load_si512(at); }
    static void store(void* at, __m512i value) { _mm512_store_si512(at, value); }

    static void small_steps(uint16_t* plane, int n, uint16_t one) {
        const __m512i add = _mm512_set1_epi16(static_cast<short>(one));
        const __m512i swap1 = _mm512_broadcast_i32x4(
            _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
        const int64_t size = n > 5 ? int64_t{1} << n : 32;
        for (int64_t i = 0; i < size; i += 32) {
            __m512i v = load(plane + i);
            if (n > 0) v = _mm512_min_epu16(v, _mm512_add_epi16(_mm512_shuffle_epi8(v, swap1), add));
            if (n > 1) v = _mm512_min_epu16(v, _mm512_add_epi16(_mm512_shuffle_epi32(v, _MM_PERM_CDAB), add));
            if (n > 2) v = _mm512_min_epu16(v, _mm512_add_epi16(_mm512_shuffle_epi32(v, _MM_PERM_BADC), add));
            if (n > 3) v = _mm512_min_epu16(v, _mm512_add_epi16(_mm512_shuffle_i64x2(v, v, 0xB1), add));
            if (n > 4) v = _mm512_min_epu16(v, _mm512_add_epi16(_mm512_shuffle_i64x2(v, v, 0x4E), add));
            store(plane + i, v);
        }
    }

    static void small_steps(uint32_t* plane, int n, uint32_t one) {
        const __m512i add = _mm512_set1_epi32(static_cast<int>(one));
        const int64_t size = n > 4 ? int64_t{1} << n : 16;
        for (int64_t i = 0; i < size; i += 16) {
            __m512i v = load(plane + i);
            if (n > 0) v = _mm512_min_epu32(v, _mm512_add_epi32(_mm512_shuffle_epi32(v, _MM_PERM_CDAB), add));
            if (n > 1) v = _mm512_min_epu32(v, _mm512_add_epi32(_mm512_shuffle_epi32(v, _MM_PERM_BADC), add));
            if (n > 2) v = _mm512_min_epu32(v, _mm512_add_epi32(_mm512_shuffle_i64x2(v, v, 0xB1), add));
            if (n > 3) v = _mm512_min_epu32(v, _mm512_add_epi32(_mm512_shuffle_i64x2(v, v, 0x4E), add));
            store(plane + i, v);
        }
    }

    static void step(uint16_t* low, uint16_t* high, int64_t count, uint16_t one) {
        const __m512i add = _mm512_set1_epi16(static_cast<short>(one));
        for (int64_t i = 0; i < count; i += 32) {
            const __m512i a = load(low + i), b = load(high + i);
            store(low + i, _mm512_min_epu16(a, _mm512_add_epi16(b, add)));
            store(high + i, _mm512_min_epu16(b, _mm512_add_epi16(a, add)));
        }
    }

    static void step(uint32_t* low, uint32_t* high, int64_t count, uint32_t one) {
        const __m512i add = _mm512_set1_epi32(static_cast<int>(one));
        for (int64_t i = 0; i < count; i += 16) {
            const __m512i a = load(low + i), b = load(high + i);
            store(low + i, _mm512_min_epu32(a, _mm512_add_epi32(b, add)));
            store(high + i, _mm512_min_epu32(b, _mm512_add_epi32(a, add)));
        }
    }
};

}  // namespace
}  // namespace hcx

#include "viterbi.h"

namespace hcx {
const SearchSet kSearchAvx512 = kSearch;
}
