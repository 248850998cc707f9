// The exact search for the code words of one segment: dynamic programming over the words in the registers.
//
// After block t the state is s = x_t + 2^n_in x_(t-1) + ... (n_s words). C_t(s) is the smallest number of wrong kept
// bits of any path to s, relative to the smallest of all states before this block, so it stays small:
//
//     C_t(x, r) = min over z of  C_(t-1)(r, z) + e_t(x, r, z)        r: the words between, z: the oldest
//
// With n kept bits in the block, e_t is the Hamming distance of D_last[z] and v = target ^ D_0[x] ^ D_between[r], words
// of n bits. So for a fixed r the minimum over z for all v at once is a distance transform of n steps over 2^n numbers
// instead of 2^n_in for each x. Cost and z travel in one integer, cost above z: the smaller integer is the smaller
// cost, and of equal costs the smaller z, which is what brute force finds.
//
// Included by one file per instruction set, which defines Lanes first: plain data and static functions only.
#pragma once

#include <cstdint>

#include "gf2.h"

namespace hcx {

// Above this many kept bits a block is searched by brute force: 2^(2 n_in) steps are then the fewer.
constexpr int kMaxTransformBits = 17;
static inline int transform_bits(int n_in) { return n_in <= 9 ? 14 : n_in + 5; }
constexpr int kMaxSearchedIn = 12;  // with registers
constexpr int kMaxStatesBits = 16;
static_assert(kMaxSearchedIn + 5 <= kMaxTransformBits, "the transform has room");

// One segment. `Cost` and `Packed` are uint8_t and uint16_t where costs allow it, else uint16_t and uint32_t.
struct Search {
    int n_in, n_s;
    int words;                // 64-bit words of a block
    int64_t blocks;
    const uint64_t* target;   // [blocks][words]
    const uint64_t* mask;     // [blocks][words]
    const uint64_t* columns;  // [n_s + 1][n_in][words]: column i of M_j
    uint32_t start_penalty;   // of registers that do not begin at zero: more than that could ever save
    void* costs;              // [2][states] Cost
    void* back;               // [blocks][states] Cost: the oldest word of the best path
    void* plane;              // [2^transform_bits(n_in)] Packed, aligned to 64 bytes
    uint32_t* tables;         // [n_s + 1][2^n_in] D_j as words of up to 32 bits
    uint64_t* wide;           // [n_s + 1][2^n_in][kMaxWords]
    uint16_t* codes;          // [blocks], out
    int64_t errors;           // out
};

struct SearchSet {
    void (*narrow)(Search&);  // uint8_t costs
    void (*wide)(Search&);    // uint16_t costs
};
extern const SearchSet kSearchPortable;
extern const SearchSet kSearchAvx2;
extern const SearchSet kSearchAvx512;

#ifdef HCX_SEARCH_BODY
namespace {

// The kept bits of every column and of the target, moved together.
struct Compressed {
    int n;                                       // kept bits
    int words;                                   // that they take
    uint64_t target[kMaxWords];
    uint64_t columns[kMaxRegisters + 1][kMaxIn][kMaxWords];
};

inline void compress(const uint64_t* from, const uint64_t* mask, int words, uint64_t* to) {
    for (int w = 0; w < kMaxWords; ++w) to[w] = 0;
    int filled = 0;
    for (int w = 0; w < words; ++w) {
        const uint64_t bits = Lanes::extract(from[w], mask[w]);
        const int shift = filled % 64, count = __builtin_popcountll(mask[w]);
        to[filled / 64] |= bits << shift;
        if (shift + count > 64) to[filled / 64 + 1] |= bits >> (64 - shift);
        filled += count;
    }
}

inline void compress_block(const Search& search, int64_t t, Compressed& block) {
    const uint64_t* mask = search.mask + t * search.words;
    block.n = 0;
    for (int w = 0; w < search.words; ++w) block.n += __builtin_popcountll(mask[w]);
    block.words = (block.n + 63) / 64;
    compress(search.target + t * search.words, mask, search.words, block.target);
    for (int j = 0; j <= search.n_s; ++j) {
        for (int i = 0; i < search.n_in; ++i) {
            compress(search.columns + (j * search.n_in + i) * search.words, mask, search.words, block.columns[j][i]);
        }
    }
}

// D[x] for all words x, by doubling.
template <class Word>
inline void expand(const uint64_t (*columns)[kMaxWords], int n_in, Word* table) {
    table[0] = 0;
    for (int i = 0; i < n_in; ++i) {
        const Word column = static_cast<Word>(columns[i][0]);
        for (int x = 0; x < 1 << i; ++x) table[(1 << i) + x] = table[x] ^ column;
    }
}

inline void expand_wide(const uint64_t (*columns)[kMaxWords], int n_in, int words, uint64_t* table) {
    for (int w = 0; w < words; ++w) table[w] = 0;
    for (int i = 0; i < n_in; ++i) {
        for (int x = 0; x < 1 << i; ++x) {
            for (int w = 0; w < words; ++w) table[((1 << i) + x) * words + w] = table[x * words + w] ^ columns[i][w];
        }
    }
}

// f[v] <- min over u of f[u] + distance(u, v), n bits.
template <class Packed>
inline void transform(Packed* plane, int n, Packed one) {
    Lanes::small_steps(plane, n, one);
    for (int bit = Lanes::kBits<Packed>; bit < n; ++bit) {
        const int64_t half = int64_t{1} << bit, size = int64_t{1} << n;
        for (int64_t base = 0; base < size; base += 2 * half) Lanes::step(plane + base, plane + base + half, half, one);
    }
}

// What brute force compares: the distances of v to all D[z]. One word of 32 bits serves nearly every block.
template <class Packed>
inline Packed nearest32(const Packed* from, const uint32_t* table, uint32_t v, int count, int shift) {
    Packed best = static_cast<Packed>(~Packed{0});
    for (int z = 0; z < count; ++z) {
        const uint32_t distance = static_cast<uint32_t>(__builtin_popcount(table[z] ^ v));
        const Packed key = static_cast<Packed>(from[z] + (distance << shift));
        best = key < best ? key : best;
    }
    return best;
}

template <class Packed>
inline Packed nearest_wide(const Packed* from, const uint64_t* table, const uint64_t* v, int words, int count,
                           int shift) {
    Packed best = static_cast<Packed>(~Packed{0});
    for (int z = 0; z < count; ++z) {
        uint32_t distance = 0;
        for (int w = 0; w < words; ++w) {
            distance += static_cast<uint32_t>(__builtin_popcountll(table[z * words + w] ^ v[w]));
        }
        const Packed key = static_cast<Packed>(from[z] + (distance << shift));
        best = key < best ? key : best;
    }
    return best;
}

// Without registers every block is searched alone.
inline void search_blocks(Search& search) {
    const int count = 1 << search.n_in;
    search.errors = 0;
    Compressed block;
    for (int64_t t = 0; t < search.blocks; ++t) {
        compress_block(search, t, block);
        uint32_t best = ~0U;
        if (block.words <= 1) {
            uint64_t* table = search.wide;
            expand<uint64_t>(block.columns[0], search.n_in, table);
            for (int x = 0; x < count; ++x) {
                const auto distance = static_cast<uint32_t>(__builtin_popcountll(table[x] ^ block.target[0]));
                const uint32_t key = distance << kMaxIn | static_cast<uint32_t>(x);
                best = key < best ? key : best;
            }
        } else {
            expand_wide(block.columns[0], search.n_in, block.words, search.wide);
            for (int x = 0; x < count; ++x) {
                uint32_t distance = 0;
                for (int w = 0; w < block.words; ++w) {
                    distance += static_cast<uint32_t>(
                        __builtin_popcountll(search.wide[x * block.words + w] ^ block.target[w]));
                }
                const uint32_t key = distance << kMaxIn | static_cast<uint32_t>(x);
                best = key < best ? key : best;
            }
        }
        search.codes[t] = static_cast<uint16_t>(best & ((1U << kMaxIn) - 1));
        search.errors += best >> kMaxIn;
    }
}

template <class Cost, class Packed>
struct Viterbi {
    static constexpr int kShift = 8 * sizeof(Cost);  // of the cost in a packed number, z below it

