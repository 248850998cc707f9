// What a decoding step does between its products: norms, rotations, attention to cached keys, SwiGLU.
//
// Sums run over 16 lanes and then over the lanes in halves, whatever the registers are: every instruction set gives the
// same bits. Included by one file per instruction set, which defines HCX_STEP_BODY first.
#pragma once

#include <cstdint>
#include <cstring>

namespace hcx {

struct StepSet {
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* y);
    // Rotates `heads` vectors of `dim` numbers in place; tables of dim / 2 (rotate-half layout).
    void (*rotate)(float* x, int64_t heads, int64_t dim, const float* cosines, const float* sines);
    // One query against `count` keys that are `stride` numbers apart; `scores` has room for `count` rounded up to 16.
    void (*attend)(const float* query, const float* keys, const float* values, int64_t stride, int64_t count,
                   int64_t dim, float scale, float* scores, float* out);
    // silu(gate) * up
    void (*swiglu)(const float* gate, const float* up, int64_t size, float* y);
    // x += factor * y
    void (*add)(float* x, const float* y, float factor, int64_t size);
};
extern const StepSet kStepPortable;
extern const StepSet kStepAvx2;
extern const StepSet kStepAvx512;

#ifdef HCX_STEP_BODY
namespace {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

// Macros, not functions: a vector wider than the registers has no calling convention.
#define HCX_LOAD(to, from) std::memcpy(&(to), (from), sizeof(Lanes))
#define HCX_STORE(to, from) std::memcpy((to), &(from), sizeof(Lanes))

float sum_of(const float* lanes) {
    float sums[kLanes];
    std::memcpy(sums, lanes, sizeof(sums));
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

// The first `count` numbers, then zeros.
void load_part(const float* from, int64_t count, float* to) {
    for (int i = 0; i < kLanes; ++i) to[i] = i < count ? from[i] : 0.0F;
}

float dot(const float* a, const float* b, int64_t size) {
    Lanes sum = {}, left, right;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        HCX_LOAD(left, a + i);
        HCX_LOAD(right, b + i);
        sum += left * right;
    }
    if (i < size) {
        float first[kLanes], second[kLanes];
        load_part(a + i, size - i, first);
        load_part(b + i, size - i, second);
        HCX_LOAD(left, first);
        HCX_LOAD(right, second);
        sum += left * right;
    }
    float lanes[kLanes];
    HCX_STORE(lanes, sum);
    return sum_of(lanes);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
    const float inverse = 1.0F / __builtin_sqrtf(dot(x, x, size) / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; ++i) y[i] = x[i] * inverse * weight[i];
}

void rotate(float* x, int64_t heads, int64_t dim, const float* cosines, const float* sines) {
    const int64_t half = dim / 2;
    for (int64_t head = 0; head < heads; ++head, x += dim) {
        for (int64_t i = 0; i < half; ++i) {
            const float first = x[i], second = x[i + half];
            x[i] = first * cosines[i] - second * sines[i];
            x[i + half] = second * cosines[i] + first * sines[i];
        }
    }
}

// e^x of 16 numbers: 2^n times a polynomial on +-ln(2)/2 (Cephes' coefficients, relative error about 2e-7). Numbers
// below -87 give the smallest normal ones.
void exponentials(const float* from, float* to) {
    Lanes x;
    HCX_LOAD(x, from);
    for (int i = 0; i < kLanes; ++i) x[i] = x[i] < -87.0F ? -87.0F : x[i] > 88.0F ? 88.0F : x[i];
    const Lanes shift = x * 1.44269504F + 12582912.0F;  // the sum's last bits are the nearest integer
    const Lanes n = shift - 12582912.0F;
    const Lanes r = x - n * 0.693359375F - n * -2.12194440e-4F;
    Lanes p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * r * r + r + 1.0F;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Lanes factor;
    std::memcpy(&factor, &power, sizeof(factor));
    p *= factor;
    HCX_STORE(to, p);
}

void attend(const float* query, const float* keys, const float* values, int64_t stride, int64_t count, int64_t dim,
            float scale, float* scores, float* out) {
    float largest = -__builtin_inff();
    for (int64_t t = 0; t < count; ++t) {
        scores[t] = scale * dot(query, keys + t * stride, dim);
        largest = scores[t] > largest ? scores[t] : largest;
    }
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = 0; t < count; ++t) scores[t] -= largest;
    for (int64_t t = count; t < padded; ++t) scores[t] = 0;
    Lanes total = {}, part;
    for (int64_t t = 0; t < padded; t += kLanes) {
        exponentials(scores + t, scores + t);
        for (int64_t i = count > t ? count - t : 0; i < kLanes; ++i) scores[t + i] = 0;
        HCX_LOAD(part, scores + t);
        total += part;
    }
    float lanes[kLanes];
    HCX_STORE(lanes, total);
    const float inverse = 1.0F / sum_of(lanes);
    int64_t i = 0;
    for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
        Lanes a = {}, b = {}, c = {}, d = {}, v;
        for (int64_t t = 0; t < count; ++t) {
            const float* value = values + t * stride + i;
            HCX_LOAD(v, value);
            a += v * scores[t];
            HCX_LOAD(v, value + kLanes);
            b += v * scores[t];
            HCX_LOAD(v, value + 2 * kLanes);
            c += v * scores[t];
            HCX_LOAD(v, value + 3 * kLanes);
            d += v * scores[t];
        }
        a *= inverse;
        b *= inverse;
        c *= inverse;
        d *= inverse;
        HCX_STORE(out + i, a);
        HCX_STORE(out + i + kLanes, b);
        HCX_STORE(out + i + 2 * kLanes, c);
        HCX_STORE(out + i + 3 * kLanes, d);
    }
    for (; i < dim; ++i) {
        float sum = 0;
        for (int64_t t = 0; t < count; ++t) sum += values[t * stride + i] * scores[t];
        out[i] = sum * inverse;
    }
}

void swiglu(const float* gate, const float* up, int64_t size, float* y) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t left = size - i < kLanes ? size - i : kLanes;
        float e[kLanes];
        for (int j = 0; j < kLanes; ++j) e[j] = j < left ? -gate[i + j] : 0.0F;
        exponentials(e, e);
        for (int64_t j = 0; j < left; ++j) y[i + j] = gate[i + j] / (1.0F + e[j]) * up[i + j];
    }
}

void add(float* x, const float* y, float factor, int64_t size) {
    for (int64_t i = 0; i < size; ++i) x[i] += factor * y[i];
}

constexpr StepSet kStep = {rms_norm, rotate, attend, swiglu, add};

}  // namespace
#endif

}  // namespace hcx
