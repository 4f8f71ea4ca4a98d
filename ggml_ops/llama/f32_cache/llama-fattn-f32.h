#pragma once

struct ggml_context;
struct ggml_tensor;

// Flash attention over an F32 cache.
//
// Input:  a GGML_OP_FLASH_ATTN_EXT node with all its sources, not yet part of a graph
// Output: the same node; if K or V is F32 and the backend that holds the cache does not support F32 in this operator,
//         its sources are F16 copies. One copy is used for both if V is a view of K (MLA), and V stays a view of K.
//         K and V that are not in a cache are copied as well.
void llama_fattn_fit_f32(ggml_context * ctx, ggml_tensor * fattn);
