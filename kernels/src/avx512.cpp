// AVX-512 F, BW, VL, VBMI and VNNI. README.md tells why each kernel is fast.
#include <immintrin.h>

#include "prepare.h"

namespace hcx {
namespace {

__m512 abs_of(__m512 x) { return _mm512_abs_ps(x); }

// Lanes added by halves: 16, 8, 4, 2, 1.
float sum_of(__m512 x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

struct Ops {
    static float sum(const float* x, int64_t inputs) {
        __m512 lanes = _mm512_setzero_ps();
        for (int64_t k = 0; k < inputs; k += 16) lanes = _mm512_add_ps(lanes, _mm512_loadu_ps(x + k));
        return sum_of(lanes);
    }

    static float largest_table(const float* x, int64_t inputs) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = 0; k < inputs; k += 16) {
            const __m512 a = abs_of(_mm512_loadu_ps(x + k));
            const __m512 pair = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
            most = _mm512_max_ps(most, _mm512_add_ps(pair, _mm512_permute_ps(pair, 0x4E)));
        }
        return _mm512_reduce_max_ps(most);
    }

    static float largest(const float* x, int64_t inputs) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = 0; k < inputs; k += 16) most = _mm512_max_ps(most, abs_of(_mm512_loadu_ps(x + k)));
        return _mm512_reduce_max_ps(most);
    }

    // The 16 entries of the table of x[0..3], rounded to whole units.
    static __m512i table(const float* x, __m512 inverse) {
        const __m512i e = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i sign = _mm512_set1_epi32(INT32_MIN);
        __m512 term[4];
        for (int t = 0; t < 4; ++t) {
            const __mmask16 minus = _mm512_testn_epi32_mask(e, _mm512_set1_epi32(1 << t));
            const __m512i bits = _mm512_castps_si512(_mm512_set1_ps(x[t]));
            term[t] = _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, minus, bits, sign));
        }
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(term[0], term[1]), _mm512_add_ps(term[2], term[3]));
        return _mm512_cvtps_epi32(_mm512_mul_ps(sum, inverse));
    }

    static void tables8(const float* x, int64_t inputs, float inverse, int8_t* out) {
        const __m512 by = _mm512_set1_ps(inverse);
        for (int64_t k = 0; k < inputs; k += 4, out += 16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(table(x + k, by)));
        }
    }

    static void tables15(const float* x, int64_t inputs, float inverse, int8_t* out) {
        const __m512 by = _mm512_set1_ps(inverse);
        for (int64_t k = 0; k < inputs; k += 16, out += 128) {
            for (int j = 0; j < 4; ++j) {
                const __m512i value = table(x + k + 4 * j, by);
                const __m512i low = _mm512_and_si512(value, _mm512_set1_epi32(127));
                const __m512i high = _mm512_srai_epi32(value, 7);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * j), _mm512_cvtepi32_epi8(high));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64 + 16 * j), _mm512_cvtepi32_epi8(low));
            }
        }
    }

    // Of 16 inputs those that share a bit of the nibbles of a line are together, as `decode` finds their weights.
    static float codes8(const float* x, int64_t inputs, float inverse, int8_t* out) {
        const __m512 by = _mm512_set1_ps(inverse);
        const __m128i by_bit = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < inputs; k += 16) {
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), by));
            sum = _mm512_add_epi32(sum, value);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k),
                             _mm_shuffle_epi8(_mm512_cvtepi32_epi8(value), by_bit));
        }
        return static_cast<float>(_mm512_reduce_add_epi32(sum));
    }
};

__m512 load_scales(const uint8_t* scales, int dtype, int64_t vector) {
    if (dtype == HCX_FP32) return _mm512_loadu_ps(scales + 64 * vector);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 32 * vector));
    if (dtype == HCX_FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

void prefetch(const uint8_t* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(at + i + kPrefetchBytes), _MM_HINT_T0);
    }
}

__m512i load(const void* at) { return _mm512_loadu_si512(at); }

// vpdpbusd in place. Of the intrinsic GCC 12 makes a copy of every sum in every step, and runs out of registers.
void add_products(__m512i& sum, __m512i weights, __m512i inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
}

// Tables of one segment for one column, in registers.
template <int kLines, bool kWide>
struct Tables {
    __m512i high[2 * kLines], low[2 * kLines];

    explicit Tables(const uint8_t* at) {
        for (int quad = 0; quad < 2 * kLines; ++quad) {
            high[quad] = load(at + quad * (kWide ? 128 : 64));
            if (kWide) low[quad] = load(at + quad * 128 + 64);
        }
    }
};

