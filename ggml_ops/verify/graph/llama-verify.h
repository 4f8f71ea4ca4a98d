#pragma once

// Has the operators verified on the GPUs of a context, before it decides which ones to use.

struct llama_kimi_ops;
struct llama_model;

// Does nothing for models and values of KIMI_OPS that use no operator of ours on a GPU. What fails the check is not
// used there by any context of the process; with ops.require, throws std::runtime_error if `ops` selects it.
// op_offload: whether GPUs compute large batches of layers that they do not hold.
void llama_verify_operators(const llama_model & model, const llama_kimi_ops & ops, bool op_offload);
