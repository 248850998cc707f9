// The table kernel of LUT-GEMM (Park et al. 2024, section 3) for binary-coded weights, batches of 1 to 8.
//
// A block builds, for each 8 neighbouring inputs, the table of their 256 signed sums in shared memory; each byte of a plane then
// selects one entry. Against the published code: sums are fp32 in registers and leave through a workspace that is summed in a
// fixed order (no atomics, nothing to clear); tables are fp32 and exactly antisymmetric; tails in both dimensions; any group that
// is a multiple of 32; 1 to 8 planes; scales of any sign; the offset stays fp32.
//
// Compile-time: HCX_BITS (planes), HCX_COLUMNS (batch), HCX_WORDS (32-input words a step, all of one group: 1 or 2), HCX_GROUP
// (inputs of a group), HCX_SCALE and HCX_INPUT (0 fp16, 1 bf16, 2 fp32). No header is needed, so nvcc and NVRTC both take it.
//
// Memory, each array contiguous:
//   x      [columns, inputs] of HCX_INPUT, rows `x_stride` apart
//   words  uint32 [steps * HCX_WORDS, HCX_BITS, rows]; bit t of word w is input 32 w + t; 1 means +1
//   scales [groups, HCX_BITS, rows] of HCX_SCALE
//   offset fp32 [groups, rows] or null
//   out    fp32 [splits, columns, rows]
// Grid (ceil(rows / 1024), splits); block 256.

#define THREADS 256
#define ROWS_PER_THREAD 4
#define TABLES (4 * HCX_WORDS)
#define TEAM (THREADS / TABLES)

typedef unsigned int u32;
typedef unsigned short u16;

static __device__ __forceinline__ float from_half(u16 bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return hcx_host_from_half(bits);
#endif
}

static __device__ __forceinline__ float from_bfloat(u16 bits) {
    union {
        u32 integer;
        float value;
    } both;
    both.integer = (u32)bits << 16;
    return both.value;
}

template <int KIND> struct Number;
template <> struct Number<0> {
    typedef u16 Stored;
    static __device__ __forceinline__ float read(const u16* at) { return from_half(*at); }
};
template <> struct Number<1> {
    typedef u16 Stored;
    static __device__ __forceinline__ float read(const u16* at) { return from_bfloat(*at); }
};
template <> struct Number<2> {
    typedef float Stored;
    static __device__ __forceinline__ float read(const float* at) { return *at; }
};

// The signed sum that entry `key` names: bit t set means +x_t.
static __device__ __forceinline__ float signed_sum(const float* x, int key) {
    float total = (key & 1) ? x[0] : -x[0];
#pragma unroll
    for (int t = 1; t < 8; ++t) total += (key >> t & 1) ? x[t] : -x[t];
    return total;
}

// One team builds one table: entries below TEAM directly, then each doubling adds 2 x_t to entries that the same thread wrote,
// so no barrier is needed inside. The upper half is the lower one negated: T[255 - k] = -T[k] bit for bit.
static __device__ __forceinline__ void build_table(float* table, const float* x, int member) {
    table[member] = signed_sum(x, member);
    for (int half = TEAM; half < 128; half *= 2) {
        int bit = 0;
        while ((1 << bit) < half) ++bit;
        const float step = 2.0f * x[bit];
        for (int k = member; k < half; k += TEAM) table[half + k] = table[k] + step;
    }
    for (int k = member; k < 128; k += TEAM) table[255 - k] = -table[k];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    hcx_lut_gemm(const Number<HCX_INPUT>::Stored* x, const u32* words, const Number<HCX_SCALE>::Stored* scales,
                 const float* offset, float* out, int rows, int inputs, int x_stride, int steps, int steps_per_split) {
    __shared__ float tables[HCX_COLUMNS][TABLES][256];
    __shared__ float staged[HCX_COLUMNS][TABLES][8];
    const int first_row = blockIdx.x * (THREADS * ROWS_PER_THREAD) + threadIdx.x;
    const int table = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
    float total[ROWS_PER_THREAD][HCX_COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS_PER_THREAD; ++r)
#pragma unroll
        for (int c = 0; c < HCX_COLUMNS; ++c) total[r][c] = 0.0f;

    const int begin = blockIdx.y * steps_per_split;
    const int end = begin + steps_per_split < steps ? begin + steps_per_split : steps;
    for (int step = begin; step < end; ++step) {
        const int first_input = step * (32 * HCX_WORDS);
        for (int i = threadIdx.x; i < HCX_COLUMNS * TABLES * 8; i += THREADS) {
            const int column = i / (TABLES * 8), input = first_input + i % (TABLES * 8);
            (&staged[0][0][0])[i] =
                input < inputs ? Number<HCX_INPUT>::read(x + (long long)column * x_stride + input) : 0.0f;
        }
        __syncthreads();  // also: nobody still reads the tables of the step before
#pragma unroll
        for (int c = 0; c < HCX_COLUMNS; ++c) build_table(tables[c][table], staged[c][table], member);
        __syncthreads();

        const int group = first_input / HCX_GROUP;
#pragma unroll
        for (int r = 0; r < ROWS_PER_THREAD; ++r) {
            const int row = first_row + r * THREADS;
            if (row >= rows) continue;
#pragma unroll
            for (int plane = 0; plane < HCX_BITS; ++plane) {
                const float scale = Number<HCX_SCALE>::read(scales + ((long long)group * HCX_BITS + plane) * rows + row);
                float sums[HCX_COLUMNS];
#pragma unroll
                for (int c = 0; c < HCX_COLUMNS; ++c) sums[c] = 0.0f;
#pragma unroll
                for (int w = 0; w < HCX_WORDS; ++w) {
                    const u32 word = words[((long long)(step * HCX_WORDS + w) * HCX_BITS + plane) * rows + row];
#pragma unroll
                    for (int byte = 0; byte < 4; ++byte) {
                        const u32 key = word >> (8 * byte) & 255u;
#pragma unroll
                        for (int c = 0; c < HCX_COLUMNS; ++c) sums[c] += tables[c][4 * w + byte][key];
                    }
                }
#pragma unroll
                for (int c = 0; c < HCX_COLUMNS; ++c) total[r][c] += scale * sums[c];
            }
            if (offset) {
                const float value = offset[(long long)group * rows + row];
#pragma unroll
                for (int c = 0; c < HCX_COLUMNS; ++c) {
                    float sum = 0.0f;
#pragma unroll
                    for (int t = 0; t < TABLES; ++t) sum += tables[c][t][255];
                    total[r][c] += value * sum;
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS_PER_THREAD; ++r) {
        const int row = first_row + r * THREADS;
        if (row >= rows) continue;
#pragma unroll
        for (int c = 0; c < HCX_COLUMNS; ++c)
            out[((long long)blockIdx.y * HCX_COLUMNS + c) * rows + row] = total[r][c];
    }
}