// What the lines of one plane of one tile select, for `kColumns` columns: one number per row. A lookup is one vpermb
// over four tables of 16 entries, an index is a nibble and, above it, the number of the table; vpdpbusd by ones adds
// four.
template <int kLines, bool kWide, int kColumns>
struct Lookup {
    const uint8_t* tables[kColumns];

    void run(const uint8_t* weights, __m512 (&sums)[kColumns]) const {
        const __m512i nibble = _mm512_set1_epi8(15), number = _mm512_set1_epi32(0x30201000);
        const __m512i ones = _mm512_set1_epi8(1);
        __m512i high[kColumns], low[kColumns];
        for (int c = 0; c < kColumns; ++c) high[c] = low[c] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int l = 0; l < kLines; ++l) {
            _mm_prefetch(reinterpret_cast<const char*>(weights + l * kLineBytes + kPrefetchBytes), _MM_HINT_T0);
            const __m512i line = load(weights + l * kLineBytes);
            // (line & nibble) | number
            const __m512i first = _mm512_ternarylogic_epi32(line, nibble, number, 0xEA);
            const __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi16(line, 4), nibble, number, 0xEA);
#pragma GCC unroll 8
            for (int c = 0; c < kColumns; ++c) {
                const uint8_t* at = tables[c] + l * (kWide ? kTable15Bytes : kTable8Bytes);
                add_products(high[c], ones, _mm512_permutexvar_epi8(first, load(at)));
                if (kWide) add_products(low[c], ones, _mm512_permutexvar_epi8(first, load(at + 64)));
                at += kWide ? 128 : 64;
                add_products(high[c], ones, _mm512_permutexvar_epi8(second, load(at)));
                if (kWide) add_products(low[c], ones, _mm512_permutexvar_epi8(second, load(at + 64)));
            }
        }
        for (int c = 0; c < kColumns; ++c) {
            const __m512i sum = kWide ? _mm512_add_epi32(_mm512_slli_epi32(high[c], 7), low[c]) : high[c];
            sums[c] = _mm512_cvtepi32_ps(sum);
        }
    }
};

// The same for one column, whose tables stay in registers over the tiles of a block.
template <int kLines, bool kWide>
__m512 lookup(const Tables<kLines, kWide>& tables, const uint8_t* weights) {
    const __m512i nibble = _mm512_set1_epi8(15), number = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
    // Two chains of sums: one would wait for itself.
    __m512i high[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, low[2] = {high[0], high[0]};
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l) {
        _mm_prefetch(reinterpret_cast<const char*>(weights + l * kLineBytes + kPrefetchBytes), _MM_HINT_T0);
        const __m512i line = load(weights + l * kLineBytes);
        const __m512i index[2] = {_mm512_ternarylogic_epi32(line, nibble, number, 0xEA),
                                  _mm512_ternarylogic_epi32(_mm512_srli_epi16(line, 4), nibble, number, 0xEA)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            add_products(high[i], ones, _mm512_permutexvar_epi8(index[i], tables.high[2 * l + i]));
            if (kWide) add_products(low[i], ones, _mm512_permutexvar_epi8(index[i], tables.low[2 * l + i]));
        }
    }
    const __m512i sum = _mm512_add_epi32(high[0], high[1]);
    if (!kWide) return _mm512_cvtepi32_ps(sum);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum, 7), _mm512_add_epi32(low[0], low[1])));
}

// Where a block is read: one group after the other.
struct Cursor {
    const uint8_t* scales;
    const float* offset;
    const uint8_t* lines;
    int64_t line, segment;
};

