#pragma once

// LATENT_ATTN: attention over a latent cache, with keys and values expanded from it (MLA, decompressed).
// Specification: the operator's README. This header adds it to a graph.

#include "ggml-backend.h"
#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// q      F32            [n_nope + n_rope, n_queries, n_heads, n_streams]
// k      any cache type [n_latent + n_rope, n_keys, 1, n_streams]; contiguous rows, constant row stride
// k_b    any type       [n_nope, n_latent, n_heads]
// v_b    any type       [n_latent, n_value, n_heads]
// mask   F16 or null    [n_keys, n_queries or more, 1, a divisor of n_streams]
// result F32            [n_value, n_heads, n_queries, n_streams]
GGML_API struct ggml_tensor * ggml_latent_attn(struct ggml_context * ctx,
                                               struct ggml_tensor *  q,
                                               struct ggml_tensor *  k,
                                               struct ggml_tensor *  k_b,
                                               struct ggml_tensor *  v_b,
                                               struct ggml_tensor *  mask,
                                               float                 scale);

// Optional source of LATENT_ATTN and of FLASH_ATTN_EXT nodes with one KV head: the cells of the cache in the order of the
// positions of their tokens, so that the result does not depend on where the cells are, or on other sequences.
//   order  I32 [n_keys, n_groups * n_streams]; a list ends with -1, or has n_keys cells
// The queries of each stream are n_groups groups of equal size; LATENT_ATTN has one group. A query sees no cell that is
// not in the list of its group. Backends without it read the keys in the order of the cells.
enum { GGML_LATENT_ORDER_SRC = 5 };

// The sizes of a LATENT_ATTN node.
struct ggml_latent_attn_shape {
    int64_t n_nope;    // values of a key expanded with k_b
    int64_t n_latent;  // values of a cache row that k_b and v_b expand
    int64_t n_key;     // n_nope + n_rope
    int64_t n_cache;   // n_latent + n_rope
    int64_t n_value;
    int64_t n_queries;
    int64_t n_heads;
    int64_t n_streams;
    int64_t n_keys;
};

GGML_API struct ggml_latent_attn_shape ggml_latent_attn_get_shape(const struct ggml_tensor * node);

// ggml-cuda answers to this name in ggml_backend_reg_get_proc_address with such a function: whether the tensor cores of a
// device add products of halves as fast in float32 as in half. So it is with NVIDIA's devices for data centres, and not
// with GeForce. Upstream's absorbed kernel adds values in half, so the break-even points of the two forms differ.
#define GGML_BACKEND_LATENT_FAST_SUMS "ggml_backend_latent_fast_sums"
typedef bool (*ggml_backend_latent_fast_sums_t)(ggml_backend_dev_t dev);

#ifdef __cplusplus
}
#endif
