"""Rows of tiny_models.py: layers with a gated delta rule, three to one with attention if nothing
else is said."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

FULL, LINEAR = "full_attention", "linear_attention"
_HEADS: Fields = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
_UNEVEN: Fields = {
    **_HEADS,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
    "num_hidden_layers": 3,
    "layer_types": [LINEAR, FULL, LINEAR],
}
_ALL_LINEAR: Fields = {
    **_HEADS,
    "linear_num_value_heads": 2,
    "num_hidden_layers": 2,
    "layer_types": [LINEAR, LINEAR],
}
_TWO_LAYERS: Fields = {**_HEADS, "num_hidden_layers": 2, "layer_types": [LINEAR, FULL]}
_FULL_FIRST: Fields = {
    **_HEADS,
    "num_hidden_layers": 3,
    "layer_types": [FULL, LINEAR, FULL],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}
_EXPERTS: Fields = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}
TINY_DELTAS: dict[str, dict[str, Fields]] = {
    "qwen3_next": {
        "as they come": {**_HEADS, **_EXPERTS},
        "uneven heads, some layers dense": {
            **_UNEVEN,
            **_EXPERTS,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
        "all linear": {**_ALL_LINEAR, **_EXPERTS, "mlp_only_layers": [0]},
        "full first, biases": {**_FULL_FIRST, **_EXPERTS},
    },
    "qwen3_5_text": {
        "as they come": _HEADS,
        "uneven heads, tied": {
            **_UNEVEN,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        "all linear": _ALL_LINEAR,
    },
    "qwen3_5": {"tied": {**_TWO_LAYERS, "tie_word_embeddings": True}},
    "qwen3_5_moe_text": {
        "as they come": {**_HEADS, **_EXPERTS},
        "uneven heads, all experts": {
            **_UNEVEN,
            **_EXPERTS,
            "num_experts": 5,
            "attention_bias": True,
            "num_experts_per_tok": 5,
            "shared_expert_intermediate_size": 33,
        },
        "all linear, tied": {
            **_ALL_LINEAR,
            **_EXPERTS,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
        },
    },
    "qwen3_5_moe": {"untied": {**_TWO_LAYERS, **_EXPERTS}},
}
"""Layers of qwen3_5 are those of qwen3_next, but for names of projections. Those of models
that see are their text parts, which are types of their own."""