template <int kLines, bool kWide, int kColumns>
void segment_tables(const Plan& plan, const Cursor& at, int tiles, const Activations& a, int64_t first, bool alone,
                    bool begins, float* sums, float* out) {
    constexpr int kBytes = kWide ? kTable15Bytes : kTable8Bytes;
    Lookup<kLines, kWide, kColumns> many;
    __m512 unit[kColumns];
    for (int c = 0; c < kColumns; ++c) {
        many.tables[c] = a.tables + (first + c) * a.table_stride + at.line * kBytes;
        unit[c] = _mm512_set1_ps(a.segment_scale[(first + c) * a.segment_stride + at.segment]);
    }
    for (int c = 0; c < kColumns && kColumns > 1; ++c) {  // tables of the next segment, from the second cache
#pragma GCC unroll 16
        for (int i = 0; i < kLines * kBytes; i += kLineBytes) {
            _mm_prefetch(reinterpret_cast<const char*>(many.tables[c] + kLines * kBytes + i), _MM_HINT_T0);
        }
    }
    const Tables<kLines, kWide> one(many.tables[0]);
    const uint8_t* weights = at.lines;
    for (int tile = 0; tile < tiles; ++tile) {
        __m512 y[kColumns];
        for (int c = 0; c < kColumns; ++c) y[c] = _mm512_loadu_ps(out + c * kBlockRows + tile * kTileRows);
        for (int plane = 0; plane < plan.bits; ++plane, weights += kLines * kLineBytes) {
            __m512 found[kColumns];
            if (kColumns == 1) {
                found[0] = lookup(one, weights);
            } else {
                many.run(weights, found);
            }
            if (alone) {
                const __m512 scale = load_scales(at.scales, plan.scale_dtype, tile * plan.bits + plane);
                for (int c = 0; c < kColumns; ++c) {
                    y[c] = _mm512_fmadd_ps(scale, _mm512_mul_ps(found[c], unit[c]), y[c]);
                }
                continue;
            }
            for (int c = 0; c < kColumns; ++c) {
                float* sum = sums + ((c * kTiles + tile) * kMaxBits + plane) * kTileRows;
                const __m512 more = begins ? _mm512_mul_ps(found[c], unit[c])
                                           : _mm512_fmadd_ps(found[c], unit[c], _mm512_loadu_ps(sum));
                _mm512_storeu_ps(sum, more);
            }
        }
        if (!alone) continue;
        for (int c = 0; c < kColumns; ++c) _mm512_storeu_ps(out + c * kBlockRows + tile * kTileRows, y[c]);
    }
}

template <bool kWide, int kColumns>
void block_columns(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, float* out) {
    alignas(64) float sums[kColumns * kTiles * kMaxBits * kTileRows];  // of groups of several segments
    for (int i = 0; i < kColumns * kTiles; ++i) _mm512_storeu_ps(out + i * kTileRows, _mm512_setzero_ps());
    Cursor at{nullptr, nullptr, block, 0, 0};
    for (int64_t group = 0; group < plan.groups; ++group) {
        at.scales = at.lines;
        prefetch(at.scales, head_bytes(plan, tiles));
        at.offset = reinterpret_cast<const float*>(at.scales + scales_bytes_of_tiles(plan, tiles));
        at.lines += head_bytes(plan, tiles);
        const int64_t lines = lines_of_group(plan, group);
        const bool alone = lines <= kSegmentLines;
        for (int64_t done = 0; done < lines; done += kSegmentLines) {
            const int64_t count = lines - done < kSegmentLines ? lines - done : kSegmentLines;
            const bool begins = done == 0;
            switch (count) {
                case 1: segment_tables<1, kWide, kColumns>(plan, at, tiles, a, first, alone, begins, sums, out); break;
                case 2: segment_tables<2, kWide, kColumns>(plan, at, tiles, a, first, alone, begins, sums, out); break;
                case 3: segment_tables<3, kWide, kColumns>(plan, at, tiles, a, first, alone, begins, sums, out); break;
                default: segment_tables<4, kWide, kColumns>(plan, at, tiles, a, first, alone, begins, sums, out);
            }
            at.lines += tiles * plan.bits * count * kLineBytes;
            at.line += count;
            ++at.segment;
        }
        for (int c = 0; c < kColumns; ++c) {
            const __m512 inputs = _mm512_set1_ps(a.group_sum[(first + c) * a.group_stride + group]);
            for (int tile = 0; tile < tiles && (!alone || plan.has_offset); ++tile) {
                float* to = out + c * kBlockRows + tile * kTileRows;
                __m512 y = _mm512_loadu_ps(to);
                for (int plane = 0; plane < plan.bits && !alone; ++plane) {
                    const __m512 scale = load_scales(at.scales, plan.scale_dtype, tile * plan.bits + plane);
                    const float* sum = sums + ((c * kTiles + tile) * kMaxBits + plane) * kTileRows;
                    y = _mm512_fmadd_ps(scale, _mm512_load_ps(sum), y);
                }
                if (plan.has_offset) y = _mm512_fmadd_ps(_mm512_loadu_ps(at.offset + tile * kTileRows), inputs, y);
                _mm512_storeu_ps(to, y);
            }
        }
    }
}

