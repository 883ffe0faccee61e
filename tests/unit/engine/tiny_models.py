"""Random tiny models of every type, made with transformers: what test_model_types.py runs over.

A type adds its rows to TINY_MODELS; nothing else has to know of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from tests.unit.engine.tiny_gemmas import TINY_GEMMAS

Fields = dict[str, Any]
_CAUSAL_LM: Any = AutoModelForCausalLM
_MULTIMODAL: Any = AutoModelForImageTextToText

SIZES: Fields = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _factors(num_pairs: int) -> Fields:
    """Of longrope."""
    return {
        "short_factor": [1 + place / 9 for place in range(num_pairs)],
        "long_factor": [3.0 + place * 2 for place in range(num_pairs)],
    }


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 21
"""Of the windowed ones; some prompts end around it."""
VISION: dict[str, Fields] = {
    "gemma3": {"num_attention_heads": 2, "image_size": 64, "patch_size": 16},
    "gemma4": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    "mistral3": {"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 8},
    "qwen2_5_vl": {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    "qwen3_vl": {
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}
"""Multimodal types, and what makes their vision small; the fields of others are the text's."""

TINY_MODELS: dict[str, dict[str, Fields]] = {
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
    **TINY_GEMMAS,
}
CASES = [(model_type, case) for model_type, cases in TINY_MODELS.items() for case in cases]


def make_tiny(
    model_dir: Path, model_type: str, fields: Fields, *, std: float = 0.35, seed: int = 7
) -> Any:
    """Saves a random model → the same in transformers, float32 and eager.

    Logits are far apart, and attention looks at few tokens.
    """
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    torch.manual_seed(seed)
    model = _new_model(model_type, fields)
    # Embeddings are scaled by the root of their size, and a head that they are tied to is not.
    has_small_head = model_type.startswith("gemma") and model.config.tie_word_embeddings
    adds_one = model_type.startswith(("gemma2", "gemma3"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if has_small_head and name.endswith("model.norm.weight"):
                parameter.uniform_(6, 8)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(1.0 if adds_one else 0.0)
            elif has_small_head and "embed_tokens" in name:
                parameter.normal_(std=std / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=std / 0.7)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(std=std)
            else:
                parameter.normal_(std=std * 0.7)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.7, 1.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(model_dir)
    return model.eval()


def _new_model(model_type: str, fields: Fields) -> Any:
    if model_type not in VISION:
        config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
        return _CAUSAL_LM.from_config(config, attn_implementation="eager")
    fields = dict(fields)
    outer = {name: fields.pop(name) for name in ("tie_word_embeddings",) if name in fields}
    # An image is made padding before it is looked at.
    text = {**SIZES, "pad_token_id": 0, **fields.pop("text_config", fields)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= VISION[model_type]
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **outer)
    return _MULTIMODAL.from_config(config, attn_implementation="eager")
