#pragma once

// Builds the attention of an MLA layer in its decompressed form (the operator LATENT_ATTN), and chooses between this
// form and the absorbed form of upstream's graph.

#include "llama-graph.h"

struct llama_layer;

// Whether to use the decompressed form for this layer and this batch.
// It requires `mla` in KIMI_OPS, k_b and v_b, flash attention, enough queries per stream to make up for the expansion
// of keys and values, and one device that holds cache and weights and supports the operator. If only the device is
// missing, logs this once, or throws std::runtime_error with KIMI_OPS=require.
// This form reads k_b and v_b without a matmul. So it is not used if somebody observes the graph (cb_eval), or if an
// adapter of k_b or v_b is active.
bool llama_latent_attn_wanted(const llm_graph_context &      g,
                              const llm_graph_input_attn_k * inp,
                              const llama_layer &            layer,
                              int                            il);

// Two ubatches of the same size use the same form if this number is the same.
int llama_latent_attn_row(const llama_ubatch & ubatch);

// The largest number of tokens, in as many streams as this graph has or in n_seqs sequences, that does not use
// LATENT_ATTN; 0 if the graph has no LATENT_ATTN.
uint32_t llama_latent_attn_max_absorbed(ggml_cgraph * graph, uint32_t n_seqs);

// Writes k_cur [n_latent + n_rope, 1, n_tokens] to the cache and computes the attention.
// q: [n_nope + n_rope, n_head, n_tokens], nope first. Returns [n_value * n_head, n_tokens], before wo.
ggml_tensor * llama_latent_attn(const llm_graph_context & g,
                                llm_graph_input_attn_k *  inp,
                                const llama_layer &       layer,
                                ggml_tensor *             q,
                                ggml_tensor *             k_cur,
                                float                     kq_scale,
                                int                       il);
