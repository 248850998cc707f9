// AVX2, FMA and F16C: tables by vpshufb. A line is first turned so that 16 bytes meet one table.
#include <immintrin.h>

#include "prepare.h"

namespace hcx {
namespace {

__m256 abs_of(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }

float largest_of(__m256 x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

struct Ops {
    static float sum(const float* x, int64_t inputs) {
        __m256 low = _mm256_setzero_ps(), high = low;
        for (int64_t k = 0; k < inputs; k += 16) {
            low = _mm256_add_ps(low, _mm256_loadu_ps(x + k));
            high = _mm256_add_ps(high, _mm256_loadu_ps(x + k + 8));
        }
        const __m256 eight = _mm256_add_ps(low, high);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    static float largest_table(const float* x, int64_t inputs) {
        __m256 most = _mm256_setzero_ps();
        for (int64_t k = 0; k < inputs; k += 8) {
            const __m256 a = abs_of(_mm256_loadu_ps(x + k));
            const __m256 pair = _mm256_add_ps(a, _mm256_permute_ps(a, 0xB1));
            most = _mm256_max_ps(most, _mm256_add_ps(pair, _mm256_permute_ps(pair, 0x4E)));
        }
        return largest_of(most);
    }

    // Entries 0 to 7 (`half` 0) or 8 to 15 of the table of x[0..3], rounded to whole units.
    static __m256i entries(const float* x, int half, __m256 inverse) {
        const int minus = INT32_MIN;
        const __m256i sign[3] = {_mm256_set_epi32(0, minus, 0, minus, 0, minus, 0, minus),
                                 _mm256_set_epi32(0, 0, minus, minus, 0, 0, minus, minus),
                                 _mm256_set_epi32(0, 0, 0, 0, minus, minus, minus, minus)};
        __m256 term[4];
        for (int t = 0; t < 3; ++t) term[t] = _mm256_xor_ps(_mm256_set1_ps(x[t]), _mm256_castsi256_ps(sign[t]));
        term[3] = _mm256_set1_ps(half != 0 ? x[3] : -x[3]);
        const __m256 sum = _mm256_add_ps(_mm256_add_ps(term[0], term[1]), _mm256_add_ps(term[2], term[3]));
        return _mm256_cvtps_epi32(_mm256_mul_ps(sum, inverse));
    }

    static void store16(__m256i first, __m256i second, int8_t* out) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    }

    static void tables8(const float* x, int64_t inputs, float inverse, int8_t* out) {
        const __m256 by = _mm256_set1_ps(inverse);
        for (int64_t k = 0; k < inputs; k += 4, out += 16) store16(entries(x + k, 0, by), entries(x + k, 1, by), out);
    }

    static void tables15(const float* x, int64_t inputs, float inverse, int8_t* out) {
        const __m256 by = _mm256_set1_ps(inverse);
        const __m256i mask = _mm256_set1_epi32(127);
        for (int64_t k = 0; k < inputs; k += 16, out += 128) {
            for (int j = 0; j < 4; ++j) {
                const __m256i a = entries(x + k + 4 * j, 0, by), b = entries(x + k + 4 * j, 1, by);
                store16(_mm256_srai_epi32(a, 7), _mm256_srai_epi32(b, 7), out + 16 * j);
                store16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask), out + 64 + 16 * j);
            }
        }
    }
};

void prefetch(const uint8_t* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(at + i + kPrefetchBytes), _MM_HINT_T0);
    }
}

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

__m256 load_scales(const uint8_t* scales, int dtype, int64_t vector, int half) {
    if (dtype == HCX_FP32) return _mm256_loadu_ps(reinterpret_cast<const float*>(scales + 64 * vector + 32 * half));
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 32 * vector + 16 * half));
    if (dtype == HCX_FP16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Sixteen rows.
struct Rows {
    __m256 low, high;
};

// Sums of int16 in the order in which a turned line leaves its rows; the two lanes belong to two tables.
struct Sums {
    __m256i first, second;

    void clear() { first = second = _mm256_setzero_si256(); }

    // Adds two lookups: bytes of a row meet, and a multiplication by ones adds them into 16 bits.
    void add(__m256i a, __m256i b) {
        const __m256i ones = _mm256_set1_epi8(1);
        first = _mm256_add_epi16(first, _mm256_maddubs_epi16(ones, _mm256_unpacklo_epi8(a, b)));
        second = _mm256_add_epi16(second, _mm256_maddubs_epi16(ones, _mm256_unpackhi_epi8(a, b)));
    }

    // Whole numbers of rows 0 to 7 and 8 to 15. 16 bits hold a segment: 32 entries of at most 128.
    void rows(__m256i& low, __m256i& high) const {
        const __m128i a = _mm_add_epi16(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1));
        const __m128i b = _mm_add_epi16(_mm256_castsi256_si128(second), _mm256_extracti128_si256(second, 1));
        const __m256i wide_a = _mm256_cvtepi16_epi32(a), wide_b = _mm256_cvtepi16_epi32(b);
        low = _mm256_permute2x128_si256(wide_a, wide_b, 0x20);
        high = _mm256_permute2x128_si256(wide_a, wide_b, 0x31);
    }
};

// Indices of one line: [table pair][nibble], a table to each lane, rows in the order 0-3, 8-11, 4-7, 12-15.
void turn(const uint8_t* line, __m256i (&index)[2][2]) {
    const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                            0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i a = _mm256_shuffle_epi8(load(line), gather), b = _mm256_shuffle_epi8(load(line + 32), gather);
    const __m256i pair[2] = {_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(a, b), 0xD8),
                             _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(a, b), 0xD8)};
    for (int i = 0; i < 2; ++i) {
        index[i][0] = _mm256_and_si256(pair[i], nibble);
        index[i][1] = _mm256_and_si256(_mm256_srli_epi16(pair[i], 4), nibble);
    }
}

