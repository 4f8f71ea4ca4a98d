#pragma once

// Where LATENT_ATTN would be computed, and whether it can be.

#include <string>

struct ggml_tensor;

// node: a LATENT_ATTN on a cache and weights that have their memory; it need not be part of a graph.
// Returns why the device that holds all three cannot compute it, or an empty string. Memory that the CPU reads in place
// counts as the CPU's, whoever allocated it; a tensor without memory (a model that is only measured) hinders nothing.
std::string llama_latent_attn_obstacle(const ggml_tensor * node);

// Whether the cache lies on a device of ggml's CUDA backend, which has a break-even of its own.
bool llama_latent_attn_on_cuda(const ggml_tensor * cache);