template <bool kWide>
void block_tables(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, int columns,
                  float* out) {
    while (columns > 0) {
        const int taken = columns >= 8 ? 8 : columns >= 4 ? 4 : columns >= 2 ? 2 : 1;
        switch (taken) {
            case 8: block_columns<kWide, 8>(plan, block, tiles, a, first, out); break;
            case 4: block_columns<kWide, 4>(plan, block, tiles, a, first, out); break;
            case 2: block_columns<kWide, 2>(plan, block, tiles, a, first, out); break;
            default: block_columns<kWide, 1>(plan, block, tiles, a, first, out);
        }
        first += taken;
        columns -= taken;
        out += taken * kBlockRows;
    }
}

// Planes whose bits are looked up together, 3 at most: 8 entries of 16 rows are what one vpermi2b reads.
constexpr int planes_together(int left) { return left == 4 ? 2 : left < 3 ? left : 3; }

// A tile's scales of one group as whole numbers of steps (see RowCodes in portable.cpp), and what they add up to.
struct TileCodes {
    __m512 step, half;
    // Of each planes_together: byte 8 r + e (4 r + e where they are less than 3) is what the bits e of row r are worth.
    // The first holds the sum below zero, too.
    __m512i table[kMaxBits / 2][2];

    void read(const Plan& plan, const uint8_t* scales, int tile) {
        const __m512i replicate = _mm512_set1_epi32(0x01010101);
        __m512 sum = _mm512_setzero_ps(), scale[kMaxBits];
        for (int p = 0; p < plan.bits; ++p) {
            scale[p] = load_scales(scales, plan.scale_dtype, tile * plan.bits + p);
            sum = _mm512_add_ps(sum, abs_of(scale[p]));
        }
        const __m512 tiny = _mm512_set1_ps(kTiny);
        const __mmask16 some = _mm512_cmp_ps_mask(sum, tiny, _CMP_NLE_UQ);
        const __mmask16 usable = _mm512_mask_cmp_ps_mask(some, sum, _mm512_set1_ps(FLT_MAX / 2), _CMP_LE_OQ);
        const __m512 parts = _mm512_set1_ps(255.0F - 0.5F * static_cast<float>(plan.bits));
        step = _mm512_maskz_div_ps(some, _mm512_add_ps(sum, sum), parts);
        const __m512 inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(1.0F), step);
        __m512i total = _mm512_setzero_si512(), below = total, code[kMaxBits];
        for (int p = 0; p < plan.bits; ++p) {
            const __m512 size = abs_of(scale[p]);
            const __m512i rounded =
                _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(_mm512_add_ps(size, size), inverse));
            const __mmask16 minus = _mm512_cmp_ps_mask(scale[p], _mm512_setzero_ps(), _CMP_LT_OQ);
            total = _mm512_add_epi32(total, rounded);
            below = _mm512_mask_add_epi32(below, minus, below, rounded);
            const __m512i sign = _mm512_mask_sub_epi32(rounded, minus, _mm512_setzero_si512(), rounded);
            code[p] = _mm512_mullo_epi32(_mm512_and_si512(sign, _mm512_set1_epi32(255)), replicate);
        }
        half = _mm512_mul_ps(_mm512_set1_ps(0.5F), _mm512_cvtepi32_ps(total));
        __m512i base = _mm512_mullo_epi32(below, replicate);
        for (int p = 0, t = 0; p < plan.bits; ++t) {
            const int together = planes_together(plan.bits - p);
            tabulate(base, code + p, together, table[t]);
            base = _mm512_setzero_si512();
            p += together;
        }
    }

    static void tabulate(__m512i base, const __m512i* code, int planes, __m512i* table) {
        constexpr __mmask64 kSet[3] = {0xAAAAAAAAAAAAAAAA, 0xCCCCCCCCCCCCCCCC, 0xF0F0F0F0F0F0F0F0};
        const __m512i rows = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        const __m512i more_rows = _mm512_add_epi32(rows, _mm512_set1_epi32(8));
        const bool two = planes == 3;
        table[0] = two ? _mm512_permutexvar_epi32(rows, base) : base;
        if (two) table[1] = _mm512_permutexvar_epi32(more_rows, base);
        for (int p = 0; p < planes; ++p) {
            const __m512i first = two ? _mm512_permutexvar_epi32(rows, code[p]) : code[p];
            table[0] = _mm512_mask_add_epi8(table[0], kSet[p], table[0], first);
            if (!two) continue;
            table[1] = _mm512_mask_add_epi8(table[1], kSet[p], table[1], _mm512_permutexvar_epi32(more_rows, code[p]));
        }
    }
};

