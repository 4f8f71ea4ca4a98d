#pragma once

// Inputs of the graph for MLA: the cells of the cache that the sequences of the ubatch have.

#include <cstdint>

class llama_kv_cache_context;

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct llama_cparams;
struct llama_ubatch;

struct llama_latent_inputs {
    // I32 [n_kv, n_seqs]: the cells of each sequence in the order of the positions of their tokens, then -1
    // (GGML_LATENT_ORDER_SRC in ggml-latent-attn.h). With it, attention on the CPU does not depend on where the cells are,
    // or on other sequences. nullptr if the tokens of a sequence are not neighbours in the ubatch, without flash
    // attention, or if KIMI_OPS does not have mla and batch.
    ggml_tensor * order = nullptr;

    // For the plain graph (llama-latent-plain.h), which reads only the cells of the sequence. nullptr if the ubatch has
    // too few tokens or several sequences, if the sequence has too many cells, without flash attention, or if KIMI_OPS
    // does not have mla and plain.
    ggml_tensor * own      = nullptr;  // I32 [n_own]: the cells in the same order; the last one is repeated
    ggml_tensor * own_mask = nullptr;  // F16 [n_own, n_tokens]: 0 for visible cells, else -inf

    // Creates the tensors.
    void build(ggml_context *                 ctx,
               const llama_ubatch &           ubatch,
               const llama_cparams &          cparams,
               const llama_kv_cache_context * mctx);

    // Writes the tensors that the graph uses.
    void set(const llama_ubatch & ubatch, const llama_kv_cache_context * mctx, const llama_cparams & cparams) const;

    // Whether a graph with these inputs computes the attention of another ubatch of the same shape.
    bool
    can_reuse(const llama_ubatch & ubatch, const llama_cparams & cparams, const llama_kv_cache_context * mctx) const;

    // Gives the order to the last FLASH_ATTN_EXT node of the graph, or to a LATENT_ATTN node, if its cache is in the
    // CPU's memory.
    void attach_order(ggml_cgraph * graph) const;
    void attach_order(ggml_cgraph * graph, ggml_tensor * node) const;

  private:
    int row = -1;  // llama_latent_attn_row of the ubatch; -1 without build
};
