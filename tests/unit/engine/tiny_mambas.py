"""Rows of tiny_models.py: models with mixers of Mamba2."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

MAMBA, ATTENTION, MLP, MIXTURE = "linear_attention", "full_attention", "mlp", "moe"
_MAMBA2: Fields = {
    "chunk_size": 32,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 1,
}
_NEMOTRON: Fields = {
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
}
_GRANITE: Fields = {
    "intermediate_size": 48,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
    "num_local_experts": 0,
    "layer_types": [MAMBA, ATTENTION],
    "attention_multiplier": 0.2,
}
_FALCON: Fields = {
    "mamba_chunk_size": 32,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "mamba_d_state": 16,
}
TINY_MAMBAS: dict[str, dict[str, Fields]] = {
    "mamba2": {
        "as they come": _MAMBA2,
        "groups, biases, tied": {
            **_MAMBA2,
            "n_groups": 4,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        "odd sizes, steps within limits": {
            **_MAMBA2,
            "hidden_size": 60,
            "num_heads": 5,
            "head_dim": 24,
            "state_size": 19,
            "conv_kernel": 3,
            "time_step_limit": (0.3, 1.2),
        },
        "no bias of convolutions, small heads": {
            **_MAMBA2,
            "num_heads": 32,
            "head_dim": 4,
            "n_groups": 2,
            "use_conv_bias": False,
            "conv_kernel": 2,
        },
    },
    "nemotron_h": {
        "layers of each kind": {
            **_NEMOTRON,
            "layers_block_type": [MAMBA, MIXTURE, ATTENTION, MLP, MAMBA],
        },
        "ends with an attention, biases": {
            **_NEMOTRON,
            "layers_block_type": [MLP, MAMBA, ATTENTION],
            "use_bias": True,
            "mlp_bias": True,
            "time_step_min": 0.4,
        },
        "mixtures over latents, groups of experts": {
            **_NEMOTRON,
            "layers_block_type": [MAMBA, MIXTURE, MIXTURE],
            "moe_latent_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": False,
        },
        "attention alone, one group": {
            **_NEMOTRON,
            "n_groups": 1,
            "layers_block_type": [ATTENTION, MLP],
        },
    },
    "granitemoehybrid": {
        "as dense ones come": {
            **_GRANITE,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.9,
            "tie_word_embeddings": True,
        },
        "experts, rope, groups": {
            **_GRANITE,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.7,
            "mamba_n_groups": 2,
        },
        "attention first, biases": {
            **_GRANITE,
            "layer_types": [ATTENTION, MAMBA, MAMBA],
            "num_hidden_layers": 3,
            "attention_bias": True,
            "mamba_proj_bias": True,
            "residual_multiplier": 0.6,
            "time_step_limit": (0.1, 0.9),
        },
        "mixers alone, no bias of convolutions": {
            **_GRANITE,
            "layer_types": None,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "mamba_d_head": 16,
        },
    },
    "falcon_h1": {
        "as they come": _FALCON,
        "every multiplier": {
            **_FALCON,
            "embedding_multiplier": 2.5,
            "lm_head_multiplier": 0.7,
            "key_multiplier": 0.6,
            "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 0.9,
            "ssm_in_multiplier": 0.7,
            "ssm_out_multiplier": 1.3,
            "ssm_multipliers": [0.6, 0.7, 0.8, 0.9, 1.1],
            "mlp_multipliers": [0.7, 0.6],
        },
        "normalised before the gate, biases": {
            **_FALCON,
            "mamba_rms_norm": True,
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "ssm_in_multiplier": 0.5,
            "ssm_multipliers": [1.5, 0.5, 1.0, 1.0, 0.8],
        },
        "normalised behind the gate, tied, expanded": {
            **_FALCON,
            "mamba_d_ssm": None,
            "mamba_n_heads": 8,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "tie_word_embeddings": True,
            "time_step_limit": (0.2, 1.0),
        },
    },
}
