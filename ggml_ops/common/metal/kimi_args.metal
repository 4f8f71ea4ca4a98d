// Constants and arguments of our Metal kernels, for the kernels and for the code that starts them. A library that is
// compiled from embedded sources has no files to include: CMakeLists.txt puts this one in front of each kernel file.

#ifndef GGML_METAL_KIMI_ARGS
#define GGML_METAL_KIMI_ARGS

// Function constants; ggml-metal-impl.h has those of upstream's kernels.
#define FC_FLASH_ATTN_EXT_LATENT 550
#define FC_KDA                   2200
#define FC_FUSE                  2300

#define OP_FLASH_ATTN_EXT_LATENT_NR  32  // (query, head) pairs per threadgroup
#define OP_FLASH_ATTN_EXT_LATENT_NSG 16  // simdgroups per threadgroup
#define OP_KDA_CONV_NSG              4   // heads of q, k or v per threadgroup
#define OP_KDA_CONV_NT               16  // tokens per simdgroup
#define OP_KDA_SCAN_NL               8   // lanes per value channel
#define OP_KDA_SCAN_NT 8  // tokens in threadgroup memory; with NL: one float4 of q, k, v or the gates per thread

typedef struct {
    int32_t  ne01;
    int32_t  ne02;
    int32_t  ne03;
    uint64_t nb01;
    uint64_t nb02;
    uint64_t nb03;
    int32_t  ne11;
    uint64_t nb11;
    uint64_t nb13;
    int32_t  ne33;
    uint64_t nb31;
    uint64_t nb33;
    int32_t  nkps;  // keys per split
    int32_t  ns;    // splits
    float    scale;
} ggml_metal_kargs_flash_attn_ext_latent;

typedef struct {
    int32_t nrows;
    int32_t ns;
} ggml_metal_kargs_flash_attn_ext_latent_reduce;

// states of KDA_CONV and KDA_SCAN; in floats
typedef struct {
    int64_t ns_row;  // from one row of the cache to the next
    int64_t size;
    int64_t offs;  // of the new states in dst
    int32_t n_seqs;
    int32_t n_slots;    // that are written
    int32_t zero_row;   // sequences that continue this row start from zero
    int32_t first_row;  // at which dst_cache begins
    int32_t slot_rows;  // rows of the cache between two slots
} ggml_metal_kargs_kda_states;

typedef struct {
    ggml_metal_kargs_kda_states st;
    uint64_t                    nb01;
    uint64_t                    nb02;
    uint64_t                    nb11;
    uint64_t                    nb12;
    uint64_t                    nb21;
    uint64_t                    nb22;
    int32_t                     n_heads;
    int32_t                     n_tokens;
    float                       eps;
} ggml_metal_kargs_kda_conv;

typedef struct {
    ggml_metal_kargs_kda_states st;
    uint64_t                    nb01;  // qkv
    uint64_t                    nb02;
    uint64_t                    nb03;
    uint64_t                    nb11;  // f
    uint64_t                    nb12;
    uint64_t                    nb13;
    uint64_t                    nb21;  // beta
    uint64_t                    nb22;
    uint64_t                    nb31;  // gate
    uint64_t                    nb32;
    uint64_t                    nb33;
    int32_t                     n_heads;
    int32_t                     n_tokens;
    float                       eps;
    float                       lower_bound;
} ggml_metal_kargs_kda_scan;

typedef struct {
    uint64_t nb01;     // logits row stride
    uint64_t nb1_ids;  // ids row stride
    float    min;
    float    max;
    float    scale;
} ggml_metal_kargs_router;

typedef struct {
    int32_t ne00_4;  // vectors of 4
    float   eps;
} ggml_metal_kargs_add_rms_norm;

#endif
