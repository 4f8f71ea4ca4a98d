#pragma once

// The decompressed form of MLA as a graph of upstream's operators, for devices without LATENT_ATTN: keys and values are
// expanded by matmuls with k_b and v_b, for a group of heads at a time, and go into FLASH_ATTN_EXT.

#include <cstdint>
#include <string>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;

// Sequences with more cells stay absorbed: with 64 heads, their expanded keys and values would need more than 1 GiB.
constexpr int64_t LLAMA_LATENT_PLAIN_MAX_CELLS = 1 << 17;

// The smallest number of queries for which this form is faster than the absorbed one.
constexpr uint32_t LLAMA_LATENT_PLAIN_MIN_QUERIES = 240;

// Queries from which this form is faster than the absorbed one for a sequence with n_keys keys. Does not decrease with
// n_keys.
int64_t llama_latent_plain_min_queries(const ggml_tensor * cache, int64_t n_keys);

// node: a LATENT_ATTN of one sequence whose cache and weights have memory; it need not be part of a graph.
// Returns why its device cannot compute the plain graph, or an empty string.
std::string llama_latent_plain_obstacle(const ggml_tensor * node);

// Adds the plain graph to `graph` instead of the node. Returns the node's result. It reads the cells `own` of the cache,
// with `own_mask` as their mask: see llama-latent-inputs.h.
ggml_tensor * llama_latent_plain(
    ggml_context * ctx, ggml_cgraph * graph, const ggml_tensor * node, ggml_tensor * own, ggml_tensor * own_mask);

// Whether a node of a graph is the attention of such a plain graph. Its K has the keys of the sequence.
bool llama_latent_plain_has(const ggml_tensor * node);
