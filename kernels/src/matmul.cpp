// The product: prepares the batch once for all weights that share it, then walks the blocks.
#include <cstdlib>
#include <cstring>
#include <new>

#include "pack.h"
#include "pool.h"

namespace hcx {
namespace {

constexpr int kMaxWeights = 16;
constexpr int kTableColumns = 16;   // of one pass: their tables stay in the second cache
constexpr int kCodeColumns = 128;   // their sums stay there
constexpr int64_t kBytesPerThread = 48 << 10;  // less work than this is not worth a second thread

int best_isa() {
#if defined(HCX_WITH_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni")) {
        return HCX_ISA_AVX512;
    }
#endif
#if defined(HCX_WITH_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return HCX_ISA_AVX2;
    }
#endif
    return HCX_ISA_PORTABLE;
}

const KernelSet& kernels_of(int isa) {
#if defined(HCX_WITH_AVX512)
    if (isa == HCX_ISA_AVX512) return kAvx512;
#endif
#if defined(HCX_WITH_AVX2)
    if (isa == HCX_ISA_AVX2) return kAvx2;
#endif
    return kPortable;
}

int resolve_isa(int isa) {
    static const int best = best_isa();
    return isa == HCX_ISA_BEST || isa > best ? best : isa;
}

// Memory that a calling thread keeps from call to call.
class Workspace {
   public:
    ~Workspace() { std::free(data_); }

    uint8_t* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = ceil_div(bytes + bytes / 4, kAlignment) * kAlignment;
            data_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, static_cast<size_t>(size_)));
            if (data_ == nullptr) size_ = 0;
        }
        return data_;
    }

   private:
    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

struct Part {
    Plan plan;
    const void* data;
    int64_t first_block, first_row;
};

struct Product {
    Part parts[kMaxWeights];
    int count = 0;
    int64_t blocks = 0, bytes = 0;
};

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

int32_t run(const Product& product, const Kernel& kernel, int64_t line_bytes, int max_columns, const float* x,
            int64_t x_stride, int64_t batch, float* y, int64_t y_stride, int threads) {
    thread_local Workspace workspace;
    const Plan& plan = product.parts[0].plan;
    const int columns = static_cast<int>(batch < max_columns ? batch : max_columns);
    const int64_t padded = plan.columns % kLineInputs == 0 ? 0 : aligned(plan.lines * kLineInputs * 4);
    Activations a;
    // Columns a power of two apart would share the sets of the first cache: each begins a segment and a line further.
    a.table_stride = aligned(plan.lines * line_bytes) + kSegmentLines * line_bytes + kAlignment;
    a.segment_stride = aligned(plan.segments * 4) / 4;
    a.group_stride = aligned(plan.groups * 4) / 4;
    uint8_t* at = workspace.reserve(columns * (a.table_stride + 8 * a.segment_stride + 4 * a.group_stride + padded));
    if (at == nullptr) return HCX_NO_MEMORY;
    uint8_t* const tables = at;
    at += columns * a.table_stride;
    auto* const segment_scale = reinterpret_cast<float*>(at);
    at += columns * 4 * a.segment_stride;
    auto* const segment_sum = reinterpret_cast<float*>(at);
    at += columns * 4 * a.segment_stride;
    auto* const group_sum = reinterpret_cast<float*>(at);
    at += columns * 4 * a.group_stride;
    uint8_t* const copies = at;
    a.tables = tables;
    a.segment_scale = segment_scale;
    a.segment_sum = segment_sum;
    a.group_sum = group_sum;

    for (int64_t begin = 0; begin < batch; begin += columns) {
        const int width = static_cast<int>(batch - begin < columns ? batch - begin : columns);
        const int64_t useful = product.bytes * (3 + width) / 4 / kBytesPerThread;
        const int used = static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
        auto prepare = [&](int64_t c) {
            const float* column = x + (begin + c) * x_stride;
            if (padded != 0) {
                auto* copy = reinterpret_cast<float*>(copies + c * padded);
                std::memcpy(copy, column, static_cast<size_t>(plan.columns) * 4);
                std::memset(copy + plan.columns, 0, static_cast<size_t>(plan.lines * kLineInputs - plan.columns) * 4);
                column = copy;
            }
            kernel.prepare(plan, column, tables + c * a.table_stride, segment_scale + c * a.segment_stride,
                           group_sum + c * a.group_stride, segment_sum + c * a.segment_stride);
        };
        parallel(width >= 4 ? used : 1, width, prepare);
        auto multiply = [&](int64_t item) {
            alignas(64) float out[kCodeColumns * kBlockRows];
            int p = product.count - 1;
            while (product.parts[p].first_block > item) --p;
            const Part& part = product.parts[p];
            const int64_t block = item - part.first_block;
            const int tiles = tiles_of_block(part.plan, block);
            kernel.block(part.plan, block_at(part.plan, part.data, block), tiles, a, 0, width, out);
            const int64_t left = part.plan.rows - block * kBlockRows;
            const auto bytes = static_cast<size_t>(left < kBlockRows ? left : kBlockRows) * 4;
            float* to = y + begin * y_stride + part.first_row + block * kBlockRows;
            for (int c = 0; c < width; ++c) std::memcpy(to + c * y_stride, out + c * kBlockRows, bytes);
        };
        parallel(used, product.blocks, multiply);
    }
    return HCX_OK;
}

}  // namespace
}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_abi_version(void) { return HCX_ABI_VERSION; }

