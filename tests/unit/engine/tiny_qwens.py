"""Rows of tiny_models.py: qwens."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 21
TINY_QWENS: dict[str, dict[str, Fields]] = {
    "qwen2": {
        "full": {"tie_word_embeddings": True},
        "upper windows": {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
        },
        "all windows of one": {
            "use_sliding_window": True,
            "sliding_window": 1,
            "max_window_layers": 0,
        },
        "layers named": {
            "use_sliding_window": True,
            "sliding_window": 16,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "qwen3": {
        "heads apart": {"head_dim": 24, "tie_word_embeddings": True},
        "biases": {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 4},
        "upper windows": {
            "head_dim": 32,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        "all windows of one": {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
        },
        "one layer, odd sizes": {
            "head_dim": 40,
            "vocab_size": 307,
            "intermediate_size": 101,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
        },
    },
    "qwen2_5_vl": {
        "full": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "tied": {
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rope_parameters": {"type": "mrope", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "upper windows": {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        },
        "all windows of one": {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        "heads": {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
    },
    "qwen3_vl": {
        "heads apart": {
            "head_dim": 24,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4]},
        },
        "tied": {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
            },
        },
        "biases": {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1},
        "odd": {"head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 5},
    },
}
