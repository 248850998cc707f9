// Checks shared by the entry points.
#pragma once

#include <cstddef>

#include "layout.h"

namespace hcx {

// What follows from a shape; a status that names what is wrong with it.
int32_t make_plan(const hcx_bcq_shape& shape, Plan& plan);
// The same from the header of a packed weight, after checking header, alignment and size.
int32_t read_plan(const void* packed, int64_t bytes, Plan& plan);
int32_t check_canonical(const Plan& plan, const uint8_t* planes, int64_t planes_bytes, const void* scales,
                        int64_t scales_bytes, const float* offset, int64_t offset_bytes);

}  // namespace hcx