    Search& search;
    const int n_in, n_s, count;
    const int64_t states, between;  // values of r
    Compressed block;
    Packed from[1 << (sizeof(Cost) == 1 ? 8 : kMaxSearchedIn)];  // cost and z of one r

    explicit Viterbi(Search& s)
        : search(s), n_in(s.n_in), n_s(s.n_s), count(1 << s.n_in), states(int64_t{1} << (s.n_in * s.n_s)),
          between(states >> s.n_in) {}

    // The costs of all z for one r, relative to `base`.
    void gather(const Cost* old, int64_t r, uint32_t base) {
        for (int z = 0; z < count; ++z) {
            from[z] = static_cast<Packed>((static_cast<uint32_t>(old[z * between + r]) - base) << kShift |
                                          static_cast<uint32_t>(z));
        }
    }

    static void put(Packed best, Cost* next, Cost* back, int64_t state, uint32_t& least) {
        const auto cost = static_cast<uint32_t>(best >> kShift);
        next[state] = static_cast<Cost>(cost);
        back[state] = static_cast<Cost>(best);
        least = cost < least ? cost : least;
    }

    // D_j of the words between, added.
    uint32_t middle(int64_t r) const {
        uint32_t sum = 0;
        for (int j = 1; j < n_s; ++j, r >>= n_in) sum ^= search.tables[j * count + (r & (count - 1))];
        return sum;
    }

