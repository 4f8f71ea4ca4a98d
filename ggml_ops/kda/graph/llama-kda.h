#pragma once

// The token mixer of a KDA layer on the operators KDA_CONV and KDA_SCAN, and the choice between it and
// upstream's graph.

#include "kimi-ops.h"
#include "llama-graph.h"

#include <functional>
#include <vector>

struct llama_layer;
struct llama_model;

// May the graph of this model use the operators at all? Logs why not; throws where `ops` requires them.
bool llama_kda_wanted(const llama_model & model, const llama_kimi_ops & ops);

// Do the devices that hold the KDA layers have the operators? `probe` builds the graph of so many tokens for
// each sequence and returns its fused nodes. Logs what is missing; throws where `ops` requires them.
bool llama_kda_resolve(const llama_model &                                                        model,
                       const llama_kimi_ops &                                                     ops,
                       const std::function<const std::vector<llm_graph_fused_node> &(uint32_t)> & probe);

// x [n_embd, n_tokens], the layer's normed input -> [n_embd, n_tokens], before the residual. Adds the copies of
// the new states into the cache to the graph.
ggml_tensor * llama_kda_mixer(
    const llm_graph_context & g, const llama_layer & layer, llm_graph_input_rs * inp, ggml_tensor * x, int il);