int32_t hcx_best_isa(void) { return resolve_isa(HCX_ISA_BEST); }

const char* hcx_isa_text(int32_t isa) {
    switch (isa) {
        case HCX_ISA_PORTABLE: return "portable";
        case HCX_ISA_AVX2: return "AVX2";
        case HCX_ISA_AVX512: return "AVX-512 VBMI and VNNI";
        default: return "unknown";
    }
}

const char* hcx_status_text(int32_t status) {
    switch (status) {
        case HCX_OK: return "done";
        case HCX_NULL_POINTER: return "a pointer is null";
        case HCX_MISALIGNED: return "a pointer is misaligned: packed weights need 64 bytes, numbers 4";
        case HCX_BAD_SHAPE: return "rows, columns, batch, strides or the number of weights are out of range";
        case HCX_BAD_BITS: return "1 to 8 planes are allowed";
        case HCX_BAD_GROUP: return "groups must be a multiple of 32, or as wide as the matrix";
        case HCX_BAD_SCALE_DTYPE: return "scales must be fp16, bf16 or fp32";
        case HCX_WRONG_SIZE: return "a buffer has the wrong size";
        case HCX_BAD_HEADER: return "the header of the packed weight is damaged";
        case HCX_DIFFERENT_INPUTS: return "weights that share an input must agree on columns and group";
        case HCX_BAD_METHOD: return "no such method";
        case HCX_BAD_ISA: return "no such instruction set";
        case HCX_NO_MEMORY: return "out of memory";
        case HCX_BAD_STREAM: return "the encoded stream is damaged or cut short";
        default: return "unknown status";
    }
}

// Measured: a column costs the tables time per plane, the codes the same for any number of planes after a decoding.
int32_t hcx_fast_method(int32_t bits, int64_t batch, int32_t isa) {
    if (resolve_isa(isa) != HCX_ISA_AVX512) return HCX_TABLES8;
    constexpr int64_t kNever = INT64_MAX;
    constexpr int64_t kFrom[kMaxBits + 1] = {kNever, 24, 8, 8, 6, 6, 6, 5, 5};
    return bits >= 1 && bits <= kMaxBits && batch >= kFrom[bits] ? HCX_CODES8 : HCX_TABLES8;
}

int32_t hcx_bcq_matmul(const hcx_bcq_weight* weights, int32_t count, const float* x, int64_t x_stride, int64_t batch,
                       float* y, int64_t y_stride, int32_t method, int32_t isa, int32_t threads) {
    if (weights == nullptr || (batch > 0 && (x == nullptr || y == nullptr))) return HCX_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(x) % 4 != 0 || reinterpret_cast<uintptr_t>(y) % 4 != 0) return HCX_MISALIGNED;
    if (count < 1 || count > kMaxWeights || batch < 0) return HCX_BAD_SHAPE;
    if (method < HCX_FAST || method > HCX_TABLES15) return HCX_BAD_METHOD;
    if (isa < HCX_ISA_BEST || isa > HCX_ISA_AVX512) return HCX_BAD_ISA;
    const int rung = resolve_isa(isa);
    Product products[HCX_TABLES15 + 1];
    int64_t rows = 0;
    Plan first{};
    for (int i = 0; i < count; ++i) {
        Plan plan;
        const int32_t status = read_plan(weights[i].data, weights[i].bytes, plan);
        if (status != HCX_OK) return status;
        if (i == 0) first = plan;
        if (plan.columns != first.columns || plan.lines_per_group != first.lines_per_group) return HCX_DIFFERENT_INPUTS;
        Product& product = products[method == HCX_FAST ? hcx_fast_method(plan.bits, batch, rung) : method];
        product.parts[product.count++] = {plan, weights[i].data, product.blocks, rows};
        product.blocks += plan.blocks;
        product.bytes += weights[i].bytes;
        rows += plan.rows;
    }
    if (x_stride < first.columns || y_stride < rows) return HCX_BAD_SHAPE;
    const KernelSet& set = kernels_of(rung);
    struct {
        const Kernel &native, &portable;
        int64_t line_bytes;
        int columns;
    } const choices[] = {{set.tables8, kPortable.tables8, kTable8Bytes, kTableColumns},
                         {set.codes8, kPortable.codes8, kLineInputs, kCodeColumns},
                         {set.tables15, kPortable.tables15, kTable15Bytes, kTableColumns}};
    for (int m = HCX_TABLES8; m <= HCX_TABLES15; ++m) {
        const auto& choice = choices[m - HCX_TABLES8];
        if (products[m].count == 0 || batch == 0) continue;
        const Kernel& kernel = choice.native.block != nullptr ? choice.native : choice.portable;
        const int32_t status = run(products[m], kernel, choice.line_bytes, choice.columns, x, x_stride, batch, y,
                                   y_stride, threads < 1 ? 1 : threads);
        if (status != HCX_OK) return status;
    }
    return HCX_OK;
}
}
