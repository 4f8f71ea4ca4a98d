#pragma once

// Finds the device on which LATENT_ATTN would run, and whether it can run there.

#include <string>

struct ggml_tensor;

// node: a LATENT_ATTN whose cache and weights have memory; it need not be part of a graph.
// Returns why no device can compute it, or an empty string: cache, k_b and v_b must be on one device that supports the
// node. Memory that the CPU reads in place counts as the CPU's, whoever allocated it. A tensor without memory (in a dry
// run that only measures the model) is ignored.
std::string llama_latent_attn_obstacle(const ggml_tensor * node);

// Whether the cache is on a device of ggml's CUDA backend, which has its own break-even point.
bool llama_latent_attn_on_cuda(const ggml_tensor * cache);

// Whether the cache is in the CPU's memory.
bool llama_latent_attn_on_cpu(const ggml_tensor * cache);
