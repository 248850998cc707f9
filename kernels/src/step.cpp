// One token for every row: all blocks of a decoder from binary-coded weights, in one call.
#include <cstring>

#include "layout.h"
#include "memory.h"
#include "pool.h"
#include "step.h"

namespace hcx {
namespace {

// Fewer multiplications than this are done sooner by one thread than handed out.
constexpr int64_t kAttentionPerThread = 1 << 15;

const StepSet& steps_of(int isa) {
    int rung = hcx_best_isa();
    if (isa != HCX_ISA_BEST && isa < rung) rung = isa;
#if defined(__x86_64__)
#if defined(HCX_WITH_AVX512)
    if (rung == HCX_ISA_AVX512) return kStepAvx512;
#endif
#if defined(HCX_WITH_AVX2)
    if (rung >= HCX_ISA_AVX2) return kStepAvx2;
#endif
#endif
    (void)rung;
    return kStepPortable;
}

// Rows of all weights together, or -1 if one is not what it should be.
int64_t rows_of(const hcx_bcq_weight* weights, int32_t count, int64_t columns) {
    if (weights == nullptr || count < 1) return -1;
    int64_t rows = 0;
    for (int32_t i = 0; i < count; ++i) {
        hcx_bcq_shape shape;
        if (hcx_bcq_describe(weights[i].data, weights[i].bytes, &shape) != HCX_OK || shape.columns != columns) return -1;
        rows += shape.rows;
    }
    return rows;
}

int32_t check(const hcx_decoder& decoder, const hcx_cache& cache, const int64_t* positions, int64_t batch) {
    if (decoder.sublayers == nullptr || decoder.norm == nullptr || decoder.cosines == nullptr ||
        decoder.sines == nullptr || cache.keys == nullptr || cache.values == nullptr) {
        return HCX_NULL_POINTER;
    }
    const int64_t dim = decoder.head_dim, heads = decoder.heads, kv_heads = decoder.kv_heads;
    if (decoder.layers < 1 || decoder.hidden < 1 || decoder.intermediate < 1 || dim < 2 || dim % 2 != 0 || heads < 1 ||
        kv_heads < 1 || heads % kv_heads != 0 || batch < 1) {
        return HCX_BAD_SHAPE;
    }
    if (cache.places < 1 || cache.place_stride < kv_heads * dim || cache.row_stride < cache.places * cache.place_stride ||
        cache.layer_stride < batch * cache.row_stride) {
        return HCX_BAD_SHAPE;
    }
    for (int64_t row = 0; row < batch; ++row) {
        if (positions[row] < 0 || positions[row] >= cache.places || positions[row] >= decoder.positions) {
            return HCX_BAD_SHAPE;
        }
    }
    for (int64_t index = 0; index < 2 * decoder.layers; ++index) {
        const hcx_sublayer& sublayer = decoder.sublayers[index];
        if (sublayer.norm == nullptr) return HCX_NULL_POINTER;
        const bool attention = index % 2 == 0;
        const int64_t inner = attention ? (heads + 2 * kv_heads) * dim : 2 * decoder.intermediate;
        const int64_t outer = attention ? heads * dim : decoder.intermediate;
        if (rows_of(sublayer.inner, sublayer.inner_count, decoder.hidden) != inner ||
            rows_of(sublayer.outer, 1, outer) != decoder.hidden) {
            return HCX_BAD_SHAPE;
        }
    }
    return HCX_OK;
}

struct Step {
    const hcx_decoder& decoder;
    const hcx_cache& cache;
    const StepSet& set;
    const int64_t* positions;
    int64_t batch;
    float* hidden;
    int32_t method, isa, threads;
    float *normal, *wide, *narrow, *scores;
    int64_t score_stride;

    int64_t wide_stride() const {
        const int64_t fused = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim, inner = 2 * decoder.intermediate;
        return fused > inner ? fused : inner;
    }
    int64_t narrow_stride() const {
        const int64_t heads = decoder.heads * decoder.head_dim;
        return heads > decoder.intermediate ? heads : decoder.intermediate;
    }

    int32_t product(const hcx_bcq_weight* weights, int32_t count, const float* x, int64_t x_stride, float* y,
                    int64_t y_stride) const {
        return hcx_bcq_matmul(weights, count, x, x_stride, batch, y, y_stride, method, isa, threads);
    }

