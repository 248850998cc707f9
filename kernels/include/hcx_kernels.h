/* C ABI of the native kernels: products with binary-coded weights on a CPU, and their codes.
 *
 * Knows nothing of torch. Functions return a status, never throw, and check everything that they are given: pointers,
 * alignment, sizes, and the header of a packed weight. FORMAT.md specifies the canonical tensors; README.md the machine
 * layout that `hcx_bcq_pack` makes of them. Every function may be called from several threads at once.
 */
#ifndef HCX_KERNELS_H
#define HCX_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define HCX_API __attribute__((visibility("default")))
#else
#define HCX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature or a structure below changes. */
#define HCX_ABI_VERSION 1

typedef enum {
    HCX_OK = 0,
    HCX_NULL_POINTER = 1,
    HCX_MISALIGNED = 2,
    HCX_BAD_SHAPE = 3,
    HCX_BAD_BITS = 4,
    HCX_BAD_GROUP = 5,
    HCX_BAD_SCALE_DTYPE = 6,
    HCX_WRONG_SIZE = 7,
    HCX_BAD_HEADER = 8,
    HCX_DIFFERENT_INPUTS = 9,
    HCX_BAD_METHOD = 10,
    HCX_BAD_ISA = 11,
    HCX_NO_MEMORY = 12,
    HCX_BAD_STREAM = 13
} hcx_status;

typedef enum { HCX_FP16 = 0, HCX_BF16 = 1, HCX_FP32 = 2 } hcx_dtype;

/* Rungs of the ladder; each is forced down to what the CPU has, and no other changes a result of a method. */
typedef enum { HCX_ISA_BEST = 0, HCX_ISA_PORTABLE = 1, HCX_ISA_AVX2 = 2, HCX_ISA_AVX512 = 3 } hcx_isa;

typedef enum {
    HCX_FAST = 0,    /* the quicker of the next two at this batch, bit width and CPU */
    HCX_TABLES8 = 1, /* tables of 4 inputs, int8 entries, one scale per 128 inputs */
    HCX_CODES8 = 2,  /* weights decoded to uint8, activations int8 per 128 inputs, integer matrix product */
    HCX_TABLES15 = 3 /* tables of 4 inputs, 15-bit entries */
} hcx_method;

typedef struct {
    int64_t rows;        /* outputs */
    int64_t columns;     /* inputs, without padding */
    int64_t group;       /* inputs per scale: a multiple of 32, or at least `columns` */
    int32_t bits;        /* planes, 1 to 8 */
    int32_t scale_dtype; /* hcx_dtype */
    int32_t has_offset;
    int32_t reserved; /* 0 */
} hcx_bcq_shape;

typedef struct {
    const void* data; /* from hcx_bcq_pack; aligned to 64 bytes */
    int64_t bytes;
} hcx_bcq_weight;

HCX_API int32_t hcx_abi_version(void);
HCX_API const char* hcx_status_text(int32_t status);
/* The best rung of this CPU. */
HCX_API int32_t hcx_best_isa(void);
HCX_API const char* hcx_isa_text(int32_t isa);
/* The method that HCX_FAST takes. */
HCX_API int32_t hcx_fast_method(int32_t bits, int64_t batch, int32_t isa);

/* Asks the system for large pages under memory that was not touched yet: fewer address translations while streaming. */
HCX_API int32_t hcx_advise(void* data, int64_t bytes);

/* Bytes of a packed weight. */
HCX_API int32_t hcx_bcq_packed_bytes(const hcx_bcq_shape* shape, int64_t* bytes);
/* Canonical planes [bits, rows, ceil(columns / 8)], scales [bits, rows, groups], fp32 offset [rows, groups] or null ->
 * the machine layout. `out` is aligned to 64 bytes. */
HCX_API int32_t hcx_bcq_pack(const hcx_bcq_shape* shape, const uint8_t* planes, int64_t planes_bytes,
                             const void* scales, int64_t scales_bytes, const float* offset, int64_t offset_bytes,
                             void* out, int64_t out_bytes);
/* Writes other scales and offsets, of the dtype that it was packed with, into a packed weight. */
HCX_API int32_t hcx_bcq_set_scales(void* packed, int64_t packed_bytes, const void* scales, int64_t scales_bytes,
                                   const float* offset, int64_t offset_bytes);
