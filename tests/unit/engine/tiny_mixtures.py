"""Rows of tiny_models.py: mixtures of experts."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 21
_EXPERTS: Fields = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL: Fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Fields = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TINY_MIXTURES: dict[str, dict[str, Fields]] = {
    "qwen3_moe": {
        "as they come": {**_EXPERTS, "norm_topk_prob": True, "head_dim": 24},
        "some layers dense": {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
        "windows of one": {
            **_EXPERTS,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "num_experts": 33,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
        },
        "odd sizes, all experts": {
            "num_experts": 5,
            "num_experts_per_tok": 5,
            "moe_intermediate_size": 37,
            "norm_topk_prob": True,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_hidden_layers": 1,
        },
    },
    "qwen2_moe": {
        "as they come": {**_EXPERTS, "shared_expert_intermediate_size": 80},
        "normalised, windows": {
            **_EXPERTS,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 33,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "num_hidden_layers": 4,
            "max_window_layers": 2,
            "mlp_only_layers": [0, 3],
        },
        "without biases, tied": {
            **_EXPERTS,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 48,
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
        "layers named": {
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 3,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": [FULL, SLIDING, FULL],
        },
    },
    "mixtral": {
        "as they come": {**_LOCAL},
        "windows": {**_LOCAL, "sliding_window": WINDOW, "head_dim": 24, "num_local_experts": 7},
        "one expert": {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 4},
        "tied, linear rope": {
            **_LOCAL,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    },
    "glm4_moe": {
        "as they come": {**_ROUTED, "routed_scaling_factor": 2.5, "head_dim": 24},
        "groups, norms of heads": {
            **_ROUTED,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "use_qk_norm": True,
            "attention_bias": True,
        },
        "two shared, not normalised": {
            **_ROUTED,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
        "no layer dense": {
            **_ROUTED,
            "n_routed_experts": 6,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
        },
    },
    "gpt_oss": {
        "as they come": {**_LOCAL, "head_dim": 16, "sliding_window": WINDOW},
        "all full, no biases": {
            **_LOCAL,
            "head_dim": 24,
            "layer_types": [FULL] * 2,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "all windows, low limit": {
            **_LOCAL,
            "num_local_experts": 8,
            "head_dim": 16,
            "num_attention_heads": 8,
            "sliding_window": 16,
            "layer_types": [SLIDING] * 2,
            "swiglu_limit": 0.75,
            "tie_word_embeddings": True,
        },
        "odd sizes": {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "head_dim": 40,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 37,
            "num_hidden_layers": 3,
            "sliding_window": 1,
            "swiglu_alpha": 1.1,
        },
    },
}
