#pragma once

// Verifies the operators on the GPUs of a context, before it decides which ones to use.

struct llama_kimi_ops;
struct llama_model;

// Does nothing for GPUs on which the model and the value of KIMI_OPS use none of our operators, or which do not compute
// anything of the model. No context of the process uses an operator on a device on which it failed. With ops.require,
// throws std::runtime_error if `ops` selects such an operator.
// op_offload: whether GPUs compute large batches of layers that they do not hold.
void llama_verify_operators(const llama_model & model, const llama_kimi_ops & ops, bool op_offload);
