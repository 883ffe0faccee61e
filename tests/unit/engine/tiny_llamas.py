"""Rows of tiny_models.py: llamas, and those that are made like them."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]


def _factors(num_pairs: int) -> Fields:
    """Of longrope."""
    return {
        "short_factor": [1 + place / 9 for place in range(num_pairs)],
        "long_factor": [3.0 + place * 2 for place in range(num_pairs)],
    }


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 21
TINY_LLAMAS: dict[str, dict[str, Fields]] = {
    "llama": {
        "grouped": {},
        "llama3 rope, tied": {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "biases, odd sizes": {
            "attention_bias": True,
            "mlp_bias": True,
            "vocab_size": 307,
            "intermediate_size": 101,
        },
        "heads of 24": {"hidden_size": 96, "num_key_value_heads": 4},
        "eight heads of 40 on one": {
            "head_dim": 40,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        "one layer, large theta": {
            "num_hidden_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "mistral": {
        "full": {"sliding_window": None},
        "window never left": {"sliding_window": 512, "tie_word_embeddings": True},
        "windowed": {
            "sliding_window": WINDOW,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "hidden_size": 96,
        },
        "window of one": {"sliding_window": 1},
        "window of a block": {"sliding_window": 16, "head_dim": 24, "num_key_value_heads": 1},
    },
    "ministral3": {
        "as they come": {},
        "query scale": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.3,
            },
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        "windowed": {
            "sliding_window": WINDOW,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "original_max_position_embeddings": 10,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "odd heads": {
            "head_dim": 24,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.5,
            },
        },
    },
    "mistral3": {
        "full": {"text_config": {"model_type": "mistral", "sliding_window": None, "head_dim": 24}},
        "windowed": {"text_config": {"model_type": "mistral", "sliding_window": WINDOW}},
        "untied": {
            "text_config": {"sliding_window": None, "num_key_value_heads": 1},
            "tie_word_embeddings": False,
        },
        "ministral": {
            "text_config": {
                "model_type": "ministral3",
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "hidden_size": 96,
                "sliding_window": 16,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                    "llama_4_scaling_beta": 0.2,
                },
            }
        },
    },
    "phi3": {
        "half turns": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "windowed": {"sliding_window": WINDOW, "num_key_value_heads": None},
        "short factors": {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **_factors(6)},
        },
        "long factors": {
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "hidden_size": 96,
            "sliding_window": 16,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "su",
                "original_max_position_embeddings": 32,
                **_factors(8),
            },
        },
    },
    "granite": {
        "scaled": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
            "tie_word_embeddings": True,
        },
        "biases": {
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 0.3,
            "residual_multiplier": 1.7,
            "logits_scaling": 0.7,
        },
        "neutral but attention": {"head_dim": 24, "num_key_value_heads": 1},
        "odd": {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "embedding_multiplier": 0.5,
            "logits_scaling": 0.6,
            "attention_multiplier": 0.11,
        },
    },
    "smollm3": {
        "every second": {"no_rope_layer_interval": 2},
        "windows without rope": {
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "tie_word_embeddings": False,
        },
        "layers named, biases": {
            "attention_bias": True,
            "mlp_bias": True,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, FULL],
            "use_sliding_window": True,
            "sliding_window": 16,
            "num_key_value_heads": 1,
        },
        "no rope": {"no_rope_layers": [0, 0], "num_key_value_heads": 4, "head_dim": 24},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5e6,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "glm4": {
        "half turns": {"head_dim": 16},
        "a part turns": {
            "head_dim": 24,
            "partial_rotary_factor": 0.3,
            "attention_bias": False,
            "num_key_value_heads": 4,
        },
        "all turns": {
            "head_dim": 16,
            "partial_rotary_factor": 1.0,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
        },
        "odd heads": {
            "head_dim": 32,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 101,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    },
}
