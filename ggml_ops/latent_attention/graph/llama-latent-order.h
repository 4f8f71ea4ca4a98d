#pragma once

// An input of the graph: the cells of the cache in the order of the positions of their tokens, for each sequence of the
// ubatch (GGML_LATENT_ORDER_SRC in ggml-latent-attn.h). With it, attention on the CPU does not depend on where the cells
// are, or on other sequences.

#include "llama-graph.h"

#include <functional>

class llama_kv_cells;

// I32 [n_kv, n_seqs]; nullptr if the tokens of a sequence are not neighbours in the ubatch, without flash attention, or
// if KIMI_OPS does not have mla and batch.
ggml_tensor *
llama_latent_order(ggml_context * ctx, const llama_ubatch & ubatch, const llama_cparams & cparams, int64_t n_kv);

// Writes the lists; cells_of: the cells of the stream of a sequence.
void llama_latent_order_set(ggml_tensor *                                               order,
                            const llama_ubatch &                                        ubatch,
                            const std::function<const llama_kv_cells &(llama_seq_id)> & cells_of);

// Gives the order to the last FLASH_ATTN_EXT node of the graph, or to a LATENT_ATTN node, if its cache is in the CPU's
// memory.
void llama_latent_order_attach(ggml_cgraph * graph, ggml_tensor * order);
void llama_latent_order_attach(ggml_cgraph * graph, ggml_tensor * order, ggml_tensor * node);
