#pragma once

// Finds the device on which LATENT_ATTN would run, and whether it can run there.

#include "ggml-backend.h"

#include <string>

// node: a LATENT_ATTN whose cache and weights have memory; it need not be part of a graph.
// Returns the device that has the cache, k_b and v_b; nullptr and the reason if they are not on one device. Memory that
// the CPU reads in place counts as the CPU's, whoever allocated it. A tensor without memory (in a dry run that only
// measures the model) is ignored; if no tensor has memory, returns nullptr and sets no reason.
ggml_backend_dev_t llama_latent_attn_holder(const ggml_tensor * node, std::string & why);

// Returns why this device cannot compute the node, or an empty string.
std::string llama_latent_attn_obstacle(const ggml_tensor * node);

// Whether the cache is on a device of ggml's CUDA backend, which has its own break-even point.
bool llama_latent_attn_on_cuda(const ggml_tensor * cache);

// Whether that device's tensor cores add in float32 as fast as in half (GGML_BACKEND_LATENT_FAST_SUMS).
bool llama_latent_attn_fast_sums(const ggml_tensor * cache);

// Whether the cache is in the CPU's memory.
bool llama_latent_attn_on_cpu(const ggml_tensor * cache);
