// Runs a CUDA kernel on the host, one block at a time: each thread is a fibre that runs to its next barrier.
// The order in which threads run is a parameter: a result that depends on it is a race.
#pragma once
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(n)

struct HcxIndex {
    int x = 0, y = 0, z = 0;
};
static HcxIndex threadIdx, blockIdx;

static float hcx_host_from_half(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return (float)value;
}

static ucontext_t hcx_scheduler;
static std::vector<ucontext_t> hcx_fibres;
static int hcx_current;
static std::function<void()> hcx_body;
static std::vector<char> hcx_done;

static void __syncthreads() { swapcontext(&hcx_fibres[hcx_current], &hcx_scheduler); }

static void hcx_fibre() {
    hcx_body();
    hcx_done[hcx_current] = 1;
}

// Returns 1 if some threads of a block ended while others waited at a barrier.
static int hcx_run(int grid_x, int grid_y, int threads, int backwards, std::function<void()> body) {
    hcx_body = body;
    std::vector<std::vector<char>> stacks(threads, std::vector<char>(1 << 16));
    hcx_fibres.resize(threads);
    for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; ++x) {
            blockIdx.x = x;
            blockIdx.y = y;
            hcx_done.assign(threads, 0);
            for (int t = 0; t < threads; ++t) {
                getcontext(&hcx_fibres[t]);
                hcx_fibres[t].uc_stack.ss_sp = stacks[t].data();
                hcx_fibres[t].uc_stack.ss_size = stacks[t].size();
                hcx_fibres[t].uc_link = &hcx_scheduler;
                makecontext(&hcx_fibres[t], hcx_fibre, 0);
            }
            for (int ended = 0; ended < threads;) {
                for (int i = 0; i < threads; ++i) {
                    hcx_current = backwards ? threads - 1 - i : i;
                    threadIdx.x = hcx_current;
                    swapcontext(&hcx_scheduler, &hcx_fibres[hcx_current]);
                }
                ended = 0;
                for (char done : hcx_done) ended += done;
                if (ended != 0 && ended != threads) return 1;
            }
        }
    return 0;
}
