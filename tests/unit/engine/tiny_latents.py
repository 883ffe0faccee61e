"""Rows of tiny_models.py: models with latents in the cache."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

_YARN: Fields = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
_SIZES: Fields = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
}
_V2: Fields = {**_SIZES, "first_k_dense_replace": 1}
_V3: Fields = {**_V2, "n_group": 2, "topk_group": 1}
_AS_KIMI: Fields = {
    **_V2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_parameters": {**_YARN, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
TINY_LATENTS: dict[str, dict[str, Fields]] = {
    "deepseek_v2": {
        "as lite": {
            **_V2,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        "groups by their best": {
            **_V2,
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 16.0,
            "attention_bias": True,
        },
        "groups of one, biases, tied": {
            **_V2,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
        "no layer dense, odd sizes": {
            **_V2,
            "first_k_dense_replace": 0,
            "kv_lora_rank": 38,
            "q_lora_rank": 33,
            "qk_nope_head_dim": 14,
            "qk_rope_head_dim": 6,
            "v_head_dim": 13,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    },
    "deepseek_v3": {
        "as they come": {
            **_V3,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "queries without a latent, halves": {
            **_V3,
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "attention_bias": True,
        },
        "two dense, one of three mixed": {
            **_V3,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
        "no layer dense, one head": {
            **_V3,
            "first_k_dense_replace": 0,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "kv_lora_rank": 27,
            "v_head_dim": 40,
            "routed_scaling_factor": 1.0,
        },
    },
    "kimi_k2": {
        "as it comes": _AS_KIMI,
        "groups, queries without a latent": {
            **_AS_KIMI,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "q_lora_rank": None,
        },
        "two dense, tied, halves": {
            **_AS_KIMI,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "n_shared_experts": 2,
        },
        "no layer dense, odd sizes, biases": {
            **_AS_KIMI,
            "first_k_dense_replace": 0,
            "kv_lora_rank": 30,
            "q_lora_rank": 21,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 22,
            "attention_bias": True,
            "norm_topk_prob": False,
        },
    },
    "glm4_moe_lite": {
        "as they come": {**_SIZES, "qk_nope_head_dim": 24, "v_head_dim": 32},
        "groups, yarn": {
            **_SIZES,
            "n_group": 2,
            "topk_group": 1,
            "attention_bias": True,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "layers named, no latent of queries": {
            **_SIZES,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
        "all sparse, five heads, halves": {
            **_SIZES,
            "hidden_size": 80,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "mlp_layer_types": ["sparse", "sparse"],
            "rope_interleave": False,
            "n_shared_experts": 2,
            "num_experts_per_tok": 5,
        },
    },
}
ALIASES = {"kimi_k2": "deepseek_v3"}
"""Types whose name transformers does not know, and what they are there."""
