// What every instruction set does to a column of the batch before it meets the weights; the arithmetic is in `Ops`.
//
// Every step names its order of summation, so that all instruction sets give the same bits.
#pragma once

#include <cfloat>
#include <cstring>

#include "layout.h"

namespace {

// Ops has static functions on `inputs` numbers, a multiple of 32:
//   float sum(x, inputs)            lane i adds x[16 m + i] for m = 0, 1, ...; lanes are then added by halves
//   float largest_table(x, inputs)  max over tables of (|x0| + |x1|) + (|x2| + |x3|)
//   void tables8(x, inputs, inverse, out), tables15(...)
//   float largest(x, inputs)        max |x|
//   float codes8(x, inputs, inverse, out)  rounds to int8, returns the sum of what it wrote
template <class Ops, int kLimit, int kOutBytesPerLine, class Largest, class Fill>
void prepare_groups(const hcx::Plan& plan, const float* x, uint8_t* out, float* segment_scale, float* group_sum,
                    Largest largest, Fill fill) {
    int64_t line = 0, segment = 0;
    for (int64_t group = 0; group < plan.groups; ++group) {
        const int64_t end = line + hcx::lines_of_group(plan, group);
        const float sum = Ops::sum(x + line * hcx::kLineInputs, (end - line) * hcx::kLineInputs);
        group_sum[group] = sum;
        for (; line < end; ++segment) {
            const int64_t lines = end - line < hcx::kSegmentLines ? end - line : hcx::kSegmentLines;
            const float* at = x + line * hcx::kLineInputs;
            const float most = largest(at, lines * hcx::kLineInputs);
            float inverse = 0.0F;
            if (!(sum - sum == 0.0F) || !(most <= FLT_MAX)) {
                segment_scale[segment] = __builtin_nanf("");
                std::memset(out + line * kOutBytesPerLine, 0, static_cast<size_t>(lines * kOutBytesPerLine));
                fill(nullptr, lines * hcx::kLineInputs, inverse, out + line * kOutBytesPerLine, segment);
            } else {
                segment_scale[segment] = most > hcx::kTiny ? most / kLimit : 0.0F;
                inverse = most > hcx::kTiny ? kLimit / most : 0.0F;
                fill(at, lines * hcx::kLineInputs, inverse, out + line * kOutBytesPerLine, segment);
            }
            line += lines;
        }
    }
}

template <class Ops>
void prepare_tables8(const hcx::Plan& plan, const float* x, uint8_t* tables, float* segment_scale, float* group_sum,
                     float* /*segment_sum*/) {
    prepare_groups<Ops, 127, hcx::kTable8Bytes>(
        plan, x, tables, segment_scale, group_sum, Ops::largest_table,
        [](const float* at, int64_t inputs, float inverse, uint8_t* out, int64_t) {
            if (at != nullptr) Ops::tables8(at, inputs, inverse, reinterpret_cast<int8_t*>(out));
        });
}

template <class Ops>
void prepare_tables15(const hcx::Plan& plan, const float* x, uint8_t* tables, float* segment_scale, float* group_sum,
                      float* /*segment_sum*/) {
    prepare_groups<Ops, 16383, hcx::kTable15Bytes>(
        plan, x, tables, segment_scale, group_sum, Ops::largest_table,
        [](const float* at, int64_t inputs, float inverse, uint8_t* out, int64_t) {
            if (at != nullptr) Ops::tables15(at, inputs, inverse, reinterpret_cast<int8_t*>(out));
        });
}

template <class Ops>
void prepare_codes8(const hcx::Plan& plan, const float* x, uint8_t* codes, float* segment_scale, float* group_sum,
                    float* segment_sum) {
    prepare_groups<Ops, 127, hcx::kLineInputs>(
        plan, x, codes, segment_scale, group_sum, Ops::largest,
        [segment_sum](const float* at, int64_t inputs, float inverse, uint8_t* out, int64_t segment) {
            segment_sum[segment] =
                at == nullptr ? 0.0F : Ops::codes8(at, inputs, inverse, reinterpret_cast<int8_t*>(out));
        });
}

}  // namespace
