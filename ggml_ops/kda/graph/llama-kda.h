#pragma once

// Builds the token mixer of a KDA layer from the operators KDA_CONV and KDA_SCAN, and decides whether to use it instead
// of upstream's graph. Serves all architectures with Kimi Delta Attention: kimi-linear, bailingmoe3 (Ling 3), glm5-next
// (GLM-5.3-Flash) and kimi-k3.

#include "kimi-ops.h"
#include "llama-graph.h"

#include <functional>
#include <vector>

struct llama_layer;
struct llama_model;

// Whether the layers of this architecture are KDA layers where they are recurrent.
bool llama_kda_is_family(const llama_model & model);

// Whether the graph of this model may use the operators. If not, logs the reason, or throws if `ops` requires them.
bool llama_kda_wanted(const llama_model & model, const llama_kimi_ops & ops);

// Whether the devices that hold the KDA layers support the operators. `probe` builds the graph for a number of tokens
// per sequence and returns its fused nodes. If not, logs what is missing, or throws if `ops` requires the operators.
bool llama_kda_resolve(const llama_model &                                                        model,
                       const llama_kimi_ops &                                                     ops,
                       const std::function<const std::vector<llm_graph_fused_node> &(uint32_t)> & probe);

// x: the normed input of the layer, [n_embd, n_tokens]. Returns [n_embd, n_tokens], before the residual is added. Also
// adds the copies of the new states to the cache to the graph.
ggml_tensor * llama_kda_mixer(
    const llm_graph_context & g, const llama_layer & layer, llm_graph_input_rs * inp, ggml_tensor * x, int il);