    uint32_t by_transform(const Cost* old, uint32_t base, Cost* next, Cost* back) {
        auto* plane = static_cast<Packed*>(search.plane);
        const int n = block.n;
        const int64_t size = int64_t{1} << (n > Lanes::kBits<Packed> ? n : Lanes::kBits<Packed>);
        // Higher than any cost that can win, and low enough for n steps.
        const auto unreachable =
            static_cast<Packed>((static_cast<Packed>(~Packed{0}) >> kShift) - static_cast<Packed>(n)) << kShift;
        const uint32_t* last = search.tables + static_cast<int64_t>(n_s) * count;
        const uint32_t* first = search.tables;
        uint32_t least = ~0U;
        for (int64_t r = 0; r < between; ++r) {
            for (int64_t v = 0; v < size; ++v) plane[v] = static_cast<Packed>(unreachable);
            gather(old, r, base);
            for (int z = 0; z < count; ++z) {
                Packed& at = plane[last[z]];
                at = from[z] < at ? from[z] : at;
            }
            transform<Packed>(plane, n, static_cast<Packed>(1U << kShift));
            const uint32_t v = static_cast<uint32_t>(block.target[0]) ^ middle(r);
            for (int x = 0; x < count; ++x) put(plane[first[x] ^ v], next, back, (r << n_in) + x, least);
        }
        return least;
    }

    uint32_t by_force32(const Cost* old, uint32_t base, Cost* next, Cost* back) {
        const uint32_t* last = search.tables + static_cast<int64_t>(n_s) * count;
        uint32_t least = ~0U;
        for (int64_t r = 0; r < between; ++r) {
            gather(old, r, base);
            const uint32_t v = static_cast<uint32_t>(block.target[0]) ^ middle(r);
            for (int x = 0; x < count; ++x) {
                put(nearest32(from, last, search.tables[x] ^ v, count, kShift), next, back, (r << n_in) + x, least);
            }
        }
        return least;
    }

    uint32_t by_force_wide(const Cost* old, uint32_t base, Cost* next, Cost* back) {
        const int words = block.words;
        for (int j = 0; j <= n_s; ++j) {
            expand_wide(block.columns[j], n_in, words, search.wide + static_cast<int64_t>(j) * count * words);
        }
        const uint64_t* last = search.wide + static_cast<int64_t>(n_s) * count * words;
        uint32_t least = ~0U;
        for (int64_t r = 0; r < between; ++r) {
            gather(old, r, base);
            uint64_t v[kMaxWords], w[kMaxWords];
            for (int i = 0; i < words; ++i) v[i] = block.target[i];
            int64_t rest = r;
            for (int j = 1; j < n_s; ++j, rest >>= n_in) {
                const uint64_t* entry = search.wide + (static_cast<int64_t>(j) * count + (rest & (count - 1))) * words;
                for (int i = 0; i < words; ++i) v[i] ^= entry[i];
            }
            for (int x = 0; x < count; ++x) {
                for (int i = 0; i < words; ++i) w[i] = v[i] ^ search.wide[x * words + i];
                put(nearest_wide(from, last, w, words, count, kShift), next, back, (r << n_in) + x, least);
            }
        }
        return least;
    }

    void run() {
        Cost* old = static_cast<Cost*>(search.costs);
        Cost* next = old + states;
        for (int64_t s = 0; s < states; ++s) old[s] = static_cast<Cost>(s == 0 ? 0 : search.start_penalty);
        uint32_t base = 0;
        int64_t total = 0;
        for (int64_t t = 0; t < search.blocks; ++t) {
            Cost* back = static_cast<Cost*>(search.back) + t * states;
            compress_block(search, t, block);
            if (block.n <= 32) {
                for (int j = 0; j <= n_s; ++j) expand<uint32_t>(block.columns[j], n_in, search.tables + j * count);
            }
            base = block.n <= transform_bits(n_in) ? by_transform(old, base, next, back)
                   : block.n <= 32           ? by_force32(old, base, next, back)
                                             : by_force_wide(old, base, next, back);
            total += base;
            Cost* swap = old;
            old = next;
            next = swap;
        }
        search.errors = total;
        int64_t state = 0;
        while (old[state] != base) ++state;
        for (int64_t t = search.blocks - 1; t >= 0; --t) {
            search.codes[t] = static_cast<uint16_t>(state & (count - 1));
            const int64_t oldest = static_cast<const Cost*>(search.back)[t * states + state];
            state = state >> n_in | oldest << (n_in * (n_s - 1));
        }
    }
};

template <class Cost, class Packed>
void search_segment(Search& search) {
    if (search.n_s == 0) {
        search_blocks(search);
    } else {
        Viterbi<Cost, Packed>(search).run();
    }
}

constexpr SearchSet kSearch = {search_segment<uint8_t, uint16_t>, search_segment<uint16_t, uint32_t>};

}  // namespace
#endif

}  // namespace hcx