/* Checks a packed weight and tells its shape. */
HCX_API int32_t hcx_bcq_describe(const void* packed, int64_t packed_bytes, hcx_bcq_shape* shape);
/* The dense weight [rows, columns] in fp32: planes from the first to the last, then the offset. */
HCX_API int32_t hcx_bcq_dequantize(const void* packed, int64_t packed_bytes, float* out, int64_t out_bytes,
                                   int32_t threads);

/* y[n, :] = x[n, :] W^T for weights that share one input: their outputs follow each other in a row of y.
 *
 * x is fp32 [batch, columns] with rows `x_stride` numbers apart, y fp32 [batch, sum of rows] with rows `y_stride`
 * apart; any alignment to 4 bytes. The weights have equal `columns` and `group`. A group with an input that is not
 * finite makes every output not a number. */
HCX_API int32_t hcx_bcq_matmul(const hcx_bcq_weight* weights, int32_t count, const float* x, int64_t x_stride,
                               int64_t batch, float* y, int64_t y_stride, int32_t method, int32_t isa, int32_t threads);

/* One residual branch: RMSNorm, products, a second RMSNorm if there is one. */
typedef struct {
    const float* norm;             /* [hidden] */
    const float* post_norm;        /* [hidden], or null */
    const hcx_bcq_weight* inner;   /* q, k, v; or gate, up: together (heads + 2 kv_heads) head_dim or 2 intermediate rows */
    const hcx_bcq_weight* outer;   /* o; or down: hidden rows */
    int32_t inner_count;
    int32_t reserved; /* 0 */
} hcx_sublayer;

/* A decoder whose linear layers are binary-coded: rotary grouped-query attention and SwiGLU in turns. */
typedef struct {
    int64_t layers, hidden, intermediate;
    int64_t heads, kv_heads, head_dim;
    const hcx_sublayer* sublayers; /* [2 layers] */
    const float* norm;             /* [hidden], after the last block */
    const float* cosines;          /* [positions, head_dim / 2] */
    const float* sines;
    int64_t positions;
    float eps, attention_scale, residual_multiplier;
    float reserved; /* 0 */
} hcx_decoder;

/* Keys and values in fp32; the heads of a place follow each other. Strides are in numbers. */
typedef struct {
    float* keys;
    float* values;
    int64_t layer_stride, row_stride, place_stride;
    int64_t places; /* of a row */
} hcx_cache;

/* One token for each of `batch` rows: hidden [batch, hidden] holds embeddings, and afterwards what the last norm gives.
 * Row i stands at positions[i]; its keys and values are stored there, and it sees all places up to there. */
HCX_API int32_t hcx_decode_step(const hcx_decoder* decoder, const hcx_cache* cache, const int64_t* positions,
                                int64_t batch, float* hidden, int32_t method, int32_t isa, int32_t threads);

/* BiQGEMM (Jeon et al. 2020) with keys of 8 inputs and fp32 tables, as published. Same arguments as above. */
HCX_API int32_t hcx_biqgemm_packed_bytes(const hcx_bcq_shape* shape, int64_t* bytes);
HCX_API int32_t hcx_biqgemm_pack(const hcx_bcq_shape* shape, const uint8_t* planes, int64_t planes_bytes,
                                 const void* scales, int64_t scales_bytes, const float* offset, int64_t offset_bytes,
                                 void* out, int64_t out_bytes);
HCX_API int32_t hcx_biqgemm_matmul(const void* packed, int64_t packed_bytes, const float* x, int64_t x_stride,
                                   int64_t batch, float* y, int64_t y_stride, int32_t threads);
/* All 256 signed sums of 8 inputs; entry k has +x[t] where bit t of k is set (paper, section 3.2). */
HCX_API int32_t hcx_biqgemm_table(const float* x, float* table);

/* Codes that XOR gates expand: y_t = M_0 x_t + M_1 x_(t-1) + ... + M_(n_s) x_(t-n_s) over GF(2), words before the
 * beginning of a segment zero (fixed-to-fixed, Park et al. 2022, section 3; FleXOR, Lee et al. 2020, is n_s = 0).
 * FORMAT.md specifies codes, network and corrections. */
typedef struct {
    int64_t bits;    /* of the decoded stream; the last block may be cut short */
    int64_t segment; /* blocks between resets of the registers; 0: no reset */
    int32_t n_in;    /* bits of a code word, 1 to 16 */
    int32_t n_out;   /* bits of a block, 1 to 256 */
    int32_t n_s;     /* registers, 0 to 3 */
    int32_t reserved; /* 0 */
} hcx_gf2_shape;