    // Rotates queries and keys, stores keys and values, and attends: `wide` -> `narrow`.
    void attention(int64_t layer) const {
        const int64_t dim = decoder.head_dim, heads = decoder.heads, kv_heads = decoder.kv_heads;
        const auto bytes = static_cast<size_t>(kv_heads * dim) * sizeof(float);
        int64_t work = 0;
        for (int64_t row = 0; row < batch; ++row) {
            float* fused = wide + row * wide_stride();
            const int64_t position = positions[row];
            const int64_t half = dim / 2;
            set.rotate(fused, heads + kv_heads, dim, decoder.cosines + position * half, decoder.sines + position * half);
            const int64_t place = layer * cache.layer_stride + row * cache.row_stride + position * cache.place_stride;
            std::memcpy(cache.keys + place, fused + heads * dim, bytes);
            std::memcpy(cache.values + place, fused + (heads + kv_heads) * dim, bytes);
            work += (position + 1) * heads * dim;
        }
        auto one = [&](int64_t item) {
            const int64_t row = item / heads, head = item % heads;
            const int64_t place = layer * cache.layer_stride + row * cache.row_stride + head / (heads / kv_heads) * dim;
            set.attend(wide + row * wide_stride() + head * dim, cache.keys + place, cache.values + place,
                       cache.place_stride, positions[row] + 1, dim, decoder.attention_scale, scores + item * score_stride,
                       narrow + row * narrow_stride() + head * dim);
        };
        const int64_t useful = work / kAttentionPerThread;
        parallel(static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads), batch * heads, one);
    }

    int32_t run() const {
        const int64_t size = decoder.hidden;
        for (int64_t index = 0; index < 2 * decoder.layers; ++index) {
            const hcx_sublayer& sublayer = decoder.sublayers[index];
            for (int64_t row = 0; row < batch; ++row) {
                set.rms_norm(hidden + row * size, sublayer.norm, decoder.eps, size, normal + row * size);
            }
            int32_t status = product(sublayer.inner, sublayer.inner_count, normal, size, wide, wide_stride());
            if (status != HCX_OK) return status;
            if (index % 2 == 0) {
                attention(index / 2);
            } else {
                for (int64_t row = 0; row < batch; ++row) {
                    const float* gate = wide + row * wide_stride();
                    set.swiglu(gate, gate + decoder.intermediate, decoder.intermediate, narrow + row * narrow_stride());
                }
            }
            status = product(sublayer.outer, 1, narrow, narrow_stride(), normal, size);
            if (status != HCX_OK) return status;
            for (int64_t row = 0; row < batch; ++row) {
                float* branch = normal + row * size;
                if (sublayer.post_norm != nullptr) set.rms_norm(branch, sublayer.post_norm, decoder.eps, size, branch);
                set.add(hidden + row * size, branch, decoder.residual_multiplier, size);
            }
        }
        for (int64_t row = 0; row < batch; ++row) {
            set.rms_norm(hidden + row * size, decoder.norm, decoder.eps, size, hidden + row * size);
        }
        return HCX_OK;
    }
};

}  // namespace
}  // namespace hcx

using namespace hcx;

extern "C" {

int32_t hcx_decode_step(const hcx_decoder* decoder, const hcx_cache* cache, const int64_t* positions, int64_t batch,
                        float* hidden, int32_t method, int32_t isa, int32_t threads) {
    if (decoder == nullptr || cache == nullptr || positions == nullptr || hidden == nullptr) return HCX_NULL_POINTER;
    if (isa < HCX_ISA_BEST || isa > HCX_ISA_AVX512) return HCX_BAD_ISA;
    const int32_t status = check(*decoder, *cache, positions, batch);
    if (status != HCX_OK) return status;
    Step step{*decoder, *cache, steps_of(isa), positions, batch, hidden, method, isa, threads,
              nullptr,  nullptr, nullptr, nullptr, 0};
    int64_t longest = 0;
    for (int64_t row = 0; row < batch; ++row) longest = positions[row] > longest ? positions[row] : longest;
    step.score_stride = ceil_div(longest + 1, 16) * 16;
    const int64_t normal = batch * decoder->hidden, wide = batch * step.wide_stride();
    const int64_t narrow = batch * step.narrow_stride(), scores = batch * decoder->heads * step.score_stride;
    const Block memory = block_of(4 * (normal + wide + narrow + scores));
    if (!memory) return HCX_NO_MEMORY;
    step.normal = static_cast<float*>(memory.get());
    step.wide = step.normal + normal;
    step.narrow = step.wide + wide;
    step.scores = step.narrow + narrow;
    return step.run();
}

}  // extern "C"