template <bool kWide, int kColumns>
void lookup(const uint8_t* weights, int64_t lines, const uint8_t* const (&tables)[kColumns], Rows (&found)[kColumns]) {
    constexpr int kQuad = kWide ? 128 : 64;
    Sums high[kColumns], low[kColumns];
    for (int c = 0; c < kColumns; ++c) {
        high[c].clear();
        low[c].clear();
    }
    for (int64_t l = 0; l < lines; ++l) {
        _mm_prefetch(reinterpret_cast<const char*>(weights + l * kLineBytes + kPrefetchBytes), _MM_HINT_T0);
        __m256i index[2][2];
        turn(weights + l * kLineBytes, index);
        for (int c = 0; c < kColumns; ++c) {
            const uint8_t* at = tables[c] + l * 2 * kQuad;
            for (int i = 0; i < 2; ++i) {
                const uint8_t* pair = at + 32 * i;
                high[c].add(_mm256_shuffle_epi8(load(pair), index[i][0]),
                            _mm256_shuffle_epi8(load(pair + kQuad), index[i][1]));
                if (!kWide) continue;
                low[c].add(_mm256_shuffle_epi8(load(pair + 64), index[i][0]),
                           _mm256_shuffle_epi8(load(pair + kQuad + 64), index[i][1]));
            }
        }
    }
    for (int c = 0; c < kColumns; ++c) {
        __m256i a, b;
        high[c].rows(a, b);
        if (kWide) {
            __m256i d, e;
            low[c].rows(d, e);
            a = _mm256_add_epi32(_mm256_slli_epi32(a, 7), d);
            b = _mm256_add_epi32(_mm256_slli_epi32(b, 7), e);
        }
        found[c] = {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
    }
}

template <bool kWide, int kColumns>
void block_columns(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, float* out) {
    constexpr int kBytes = kWide ? kTable15Bytes : kTable8Bytes;
    alignas(32) float sums[kColumns][kTiles][kMaxBits][kTileRows];
    for (int i = 0; i < kColumns * kBlockRows; i += 8) _mm256_storeu_ps(out + i, _mm256_setzero_ps());
    const uint8_t* at = block;
    int64_t line = 0, segment = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
        const uint8_t* scales = at;
        const auto* offset = reinterpret_cast<const float*>(at + scales_bytes_of_tiles(plan, tiles));
        prefetch(at, head_bytes(plan, tiles));
        at += head_bytes(plan, tiles);
        const int64_t begin = line, end = line + lines_of_group(plan, group);
        for (; line < end; ++segment) {
            const int64_t count = end - line < kSegmentLines ? end - line : kSegmentLines;
            const uint8_t* tables[kColumns];
            __m256 unit[kColumns];
            for (int c = 0; c < kColumns; ++c) {
                tables[c] = a.tables + (first + c) * a.table_stride + line * kBytes;
                unit[c] = _mm256_set1_ps(a.segment_scale[(first + c) * a.segment_stride + segment]);
            }
            for (int tile = 0; tile < tiles; ++tile) {
                for (int plane = 0; plane < plan.bits; ++plane, at += count * kLineBytes) {
                    Rows found[kColumns];
                    lookup<kWide, kColumns>(at, count, tables, found);
                    for (int c = 0; c < kColumns; ++c) {
                        float* sum = sums[c][tile][plane];
                        __m256 low = _mm256_mul_ps(found[c].low, unit[c]);
                        __m256 high = _mm256_mul_ps(found[c].high, unit[c]);
                        if (line != begin) {
                            low = _mm256_fmadd_ps(found[c].low, unit[c], _mm256_load_ps(sum));
                            high = _mm256_fmadd_ps(found[c].high, unit[c], _mm256_load_ps(sum + 8));
                        }
                        _mm256_store_ps(sum, low);
                        _mm256_store_ps(sum + 8, high);
                    }
                }
            }
            line += count;
        }
        for (int half = 0; half < 2 * tiles; ++half) {
            const int tile = half / 2, part = half % 2;
            for (int c = 0; c < kColumns; ++c) {
                float* to = out + c * kBlockRows + tile * kTileRows + 8 * part;
                __m256 y = _mm256_loadu_ps(to);
                for (int plane = 0; plane < plan.bits; ++plane) {
                    const __m256 scale = load_scales(scales, plan.scale_dtype, tile * plan.bits + plane, part);
                    y = _mm256_fmadd_ps(scale, _mm256_load_ps(sums[c][tile][plane] + 8 * part), y);
                }
                if (plan.has_offset) {
                    const __m256 sum = _mm256_set1_ps(a.group_sum[(first + c) * a.group_stride + group]);
                    y = _mm256_fmadd_ps(_mm256_loadu_ps(offset + tile * kTileRows + 8 * part), sum, y);
                }
                _mm256_storeu_ps(to, y);
            }
        }
    }
}

template <bool kWide>
void block_tables(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, int columns,
                  float* out) {
    int c = 0;
    for (; c + 4 <= columns; c += 4) block_columns<kWide, 4>(plan, block, tiles, a, first + c, out + c * kBlockRows);
    for (; c < columns; ++c) block_columns<kWide, 1>(plan, block, tiles, a, first + c, out + c * kBlockRows);
}

}  // namespace

extern const KernelSet kAvx2 = {
    {prepare_tables8<Ops>, block_tables<false>},
    {prepare_tables15<Ops>, block_tables<true>},
    {nullptr, nullptr},
};

}  // namespace hcx
