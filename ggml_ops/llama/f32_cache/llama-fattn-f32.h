#pragma once

struct ggml_context;
struct ggml_tensor;

// Flash attention over an F32 cache.
//
// in : a GGML_OP_FLASH_ATTN_EXT node with all its sources, not yet part of a graph
// out: the same node; where K or V is F32 and the backend that holds the cache cannot read F32 in this operator,
//      its sources are F16 copies. One copy serves both when V is a view of K (MLA), and V stays a view of K.
//      K and V that no cache holds are copied as well.
void llama_fattn_fit_f32(ggml_context * ctx, ggml_tensor * fattn);
