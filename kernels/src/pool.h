// Threads that share the items of one job. Results never depend on their number or on who computed what.
#pragma once

#include <cstdint>

#include "hcx_kernels.h"

namespace hcx {

using ItemFunction = void (*)(void* context, int64_t item);

// Runs `function` on items 0 .. items - 1 with up to `threads` threads, this one among them, and returns when all are
// done. While another caller uses the pool, this one works alone.
void run_parallel(int threads, int64_t items, ItemFunction function, void* context);

template <class Body>
int32_t parallel(int threads, int64_t items, Body& body) {
    run_parallel(
        threads, items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
    return HCX_OK;
}

}  // namespace hcx