// Bit 4 i + `bit` of every line, at bit 4 i + `plane`.
template <int kBit, int kPlane>
__m512i moved(__m512i line) {
    if constexpr (kBit > kPlane) return _mm512_srli_epi16(line, kBit - kPlane);
    if constexpr (kBit < kPlane) return _mm512_slli_epi16(line, kPlane - kBit);
    return line;
}

// Adds what inputs 4 j + kBit of the two halves of a line are worth by the last `kLeft` planes.
template <int kBit, int kLeft>
void add_codes(const __m512i* line, const __m512i (*table)[2], __m512i& first, __m512i& second) {
    constexpr int kPlanes = planes_together(kLeft);
    // a ? b : c is 0xCA, (a & b) | c is 0xEA
    __m512i bits = moved<kBit, 0>(line[0]);
    if (kPlanes > 1) bits = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x11), bits, moved<kBit, 1>(line[1]), 0xCA);
    if (kPlanes > 2) bits = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x33), bits, moved<kBit, 2>(line[2]), 0xCA);
    // Of each byte the row that it is of, times the entries of a row.
    const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i rows = _mm512_mullo_epi32(row, _mm512_set1_epi32(kPlanes == 3 ? 0x08080808 : 0x04040404));
    const __m512i mask = _mm512_set1_epi8((1 << kPlanes) - 1);
    const __m512i low = _mm512_ternarylogic_epi32(bits, mask, rows, 0xEA);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bits, 4), mask, rows, 0xEA);
    __m512i found[2];
    if (kPlanes == 3) {
        found[0] = _mm512_permutex2var_epi8(table[0][0], low, table[0][1]);
        found[1] = _mm512_permutex2var_epi8(table[0][0], high, table[0][1]);
    } else {
        found[0] = _mm512_permutexvar_epi8(low, table[0][0]);
        found[1] = _mm512_permutexvar_epi8(high, table[0][0]);
    }
    first = _mm512_add_epi8(first, found[0]);
    second = _mm512_add_epi8(second, found[1]);
    if constexpr (kLeft > kPlanes) {
        add_codes<kBit, kLeft - kPlanes>(line + kPlanes, table + 1, first, second);
    }
}

template <int kBit, int kBits>
void decode_bit(const __m512i* line, const TileCodes& codes, uint8_t* out) {
    __m512i first = _mm512_setzero_si512(), second = first;
    add_codes<kBit, kBits>(line, codes.table, first, second);
    _mm512_store_si512(out + kBit * kLineBytes, first);
    _mm512_store_si512(out + (4 + kBit) * kLineBytes, second);
}

// Codes of 16 rows x 128 inputs: [input / 4][row][4], the inputs in the order of Ops::codes8.
template <int kBits>
void decode(const TileCodes& codes, const uint8_t* weights, int64_t lines, uint8_t* out) {
    for (int64_t l = 0; l < lines; ++l, out += 8 * kLineBytes) {
        __m512i line[kBits];
        for (int p = 0; p < kBits; ++p) line[p] = load(weights + (p * lines + l) * kLineBytes);
        decode_bit<0, kBits>(line, codes, out);
        decode_bit<1, kBits>(line, codes, out);
        decode_bit<2, kBits>(line, codes, out);
        decode_bit<3, kBits>(line, codes, out);
    }
}

constexpr int kTileCodeBytes = kSegmentLines * 8 * kLineBytes;

// Always four tiles, those beyond the last row of codes zero: with constant bounds all sums stay in registers.
template <int kColumns>
__attribute__((noinline)) void multiply_codes(const TileCodes* tile_codes, const uint8_t* decoded, int64_t lines,
                                              const Activations& a, int64_t line, int64_t segment, int64_t first,
                                              float* out) {
    __m512i sum[kColumns][kTiles];
    const uint8_t* x[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
        x[c] = a.tables + (first + c) * a.table_stride + line * kLineInputs;
#pragma GCC unroll 4
        for (int tile = 0; tile < kTiles; ++tile) sum[c][tile] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < 8 * lines; ++k) {
        __m512i weights[kTiles];
#pragma GCC unroll 4
        for (int tile = 0; tile < kTiles; ++tile) {
            weights[tile] = _mm512_load_si512(decoded + tile * kTileCodeBytes + k * kLineBytes);
        }
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
            int32_t four;
            __builtin_memcpy(&four, x[c] + 4 * k, 4);
            const __m512i inputs = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int tile = 0; tile < kTiles; ++tile) {
                add_products(sum[c][tile], weights[tile], inputs);
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
        const int64_t at = (first + c) * a.segment_stride + segment;
        const __m512 unit = _mm512_set1_ps(a.segment_scale[at]), inputs = _mm512_set1_ps(a.segment_sum[at]);
#pragma GCC unroll 4
        for (int tile = 0; tile < kTiles; ++tile) {
            const __m512 centred = _mm512_fnmadd_ps(tile_codes[tile].half, inputs, _mm512_cvtepi32_ps(sum[c][tile]));
            float* to = out + c * kBlockRows + tile * kTileRows;
            const __m512 scale = _mm512_mul_ps(tile_codes[tile].step, unit);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(centred, scale, _mm512_loadu_ps(to)));
        }
    }
}

