"""config.json of published models, for the bench and synthetic_checkpoint.py: the keys that the converter reads.

Output: a dictionary per model. Sources: the published config.json files (Ling 3.0, Kimi K3) and the defaults of
`Glm5NextTextConfig` in transformers 5.23. Context lengths of Ling 3.0: 262144 for flash (sgl-project/sglang#33882) and
131072 for tiny (SGLang's cookbook for Ling-3.0-tiny: "Native context length is 128K"; services that list 256K for tiny
extend it). Ling-3.0-tiny of this shape has the published number of parameters, 7.89 billion. `index_kpool` of
GLM-5.3-Flash is 4 in the published file; transformers' default is 16.
"""

from __future__ import annotations

from typing import Any, Final

Config = dict[str, Any]

_LING: Final[Config] = {
    "eos_token_id": 156895,
    "gated_attention_proj_granularity_type": "head_wise",
    "head_dim": 128,
    "hidden_act": "silu",
    "kda_lower_bound": -5.0,
    "kda_safe_gate": True,
    "kv_lora_rank": 512,
    "max_position_embeddings": 262144,
    "model_type": "bailing_hybrid",
    "n_group": 8,
    "no_kda_lora": True,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "pad_token_id": 156892,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 6000000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "short_conv_kernel_size": 4,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 157184,
}
LING_TINY: Final[Config] = _LING | {
    "first_k_dense_replace": 1,
    "hidden_size": 1536,
    "intermediate_size": 4608,
    "layer_group_size": 4,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_hidden_layers": 24,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 256,
}
# The bench leaves out the layer that predicts a further token: it is not part of a decode.
LING_FLASH: Final[Config] = _LING | {
    "expert_swiglu_limit_list": [0] * 35 + [4] * 7,
    "first_k_dense_replace": 2,
    "hidden_size": 2560,
    "intermediate_size": 6144,
    "layer_group_size": 6,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 512,
    "num_hidden_layers": 42,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "share_expert_swiglu_limit_list": [0] * 34 + [5] * 6 + [7] * 2,
}

KIMI_K3: Final[Config] = {  # its text_config
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "attn_res_block_size": 12,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_act": "situ",
    "hidden_size": 7168,
    "intermediate_size": 33792,
    "kv_lora_rank": 512,
    "latent_moe_use_norm": True,
    "linear_attn_config": {
        "gate_lower_bound": -5.0,
        "head_dim": 128,
        "num_heads": 96,
        "short_conv_kernel_size": 4,
        "use_full_rank_gate": True,
    },
    "max_position_embeddings": 1048576,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "moe_intermediate_size": 3072,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 96,
    "num_expert_group": 1,
    "num_experts": 896,
    "num_experts_per_token": 16,
    "num_hidden_layers": 93,
    "num_shared_experts": 2,
    "pad_token_id": 163839,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "routed_expert_hidden_size": 3584,
    "routed_scaling_factor": 1.0,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

GLM_FLASH: Final[Config] = {  # its text_config
    "gate_lower_bound": -5.0,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_kpool": 4,
    "index_n_heads": 32,
    "index_topk": 2048,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 128,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 288,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_dense_layers": 3,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 45,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.5,
    "swiglu_limit": 10.0,
    "v_head_dim": 256,
    "vocab_size": 154880,
}
