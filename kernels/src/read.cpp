// Memory: large pages, and reading and nothing else, the floor under every kernel that streams weights.
#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "layout.h"
#include "pool.h"

namespace {

constexpr int64_t kPiece = 64 << 10;

#if defined(__x86_64__) && defined(HCX_WITH_AVX512)
__attribute__((target("avx512f"))) uint64_t read_wide(const uint8_t* at, int64_t bytes) {
    typedef long long Vector __attribute__((vector_size(64), aligned(1)));
    Vector sum[4] = {};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int v = 0; v < 4; ++v) __builtin_prefetch(at + i + hcx::kPrefetchBytes + 64 * v, 0, 3);
        for (int v = 0; v < 4; ++v) sum[v] ^= *reinterpret_cast<const Vector*>(at + i + 64 * v);
    }
    sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
    uint64_t total = 0;
    for (int i = 0; i < 8; ++i) total ^= static_cast<uint64_t>(sum[0][i]);
    for (int64_t i = bytes / 256 * 256; i + 8 <= bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, at + i, 8);
        total ^= word;
    }
    return total;
}
#endif

uint64_t read_words(const uint8_t* at, int64_t bytes) {
    uint64_t sum[4] = {};
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32) {
        for (int v = 0; v < 4; ++v) {
            uint64_t word;
            std::memcpy(&word, at + i + 8 * v, 8);
            sum[v] ^= word;
        }
    }
    for (; i + 8 <= bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, at + i, 8);
        sum[0] ^= word;
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

}  // namespace

extern "C" int32_t hcx_advise(void* data, int64_t bytes) {
    if (data == nullptr) return HCX_NULL_POINTER;
    if (bytes < 0) return HCX_WRONG_SIZE;
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    // A hint: where it is refused, small pages serve.
    if (end > begin) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#endif
    return HCX_OK;
}

extern "C" int32_t hcx_read(const void* data, int64_t bytes, int32_t threads, uint64_t* xor_of_words) {
    if (data == nullptr || xor_of_words == nullptr) return HCX_NULL_POINTER;
    if (bytes < 0) return HCX_WRONG_SIZE;
    std::atomic<uint64_t> total{0};
    auto read = [&](int64_t item) {
        const auto* at = static_cast<const uint8_t*>(data) + item * kPiece;
        const int64_t left = bytes - item * kPiece, count = left < kPiece ? left : kPiece;
#if defined(__x86_64__) && defined(HCX_WITH_AVX512)
        if (hcx_best_isa() == HCX_ISA_AVX512) {
            total ^= read_wide(at, count);
            return;
        }
#endif
        total ^= read_words(at, count);
    };
    hcx::parallel(threads < 1 ? 1 : threads, hcx::ceil_div(bytes, kPiece), read);
    *xor_of_words = total;
    return HCX_OK;
}