template <int kBits>
void block_codes_of(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, int columns,
                    float* out) {
    alignas(64) uint8_t decoded[kTiles * kTileCodeBytes];  // 8 KiB: stays in the first cache over all columns
    for (int i = tiles * kTileCodeBytes; i < kTiles * kTileCodeBytes; i += kLineBytes) {
        _mm512_store_si512(decoded + i, _mm512_setzero_si512());
    }
    for (int i = 0; i < columns * kTiles; ++i) _mm512_storeu_ps(out + i * kTileRows, _mm512_setzero_ps());
    TileCodes codes[kTiles];
    for (TileCodes& tile : codes) tile.step = tile.half = _mm512_setzero_ps();
    const uint8_t* at = block;
    int64_t line = 0, segment = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
        const auto* offset = reinterpret_cast<const float*>(at + scales_bytes_of_tiles(plan, tiles));
        prefetch(at, head_bytes(plan, tiles));
        for (int tile = 0; tile < tiles; ++tile) codes[tile].read(plan, at, tile);
        at += head_bytes(plan, tiles);
        const int64_t end = line + lines_of_group(plan, group);
        for (; line < end; ++segment) {
            const int64_t count = end - line < kSegmentLines ? end - line : kSegmentLines;
            for (int tile = 0; tile < tiles; ++tile, at += plan.bits * count * kLineBytes) {
                prefetch(at, plan.bits * count * kLineBytes);
                decode<kBits>(codes[tile], at, count, decoded + tile * kTileCodeBytes);
            }
            int c = 0;
            for (; c + 4 <= columns; c += 4) {
                multiply_codes<4>(codes, decoded, count, a, line, segment, first + c, out + c * kBlockRows);
            }
            float* to = out + c * kBlockRows;
            switch (columns - c) {
                case 3: multiply_codes<3>(codes, decoded, count, a, line, segment, first + c, to); break;
                case 2: multiply_codes<2>(codes, decoded, count, a, line, segment, first + c, to); break;
                case 1: multiply_codes<1>(codes, decoded, count, a, line, segment, first + c, to); break;
                default: break;
            }
            line += count;
        }
        for (int c = 0; c < columns && plan.has_offset; ++c) {
            const __m512 sum = _mm512_set1_ps(a.group_sum[(first + c) * a.group_stride + group]);
            for (int tile = 0; tile < tiles; ++tile) {
                float* to = out + c * kBlockRows + tile * kTileRows;
                const __m512 z = _mm512_loadu_ps(offset + tile * kTileRows);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(z, sum, _mm512_loadu_ps(to)));
            }
        }
    }
}

void block_codes(const Plan& plan, const uint8_t* block, int tiles, const Activations& a, int64_t first, int columns,
                 float* out) {
    switch (plan.bits) {
        case 1: return block_codes_of<1>(plan, block, tiles, a, first, columns, out);
        case 2: return block_codes_of<2>(plan, block, tiles, a, first, columns, out);
        case 3: return block_codes_of<3>(plan, block, tiles, a, first, columns, out);
        case 4: return block_codes_of<4>(plan, block, tiles, a, first, columns, out);
        case 5: return block_codes_of<5>(plan, block, tiles, a, first, columns, out);
        case 6: return block_codes_of<6>(plan, block, tiles, a, first, columns, out);
        case 7: return block_codes_of<7>(plan, block, tiles, a, first, columns, out);
        default: return block_codes_of<8>(plan, block, tiles, a, first, columns, out);
    }
}

}  // namespace

extern const KernelSet kAvx512 = {
    {prepare_tables8<Ops>, block_tables<false>},
    {prepare_tables15<Ops>, block_tables<true>},
    {prepare_codes8<Ops>, block_codes},
};

}  // namespace hcx