/* network: rows of M_0, M_1, ..., each row ceil(n_in / 8) bytes. codes: ceil(n_in * blocks / 8) bytes. out: ceil(bits / 8)
 * bytes, unused bits zero. */
HCX_API int32_t hcx_gf2_decode(const hcx_gf2_shape* shape, const uint8_t* network, int64_t network_bytes,
                               const uint8_t* codes, int64_t codes_bytes, uint8_t* out, int64_t out_bytes,
                               int32_t threads);
/* Flips the listed bits of a decoded stream. A list that is cut short, out of order or out of range is refused, and the
 * stream is then to be thrown away. */
HCX_API int32_t hcx_gf2_correct(const hcx_gf2_shape* shape, const uint8_t* corrections, int64_t corrections_bytes,
                                uint8_t* stream, int64_t stream_bytes);
/* The code words with the fewest wrong bits among those with mask 1: the exact optimum of every segment, and of equal
 * ones the one that a brute-force Viterbi search with smallest indices first finds. target, mask: ceil(bits / 8) bytes.
 * With registers n_in is at most 12, and n_in * n_s at most 16. */
HCX_API int32_t hcx_gf2_encode(const hcx_gf2_shape* shape, const uint8_t* network, int64_t network_bytes,
                               const uint8_t* target, const uint8_t* mask, int64_t stream_bytes, uint8_t* codes,
                               int64_t codes_bytes, int64_t* errors, int32_t isa, int32_t threads);
/* Bits [rows, 8 row_bytes] -> [8 row_bytes, 8 ceil(rows / 8)], padded with zeros. */
HCX_API int32_t hcx_bit_transpose(const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to, int64_t to_bytes);

/* Alternating binary codes (Xu et al. 2018, section 3) of groups [count, size], each by itself, from the greedy codes and
 * from 3 bits on from an even grid too; the better end is kept, with scales rounded to `scale_dtype` (hcx_dtype).
 * groups: finite. importance: null, or how much a squared error counts, above 0, [count, size]. patterns [count, size]:
 * bit i is plane i. scales [count, bits], falling. offsets [count]: zeros without one. */
HCX_API int32_t hcx_bcq_alternate(const float* groups, const float* importance, int64_t count, int64_t size,
                                  int32_t bits, int32_t rounds, int32_t has_offset, int32_t scale_dtype,
                                  uint8_t* patterns, float* scales, float* offsets, int32_t threads);

/* Columns start .. stop - 1 of a matrix whose codes are chosen one column after another; at most 64 of them. */
typedef struct {
    int64_t rows, columns;
    int64_t start, stop;
    int64_t group;         /* columns that share a grid */
    const float* scales;   /* [rows, groups, bits] */
    const float* offsets;  /* [rows, groups] */
    uint8_t* patterns;     /* [rows, columns]; bit i is plane i */
    int32_t bits;
    int32_t reserved; /* 0 */
} hcx_bcq_columns;

/* Error feedback (Frantar et al. 2023, section 3) within a block. current: [rows, columns] in the order of visits, of
 * which columns start .. stop - 1 are changed. order [columns]: where column i of it is stored. upper: the Cholesky
 * factor of the inverse Gram matrix in that order, [columns, columns]. errors [rows, stop - start]: what the caller
 * shares among the columns behind the block. Patterns of the visited columns are written. */
HCX_API int32_t hcx_bcq_feed_back(const hcx_bcq_columns* block, const int64_t* order, const float* upper, float* current,
                                  float* errors, int32_t threads);
/* Coordinate descent within a block: each weight takes the level nearest to what all others leave it. gram: [columns,
 * columns]. pull [rows, stop - start]: (W - W') gram of the block's columns; changed. deltas: by how much each weight
 * moved. The first `frozen` planes keep their bits. Patterns below 2^bits are read and written. */
HCX_API int32_t hcx_bcq_choose_codes(const hcx_bcq_columns* block, const float* gram, float* pull, float* deltas,
                                     int32_t frozen, int32_t threads);

/* Reads memory as fast as the CPU can: the floor that benchmarks compare with. */
HCX_API int32_t hcx_read(const void* data, int64_t bytes, int32_t threads, uint64_t* xor_of_words);

#ifdef __cplusplus
}
#endif
#endif
