// Memory that is freed with its owner, and null where there is none: no exceptions cross the C interface.
#pragma once

#include <cstdlib>
#include <memory>

#include "layout.h"

namespace hcx {

struct Release {
    void operator()(void* memory) const { std::free(memory); }
};
using Block = std::unique_ptr<void, Release>;

inline Block block_of(int64_t bytes) {
    return Block(std::aligned_alloc(kAlignment, static_cast<size_t>(ceil_div(bytes + 1, kAlignment) * kAlignment)));
}

}  // namespace hcx
